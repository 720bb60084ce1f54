"""One batched forward and backward pass, as each framework does it: what gradient samples are compared with."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops


def batched_pass(
    model: keras.Model, variables: list, x: np.ndarray, y: np.ndarray, size: int
) -> Callable[[], list[np.ndarray]]:
    """Sums the gradients of batches, with each framework's own tools; the last batch may be cut short."""
    make = {"torch": _torch_pass, "tensorflow": _tensorflow_pass, "jax": _jax_pass}[keras.backend.backend()]
    step = make(model, variables)
    count = len(x) // size * size
    assert count == len(x), f"--examples must be a multiple of {size}"

    def run() -> list[np.ndarray]:
        parts = [step(x[i : i + size], y[i : i + size]) for i in range(0, count, size)]
        return [sum(ops.convert_to_numpy(grad) for grad in grads) for grads in zip(*parts, strict=True)]

    return run


def _summed_loss(output: Any, y: Any) -> Any:
    return ops.sum(keras.losses.sparse_categorical_crossentropy(y, output, from_logits=True))


def _torch_pass(model: keras.Model, variables: list) -> Callable[..., Any]:
    import torch

    values = [v.value for v in variables]

    def step(x: np.ndarray, y: np.ndarray) -> Any:
        loss = _summed_loss(model(torch.from_numpy(x), training=False), torch.from_numpy(y))
        return torch.autograd.grad(loss, values)

    return step


def _tensorflow_pass(model: keras.Model, variables: list) -> Callable[..., Any]:
    import tensorflow as tf

    values = [v.value for v in variables]

    @tf.function(reduce_retracing=True)
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            loss = _summed_loss(model(x, training=False), y)
        return tape.gradient(loss, values)

    return lambda x, y: step(tf.constant(x), tf.constant(y))


def _jax_pass(model: keras.Model, variables: list) -> Callable[..., Any]:
    import jax

    places = [next(i for i, v in enumerate(model.trainable_variables) if v is wanted) for wanted in variables]

    @jax.jit
    def step(chosen: Any, trainable: Any, fixed: Any, x: Any, y: Any) -> Any:
        def of_chosen(chosen: Any) -> Any:
            values = list(trainable)
            for place, value in zip(places, chosen, strict=True):
                values[place] = value
            output, _ = model.stateless_call(values, fixed, x, training=False)
            return _summed_loss(output, y)

        return jax.grad(of_chosen)(chosen)

    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    chosen = [trainable[place] for place in places]
    return lambda x, y: step(chosen, trainable, fixed, x, y)
