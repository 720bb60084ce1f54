"""Variables of models that are trained on several devices, of one process or of several."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_woodfisher_backends import get_backend, is_known


def engine_scope(model: Any) -> AbstractContextManager[Any]:
    """The context in which variables become what those of a model are: with `tf.distribute`, a copy on each replica."""
    strategy = getattr(model, "distribute_strategy", None)
    return nullcontext() if strategy is None else strategy.scope()


def riding_variable(model: Any, shape: tuple[int, ...], dtype: str, name: str, weight: Any = None) -> keras.Variable:
    """A variable of zeros that isn't trained, where the train step of a model reads it.

    With `keras.distribution` it is laid out as a weight is: each device holds what belongs to its part of the weight.

    Args:
        model: The model.
        shape: Of the variable.
        dtype: Of the variable.
        name: Of the variable.
        weight: The weight that it belongs to, entry by entry.
    """
    layout = getattr(weight, "_layout", None)
    more = {} if layout is None else {"layout": layout}
    with engine_scope(model):
        return keras.Variable(initializer="zeros", shape=shape, dtype=dtype, trainable=False, name=name, **more)


def whole_value(variable: Any) -> np.ndarray:
    """A variable's value on the host, also where each process has a part of it: then all of them have to ask for it."""
    name = keras.backend.backend()
    return get_backend(name).whole(variable) if is_known(name) else ops.convert_to_numpy(variable)


def assign_whole(variable: Any, array: np.ndarray) -> None:
    """Gives a variable a new value, which is the same on all processes; none of them waits for the others."""
    name = keras.backend.backend()
    variable.assign(get_backend(name).spread(array, variable) if is_known(name) else array)


def value_here(variable: Any) -> Any:
    """A variable's tensor on one device: what is computed with it is rounded as if there were no others."""
    # Not `convert_to_tensor`, which gives TensorFlow's variables: each call of a function looks at them one by one.
    value = ops.stop_gradient(variable)
    spread = len(getattr(getattr(value, "sharding", None), "device_set", ())) > 1
    return ops.convert_to_tensor(whole_value(value)) if spread else value
