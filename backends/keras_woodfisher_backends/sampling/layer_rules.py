"""The gradient of a layer's kernel for each group of examples, from the layer's input and its output's gradient.

A rule's result lies in memory in weight order (output axes, input axes, kernel positions), so that putting it there
later moves nothing; `axes` turns it into Keras's layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from keras import layers, ops

from keras_woodfisher_backends.sampling.convolution import (
    KernelGradient,
    adjoint_gradient,
    convolution_gradient,
    depthwise_gradient,
    pointwise_gradient,
)

_CONVOLUTION = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel", "embeddings")


@dataclass(frozen=True)
class Rule:
    """How to get the gradient of one variable.

    Attributes:
        gradient: `gradient(x, grad, groups, kernels)` of the layer's input (n b, ...) and the gradient of its output
            before the activation (n b, ...), with `groups` = n; the examples of one group lie next to each other.
        axes: The transposition of the result that gives (n, *shape).
    """

    gradient: Callable[[Any, Any, int, KernelGradient], Any]
    axes: tuple[int, ...]


def rule_of(layer: Any, variable: Any) -> Rule | None:  # noqa: PLR0911 - a table
    """The rule for a variable of a layer, or None for a layer (or a subclass of one) that isn't known."""
    kind = type(layer)
    owned = [name for name in _KERNELS if getattr(layer, name, None) is variable]
    rank = len(variable.shape)
    kernel_last = (0, *range(3, rank + 1), 2, 1)
    depth_last = (0, *range(3, rank + 1), 1, 2)
    if kind is layers.Dense and "kernel" in owned:
        return Rule(_dense_gradient, kernel_last)
    if kind is layers.EinsumDense and "kernel" in owned:
        return _einsum_rule(layer.equation)
    if kind in _CONVOLUTION and "kernel" in owned:
        return Rule(partial(convolution_gradient, layer), kernel_last)
    if kind in _TRANSPOSED and "kernel" in owned and layer.output_padding is None:
        return Rule(partial(adjoint_gradient, layer), kernel_last)
    if (kind in _DEPTHWISE and "kernel" in owned) or (kind in _SEPARABLE and "depthwise_kernel" in owned):
        return Rule(partial(depthwise_gradient, layer), depth_last)
    if kind in _SEPARABLE and "pointwise_kernel" in owned:
        return Rule(partial(pointwise_gradient, layer), kernel_last)
    if kind is layers.Embedding and "embeddings" in owned:
        return Rule(partial(_embedding_gradient, layer), (0, 1, 2))
    return None


def _dense_gradient(x: Any, grad: Any, groups: int, kernels: KernelGradient) -> Any:
    x = ops.reshape(x, (groups, -1, x.shape[-1]))
    grad = ops.reshape(grad, (groups, -1, grad.shape[-1]))
    return ops.matmul(ops.swapaxes(grad, 1, 2), x)


def _einsum_rule(equation: str) -> Rule:
    inputs, output = equation.replace(" ", "").split("->")
    kernel = inputs.split(",")[1]
    # As weight order has it.
    stored = [letter for letter in kernel if letter in output] + [letter for letter in kernel if letter not in output]
    axes = (0, *(1 + stored.index(letter) for letter in kernel))
    return Rule(partial(_einsum_gradient, inputs.split(",")[0], output, "".join(stored)), axes)


def _einsum_gradient(
    left: str, output: str, stored: str, x: Any, grad: Any, groups: int, kernels: KernelGradient
) -> Any:
    used = set(left + output + stored)
    free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in used]
    spread = "".join(free[1 : 1 + x.ndim - len(left.replace("...", ""))]) if "..." in left else ""
    left, output = left.replace("...", spread), output.replace("...", spread)
    x = ops.reshape(x, (groups, -1, *x.shape[1:]))
    grad = ops.reshape(grad, (groups, -1, *grad.shape[1:]))
    return ops.einsum(f"{free[0]}{left},{free[0]}{output}->{free[0]}{stored}", x, grad)


def _embedding_gradient(layer: Any, x: Any, grad: Any, groups: int, kernels: KernelGradient) -> Any:
    tokens, width = layer.embeddings.shape
    # Each group has a table of its own.
    places = ops.reshape(ops.cast(x, "int32"), (groups, -1)) + tokens * ops.arange(groups, dtype="int32")[:, None]
    rows = ops.segment_sum(ops.reshape(grad, (-1, width)), ops.reshape(places, (-1,)), groups * tokens)
    return ops.reshape(rows, (groups, tokens, width))
