"""What a kernel sees of its input at chosen positions of the output, in any number of dimensions."""

import math
from typing import Any

import numpy as np


def convolution_rows(layer: Any, x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(R, taps, channels) of an input (N, *lengths, channels).

    Args:
        layer: Tells kernel_size, strides, dilation_rate and padding.
        x: The input, channels last.
        places: Flat indices of (example, position of the output), (R,).
    """
    axes = []
    for length, k, stride, dilation in zip(x.shape[1:-1], *_geometry(layer), strict=True):
        reach = (k - 1) * dilation + 1
        if layer.padding == "same":
            total = max((math.ceil(length / stride) - 1) * stride + reach - length, 0)
            before, number = total // 2, math.ceil(length / stride)
        else:
            before = reach - 1 if layer.padding == "causal" else 0
            number = (length + before - reach) // stride + 1
        first = np.arange(number) * stride - before
        axes.append(first[:, None] + np.arange(k) * dilation)
    return _gathered(x, axes, places)


def transposed_rows(layer: Any, x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(R, taps, channels) of the input of a transposed convolution: the inputs that reach each output by each tap."""
    axes = []
    outputs = layer.compute_output_shape(
        (1, *(x.shape[1:] if layer.data_format != "channels_first" else (x.shape[-1], *x.shape[1:-1])))
    )
    lengths = outputs[2:] if layer.data_format == "channels_first" else outputs[1:-1]
    for number, k, stride, dilation in zip(lengths, *_geometry(layer), strict=True):
        reach = (k - 1) * dilation + 1
        # The padding of the convolution whose adjoint this is.
        before = max(reach - stride, 0) // 2 if layer.padding == "same" else 0
        reached = np.arange(number)[:, None] + before - np.arange(k) * dilation
        axes.append(np.where(reached % stride == 0, reached // stride, -1))
    return _gathered(x, axes, places)


def _geometry(layer: Any) -> tuple[Any, Any, Any]:
    return layer.kernel_size, layer.strides, layer.dilation_rate


def _gathered(x: np.ndarray, axes: list[np.ndarray], places: np.ndarray) -> np.ndarray:
    """Picks from x by the index along each axis, (positions, taps) each; what lies outside is zero."""
    lengths = x.shape[1:-1]
    numbers = tuple(len(axis) for axis in axes)
    example, *where = np.unravel_index(places, (len(x), *numbers))
    flat, inside = example.reshape(-1, 1), np.ones((len(places), 1), bool)
    for axis, at, length in zip(axes, where, lengths, strict=True):
        index = axis[at]
        good = (index >= 0) & (index < length)
        flat = (flat[:, :, None] * length + np.where(good, index, 0)[:, None, :]).reshape(len(places), -1)
        inside = (inside[:, :, None] & good[:, None, :]).reshape(len(places), -1)
    rows = x.reshape(-1, x.shape[-1])[flat]
    rows[~inside] = 0.0
    return rows
