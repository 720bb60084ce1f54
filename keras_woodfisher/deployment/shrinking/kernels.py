"""The kernels of layers that sum over channels: which input each output reads, and how it answers constants."""

from typing import Any

import numpy as np
from keras import layers, ops

CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)


def array_of(variable: Any) -> np.ndarray:
    """A variable's values, in float32 or as they are if more precise."""
    values = ops.convert_to_numpy(variable)
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)


def bias_of(layer: Any, size: int) -> np.ndarray:
    """(size,) float64, zero for a layer without one."""
    return np.zeros(size) if layer.bias is None else array_of(layer.bias).astype(np.float64)


def reads_of(layer: Any) -> np.ndarray:
    """(inputs, outputs) bool: whether an output depends on an input at all, each a channel."""
    if isinstance(layer, SEPARABLE):
        depthwise = _any_place(array_of(layer.depthwise_kernel))
        pointwise = _any_place(array_of(layer.pointwise_kernel)).reshape(*depthwise.shape, -1)
        return (depthwise[:, :, None] & pointwise).any(1)
    reads = _any_place(array_of(layer.kernel))
    if isinstance(layer, TRANSPOSED):
        return reads.T
    return _spread_groups(reads, layer.groups) if groups_of(layer) > 1 else reads


def response_of(layer: Any, constants: np.ndarray) -> np.ndarray:
    """(outputs,) float64: what constant inputs add to each output where the whole kernel lies within the input.

    Args:
        layer: No transposed convolution, whose answer to anything but zeros differs from place to place.
        constants: (inputs,) float64, zero for those that count nothing.
    """
    rows = np.flatnonzero(constants)
    given = constants[rows]
    if isinstance(layer, SEPARABLE):
        depthwise = _over_places(array_of(layer.depthwise_kernel)[..., rows, :])
        pointwise = array_of(layer.pointwise_kernel)
        pointwise = pointwise.reshape(-1, depthwise.shape[1], pointwise.shape[-1])[rows]
        return np.einsum("i,im,imo->o", given, depthwise, pointwise)
    kernel = array_of(layer.kernel)
    if groups_of(layer) > 1:
        return constants @ _spread_groups(_over_places(kernel), layer.groups)
    return np.zeros(kernel.shape[-2]) if isinstance(layer, TRANSPOSED) else given @ _over_places(kernel[..., rows, :])


def depthwise_sums(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of a depthwise kernel, for each input and its outputs (inputs * multiplier,): whether it is read, and its sum."""
    kernel = array_of(layer.kernel)
    return _any_place(kernel).reshape(-1), _over_places(kernel).reshape(-1)


def groups_of(layer: Any) -> int:
    """Into how many parts a layer's channels fall that don't see each other."""
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1


def pads_with_zeros(layer: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether a layer sees zeros beyond the borders of its input, so that a constant looks different there.

    Args:
        layer: A dense layer or convolution of any kind.
        shape: The shape of its input.
    """
    if isinstance(layer, layers.Dense):
        return False
    if isinstance(layer, TRANSPOSED):
        return True
    if layer.padding == "valid":
        return False
    if layer.padding == "causal":
        return max(layer.kernel_size) > 1
    sizes = shape[2:] if layer.data_format == "channels_first" else shape[1:-1]
    return any(
        _padding(size, kernel, stride, dilation) > 0
        for size, kernel, stride, dilation in zip(
            sizes, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
        )
    )


def _padding(size: int | None, kernel: int, stride: int, dilation: int) -> int:
    """How many zeros `"same"` adds along an axis; of an unknown size the most."""
    reach = (kernel - 1) * dilation + 1
    return reach - 1 if size is None else (-(-size // stride) - 1) * stride + reach - size


def _any_place(kernel: np.ndarray) -> np.ndarray:
    return (kernel != 0).any(tuple(range(kernel.ndim - 2)))


def _over_places(kernel: np.ndarray) -> np.ndarray:
    return kernel.sum(tuple(range(kernel.ndim - 2)), dtype=np.float64)


def _spread_groups(matrix: np.ndarray, groups: int) -> np.ndarray:
    """The (inputs, outputs) matrix of a grouped convolution, given as (inputs of a group, outputs)."""
    rows, columns = matrix.shape
    spread = np.zeros((groups, rows, groups, columns // groups), matrix.dtype)
    for group in range(groups):
        spread[group, :, group] = matrix.reshape(rows, groups, -1)[:, group]
    return spread.reshape(groups * rows, columns)
