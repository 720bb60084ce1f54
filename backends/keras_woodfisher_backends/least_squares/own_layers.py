"""Layers of the user's own: whether they do with several kernels what the layers of Keras do that they are made of.

What lies between two kernels is computed, not seen, so that a call shows nothing that it could be compared with.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import layers, ops

CELLS = (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_RECURRENT = (layers.RNN, layers.LSTM, layers.GRU, layers.SimpleRNN)

_EXAMPLES, _STEPS = 24, 4
"""A layer is tried on so many examples."""

_SIZES = np.logspace(-2.0, 3.0, _EXAMPLES)
"""Of these inputs: what is clipped or scaled within the layer shows at some size."""

_TOLERANCE = 1e-3
"""Largest relative difference between what it gives and what Keras's own would."""


def does_as_keras(layer: Any) -> bool:
    """Whether a recurrent or separable layer is of Keras, or gives with its kernels what that would.

    A cell that changes its input first, say, multiplies something else than the layer gets.
    """
    cell = getattr(layer, "cell", None)
    if type(layer) in (*_RECURRENT, *SEPARABLE) and (cell is None or type(cell) in CELLS):
        return True
    try:
        with keras.StatelessScope():
            own, stock = _separated(layer) if cell is None else _remembered(layer, cell)
    except Exception:  # noqa: BLE001 (the user's own code may want what isn't there)
        return False
    own, stock = (ops.convert_to_numpy(ops.cast(found, "float32")) for found in (own, stock))
    if own.shape != stock.shape:
        return False
    off, size = (np.abs(found).reshape(_EXAMPLES, -1).max(1) for found in (own - stock, stock))
    return bool((off <= _TOLERANCE * size).all())


def _tried(layer: Any, shape: tuple[int, ...]) -> Any:
    x = np.random.default_rng(0).normal(size=(*shape, _EXAMPLES)) * _SIZES
    return ops.convert_to_tensor(np.moveaxis(x, -1, 0), layer.compute_dtype)


def _remembered(layer: Any, cell: Any) -> tuple[Any, Any]:
    """What a recurrent layer gives at each step, (N, T, units), and what Keras's cell makes of its input."""
    x = _tried(layer, (_STEPS, cell.kernel.shape[0]))
    with _with(layer, {"return_sequences": True, "return_state": False, "stateful": False, "go_backwards": False}):
        own = layer(x, training=False)
    states, found = cell.get_initial_state(_EXAMPLES), []
    with _as_keras(cell, CELLS):
        for step in range(_STEPS):
            output, states = cell(x[:, step], states, training=False)
            found.append(output)
    return own, ops.stack(found, axis=1)


def _separated(layer: Any) -> tuple[Any, Any]:
    """What a separable convolution gives, and what Keras's would."""
    *size, channels, _ = layer.depthwise_kernel.shape
    reach = [rate * (taps - 1) + 1 + _STEPS for taps, rate in zip(size, layer.dilation_rate, strict=True)]
    first = layer.data_format == "channels_first"
    x = _tried(layer, (channels, *reach) if first else (*reach, channels))
    own = layer(x)
    with _as_keras(layer, SEPARABLE):
        return own, layer(x)


@contextmanager
def _as_keras(layer: Any, kinds: tuple[type, ...]) -> Iterator[None]:
    kind: Any = next(kind for kind in kinds if isinstance(layer, kind))
    with _with(layer, {"call": kind.call.__get__(layer)}):
        yield


@contextmanager
def _with(layer: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """A layer with other attributes meanwhile, past Keras's __setattr__, which would track them."""
    before = {name: vars(layer)[name] for name in values if name in vars(layer)}
    try:
        vars(layer).update(values)
        yield
    finally:
        for name in values:
            vars(layer).pop(name, None)
        vars(layer).update(before)
