"""The order in which a variable's weights are laid out: output axes, input axes, kernel positions.

Blocks of the Fisher are runs in this order, PyTorch's `(out, in, kh, kw)`, so that all weights of one output
unit lie next to each other as in the papers. Keras mostly puts the output axis last.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import layers

_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_CONVOLUTION = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_RECURRENT = (layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell)


def is_prunable(layer: Any, name: str) -> bool:
    """Whether `__ALL_PRUNABLE__` takes the variable `name` of a layer (embeddings only when named)."""
    if isinstance(layer, _DEPTHWISE):
        return name in ("kernel", "depthwise_kernel")
    if isinstance(layer, _SEPARABLE):
        return name in ("depthwise_kernel", "pointwise_kernel")
    if isinstance(layer, _RECURRENT) or type(layer).__name__ == "ConvLSTMCell":
        # Keras doesn't export that cell's class.
        return name in ("kernel", "recurrent_kernel")
    plain = (layers.Dense, layers.EinsumDense, *_CONVOLUTION, *_TRANSPOSED)
    return isinstance(layer, plain) and name == "kernel"


class AxisRoles(NamedTuple):
    """The axes of a variable by what they count."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    positions: tuple[int, ...]


def weight_order(layer: Any, name: str, rank: int) -> tuple[int, ...]:
    """The permutation of a variable's axes that puts its weights into weight order.

    Args:
        layer: The layer that owns the variable.
        name: The variable's name within the layer.
        rank: Number of axes of the variable.

    Returns:
        Axes for `transpose`. For a layer that isn't known, the last axis counts as the output.
    """
    outputs, inputs, positions = axis_roles(layer, name, rank)
    return (*outputs, *inputs, *positions)


def axis_roles(layer: Any, name: str, rank: int) -> AxisRoles:
    """Which axes of a variable count output units, which ones inputs, and which ones kernel positions.

    A row of an embedding (a token) counts as an output unit. The channels of a depthwise kernel are output axes: each
    of its output units reads one channel.
    """
    if rank < 2:
        return AxisRoles(tuple(range(rank)), (), ())
    if isinstance(layer, layers.Embedding) and name == "embeddings":
        return AxisRoles((0,), (1,), ())
    positions = tuple(range(rank - 2))
    if isinstance(layer, layers.EinsumDense) and name == "kernel":
        return _einsum_roles(layer.equation)
    if _is_depthwise(layer, name):
        # (*positions, channel, multiplier): output unit = channel * multiplier.
        return AxisRoles((rank - 2, rank - 1), (), positions)
    if isinstance(layer, _TRANSPOSED):
        return AxisRoles((rank - 2,), (rank - 1,), positions)
    return AxisRoles((rank - 1,), (rank - 2,), positions)


def branches(layer: Any, name: str, shape: Sequence[int]) -> int:
    """Into how many parts the output units of a variable fall that read different inputs (`groups` of convolutions)."""
    if _is_depthwise(layer, name):
        return shape[-2]
    return layer.groups if isinstance(layer, _CONVOLUTION) and name == "kernel" else 1


def _is_depthwise(layer: Any, name: str) -> bool:
    return name == "depthwise_kernel" or isinstance(layer, _DEPTHWISE)


def _einsum_roles(equation: str) -> AxisRoles:
    inputs, output = equation.replace(" ", "").split("->")
    kernel = inputs.split(",")[1]
    outputs = tuple(axis for axis, letter in enumerate(kernel) if letter in output)
    return AxisRoles(outputs, tuple(axis for axis in range(len(kernel)) if axis not in outputs), ())
