"""Gradients of convolution kernels for each group of examples, in any number of dimensions.

The kernel's gradient correlates the input with the output's gradient. Along all axes of the picture but the first,
shifted copies of the input lie side by side as channels; along the first one a shift is a shift of whole rows, which
needs no copy: one batched matrix product for each kernel row. Of small pictures all shifted copies are made: they are
no larger than the result, and one product is faster.
"""

import math
from typing import Any, Protocol

import numpy as np
from keras import ops


class KernelGradient(Protocol):
    """A framework's own gradients of a convolution's kernel."""

    def __call__(self, x: Any, grad: Any, layer: Any, groups: int) -> Any:
        """(n, filters, channels / layer.groups, *kernel_size); None where a matrix product is faster.

        Of a layer without `groups`, which is a depthwise one, (n, channels, depth_multiplier, *kernel_size).

        Args:
            x: The input without padding, channels last.
            grad: The gradient of the output, channels last.
            layer: Tells kernel_size, strides, dilation_rate, padding and groups.
            groups: n.
        """
        ...


def convolution_gradient(layer: Any, x: Any, grad: Any, groups: int, kernels: KernelGradient) -> Any:
    """(n, filters, channels / layer.groups, *kernel_size)."""
    x, grad = _channels_last(layer, x), _channels_last(layer, grad)
    if layer.groups == 1 and max(*layer.kernel_size, *layer.strides) == 1:
        x, grad = (ops.reshape(t, (groups, -1, t.shape[-1])) for t in (x, grad))
        rows = ops.matmul(ops.swapaxes(grad, 1, 2), x)
        return ops.reshape(rows, (*rows.shape, *layer.kernel_size))
    rows = None if _is_small(grad, groups) else kernels(x, grad, layer, groups)
    if rows is not None:
        return rows
    x = padded(layer, x, grad.shape[1:-1])
    if layer.groups == 1:
        return _correlation(layer, x, grad, groups)
    return _grouped_correlation(layer, x, grad, groups, layer.groups)


def adjoint_gradient(layer: Any, x: Any, grad: Any, groups: int, kernels: KernelGradient) -> Any:
    """(n, channels, filters, *kernel_size): a transposed convolution is one whose input and output change places."""
    x, grad = _channels_last(layer, x), _channels_last(layer, grad)
    return _correlation(layer, padded(layer, grad, x.shape[1:-1]), x, groups)


def depthwise_gradient(layer: Any, x: Any, grad: Any, groups: int, kernels: KernelGradient) -> Any:
    """(n, channels, depth_multiplier, *kernel_size), of separable convolutions too."""
    x, grad = _channels_last(layer, x), _channels_last(layer, grad)
    if hasattr(layer, "pointwise_kernel"):
        pointwise = ops.reshape(ops.cast(layer.pointwise_kernel, grad.dtype), (-1, layer.filters))
        grad = ops.matmul(grad, ops.transpose(pointwise))
    rows = kernels(x, grad, layer, groups)
    if rows is not None:
        return rows
    x = padded(layer, x, grad.shape[1:-1])
    rows = _grouped_correlation(layer, x, grad, groups, x.shape[-1])
    return ops.reshape(rows, (groups, x.shape[-1], -1, *layer.kernel_size))


