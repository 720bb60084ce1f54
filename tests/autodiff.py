"""Gradients by the framework's plain autodiff, one group of examples at a time: the truth for gradient samples."""

import inspect

import keras
import numpy as np
from keras import ops, tree


def plain_gradients(model, variables, loss_of_output):
    """A function `f(x, *rest) -> [d loss / d variable, ...]`, of one call `model(x, training=False)`, in float64.

    Args:
        model: A Keras model.
        variables: Its trainable variables to differentiate.
        loss_of_output: `f(output, *rest) -> scalar`, written by hand in the test.
    """
    make = {"torch": _torch, "tensorflow": _tensorflow, "jax": _jax}[keras.backend.backend()]
    gradients = make(model, variables, loss_of_output)

    def of_group(*group):
        x, *rest = tree.map_structure(ops.convert_to_tensor, list(group))
        return [np.asarray(grad, np.float64) for grad in gradients(x, *rest)]

    return of_group


def _inference(model):
    return {"training": False} if "training" in inspect.signature(model.call).parameters else {}


def _torch(model, variables, loss):
    import torch

    def gradients(x, *rest):
        values = [v.value for v in variables]
        total = loss(model(x, **_inference(model)), *rest)
        grads = torch.autograd.grad(total, values, allow_unused=True, materialize_grads=True)
        return [grad.detach().double().cpu().numpy() for grad in grads]

    return gradients


def _tensorflow(model, variables, loss):
    import tensorflow as tf

    def gradients(x, *rest):
        values = [v.value for v in variables]
        with tf.GradientTape() as tape:
            total = loss(model(x, **_inference(model)), *rest)
        grads = tape.gradient(total, values, unconnected_gradients="zero")
        return [tf.cast(tf.convert_to_tensor(grad), tf.float64).numpy() for grad in grads]

    return gradients


def _jax(model, variables, loss):
    import jax

    places = [next(i for i, v in enumerate(model.trainable_variables) if v is wanted) for wanted in variables]

    @jax.jit
    @jax.grad
    def of_all(trainable, fixed, x, rest):
        output, _ = model.stateless_call(trainable, fixed, x, **_inference(model))
        return loss(output, *rest)

    def gradients(x, *rest):
        trainable = [v.value for v in model.trainable_variables]
        grads = of_all(trainable, [v.value for v in model.non_trainable_variables], x, rest)
        return [grads[place] for place in places]

    return gradients