def pointwise_gradient(layer: Any, x: Any, grad: Any, groups: int, kernels: KernelGradient) -> Any:
    """(n, filters, channels * depth_multiplier, 1, ...), of a separable convolution."""
    middle = ops.depthwise_conv(
        x,
        ops.cast(layer.depthwise_kernel, x.dtype),
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    middle, grad = _channels_last(layer, middle), _channels_last(layer, grad)
    middle = ops.reshape(middle, (groups, -1, middle.shape[-1]))
    rows = ops.matmul(ops.swapaxes(ops.reshape(grad, (groups, -1, layer.filters)), 1, 2), middle)
    return ops.reshape(rows, (*rows.shape, *(1 for _ in layer.kernel_size)))


def _channels_last(layer: Any, x: Any) -> Any:
    return ops.moveaxis(x, 1, -1) if layer.data_format == "channels_first" else x


def _correlation(layer: Any, x: Any, grad: Any, groups: int) -> Any:
    size, stride, dilation = (tuple(getattr(layer, n)) for n in ("kernel_size", "strides", "dilation_rate"))
    count, (height, *rest), (channels, filters) = x.shape[0], grad.shape[1:-1], (x.shape[-1], grad.shape[-1])
    if _is_small(grad, groups):
        return _small_correlation(layer, x, grad, groups)
    windows = [
        x[(slice(None), slice(None), *_window(offset, rest, stride[1:], dilation[1:]))]
        for offset in np.ndindex(*size[1:])
    ]
    wide = ops.concatenate(windows, -1) if len(windows) > 1 else windows[0]
    width, line = wide.shape[-1], math.prod(rest)
    if stride[0] == 1 and count > groups:
        # The rows between the examples of a group meet zeros.
        grad = ops.pad(grad, [(0, 0), (0, x.shape[1] - height), *((0, 0) for _ in rest), (0, 0)])
    grad = ops.swapaxes(ops.reshape(grad, (groups, -1, filters)), 1, 2)
    if stride[0] == 1:
        wide = ops.reshape(wide, (groups, -1, width))
        length = min(grad.shape[2], wide.shape[1] - (size[0] - 1) * dilation[0] * line)
        grad = grad[:, :, :length]
    pieces = []
    for row in range(size[0]):
        if stride[0] == 1:
            start = row * dilation[0] * line
            rows = wide[:, start : start + length]
        else:
            rows = wide[(slice(None), *_window((row,), (height,), stride, dilation))]
            rows = ops.reshape(rows, (groups, -1, width))
        piece = ops.reshape(ops.matmul(grad, rows), (groups, filters, len(windows), channels))
        pieces.append(ops.swapaxes(piece, 2, 3))
    return ops.reshape(ops.stack(pieces, 3), (groups, filters, channels, *size))


def positions(grad: Any, groups: int) -> int:
    """Positions of the output in one group, over all of its examples."""
    return grad.shape[0] // groups * math.prod(grad.shape[1:-1])


def _is_small(grad: Any, groups: int) -> bool:
    return positions(grad, groups) <= grad.shape[-1]


def _small_correlation(layer: Any, x: Any, grad: Any, groups: int) -> Any:
    size, filters, channels = layer.kernel_size, grad.shape[-1], x.shape[-1]
    windows = _windows(layer, x, grad)
    wide = ops.reshape(ops.concatenate(windows, -1), (groups, -1, len(windows) * channels))
    rows = ops.matmul(ops.swapaxes(ops.reshape(grad, (groups, -1, filters)), 1, 2), wide)
    rows = ops.swapaxes(ops.reshape(rows, (groups, filters, len(windows), channels)), 2, 3)
    return ops.reshape(rows, (groups, filters, channels, *size))


def _grouped_correlation(layer: Any, x: Any, grad: Any, groups: int, parts: int) -> Any:
    size, filters, channels = layer.kernel_size, grad.shape[-1], x.shape[-1] // parts
    views = [ops.reshape(window, (groups, -1, parts, channels)) for window in _windows(layer, x, grad)]
    grad = ops.reshape(grad, (groups, -1, parts, filters // parts))
    rows = ops.einsum("npkgc,npgo->ngock", ops.stack(views, 2), grad)
    return ops.reshape(rows, (groups, filters, channels, *size))


def _windows(layer: Any, x: Any, grad: Any) -> list[Any]:
    """For each place of the kernel what it sees of the input at the outputs' positions."""
    every, outputs = slice(None), grad.shape[1:-1]
    offsets = np.ndindex(*layer.kernel_size)
    return [x[(every, *_window(offset, outputs, layer.strides, layer.dilation_rate))] for offset in offsets]


def _window(offset: Any, outputs: Any, stride: Any, dilation: Any) -> tuple[slice, ...]:
    return tuple(
        slice(k * d, k * d + (n - 1) * s + 1, s) for k, n, s, d in zip(offset, outputs, stride, dilation, strict=False)
    )


def padded(layer: Any, x: Any, outputs: Any) -> Any:
    """The input with its padding, and not more of it than the outputs see."""
    pads, seen = [], []
    pairs = zip(x.shape[1:-1], outputs, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
    for length, number, k, s, d in pairs:
        reach = (k - 1) * d
        total = max((math.ceil(length / s) - 1) * s + reach + 1 - length, 0)
        pads.append({"same": (total // 2, total - total // 2), "causal": (reach, 0), "valid": (0, 0)}[layer.padding])
        seen.append(slice(0, (number - 1) * s + reach + 1))
    if any(sum(pad) for pad in pads):
        x = ops.pad(x, [(0, 0), *pads, (0, 0)])
    return x[(slice(None), *seen)]
