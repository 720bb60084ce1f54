"""Layers as matrix products: the rows that a layer makes of its input, and its kernel as a matrix.

Of every layer here, the output before bias and activation is `rows @ matrix`, at each position of each example. Only a
part of the positions is looked at: `Places` says which.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import layers

from keras_woodfisher_backends.least_squares.patches import convolution_rows, transposed_rows

_CONVOLUTION = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)


@dataclass(frozen=True)
class MatrixForm:
    """One kernel as a matrix (g, k, o).

    Attributes:
        shape: (g, k, o).
        kernel_shape: The kernel's shape.
        split: The same, with axes joined or split so that each counts branches, inputs or outputs.
        axes: The transposition of that which gives (branches, inputs, outputs), each perhaps several axes.
        positions: `positions(output)`: the shape of the positions of each example.
        rows: `rows(x, places)` -> (g, R, k), of the layer's input as `ready` gives it.
        targets: `targets(z, places)` -> (g, R, o), of its output before bias and activation, in the same way.
        ready: Brings an input or output into an order from which rows are picked fast.
    """

    shape: tuple[int, int, int]
    kernel_shape: tuple[int, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]
    positions: Callable[[Any], tuple[int, ...]]
    rows: Callable[[np.ndarray, np.ndarray], np.ndarray]
    targets: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ready: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray

    def matrix(self, kernel: np.ndarray) -> np.ndarray:
        """A kernel (or a mask of its shape) as a matrix (g, k, o)."""
        return kernel.reshape(self.split).transpose(self.axes).reshape(self.shape)

    def kernel(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of `matrix`."""
        turned = matrix.reshape([self.split[axis] for axis in self.axes])
        return turned.transpose(np.argsort(self.axes)).reshape(self.kernel_shape)


def matrix_form(layer: Any) -> MatrixForm | None:
    """The form of the variable `kernel` of a layer, or None where there is none."""
    if isinstance(layer, layers.Dense):
        return dense_form(layer.kernel)
    if isinstance(layer, layers.EinsumDense):
        return _einsum(layer)
    if isinstance(layer, _DEPTHWISE):
        return depthwise_form(layer, layer.kernel)
    if isinstance(layer, _CONVOLUTION):
        return _convolution(layer)
    if isinstance(layer, _TRANSPOSED):
        return _transposed(layer)
    return None


def _positions(output: Any) -> tuple[int, ...]:
    return tuple(output.shape[1:-1])


def _picked(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows of (N, *positions, c) by the flat indices of (example, position): (R, c)."""
    return array.reshape(-1, array.shape[-1])[places]


def dense_form(kernel: Any) -> MatrixForm:
    """The form of a kernel that multiplies the last axis of its input."""
    inputs, outputs = kernel.shape
    return MatrixForm(
        (1, inputs, outputs),
        (inputs, outputs),
        (inputs, outputs),
        (0, 1),
        _positions,
        lambda x, places: _picked(x, places)[None],
        lambda z, places: _picked(z, places)[None],
    )


def _einsum(layer: Any) -> MatrixForm | None:
    left, output = layer.equation.replace(" ", "").split("->")
    given, kernel = left.split(",")
    # The axes that "..." stands for are positions, and come first.
    given, output = given.replace("...", ""), output.replace("...", "")
    contracted = [letter for letter in kernel if letter in given and letter not in output]
    outputs = [letter for letter in kernel if letter not in given]
    branches = [letter for letter in kernel if letter in given and letter in output]
    places = [letter for letter in given if letter not in kernel]
    spread = "..." in layer.equation
    if [letter for letter in output if letter in places] != places:
        return None
    if not spread and (not places or given[0] != places[0] or output[0] != places[0]):
        return None
    size = dict(zip(kernel, layer.kernel.shape, strict=True))
    sizes = [math.prod(size[letter] for letter in letters) for letters in (branches, contracted, outputs)]
    order = [*branches, *contracted, *outputs]

    def axes(letters: str, extra: int) -> dict[str, int]:
        """Where each axis is: what "..." stands for comes first, and the batch first of all."""
        shift = [extra if spread or index else 0 for index in range(len(letters))]
        return {letter: index + shift[index] for index, letter in enumerate(letters)}

    def gathered(array: np.ndarray, letters: str, inner: list[str], chosen: np.ndarray) -> np.ndarray:
        extra = array.ndim - len(letters)
        axis = axes(letters, extra)
        lead = [*range(extra), *(axis[letter] for letter in places)]
        turned = array.transpose([*lead, *(axis[letter] for letter in (*branches, *inner))])
        flat = turned.reshape(math.prod(turned.shape[: len(lead)]), sizes[0], -1)[chosen]
        return flat.swapaxes(0, 1)

    def positions(array: Any) -> tuple[int, ...]:
        extra = len(array.shape) - len(output)
        axis = axes(output, extra)
        lead = [*range(extra), *(axis[letter] for letter in places)]
        return tuple(array.shape[index] for index in lead[1:])

    return MatrixForm(
        (sizes[0], sizes[1], sizes[2]),
        tuple(layer.kernel.shape),
        tuple(layer.kernel.shape),
        tuple(kernel.index(letter) for letter in order),
        positions,
        lambda x, chosen: gathered(x, given, contracted, chosen),
        lambda z, chosen: gathered(z, output, outputs, chosen),
    )


def _channels_last(layer: Any) -> Callable[[np.ndarray], np.ndarray]:
    if layer.data_format != "channels_first":
        return np.ascontiguousarray
    return lambda array: np.ascontiguousarray(np.moveaxis(array, 1, -1))


def _spatial(layer: Any) -> Callable[[Any], tuple[int, ...]]:
    if layer.data_format == "channels_first":
        return lambda z: tuple(z.shape[2:])
    return _positions


def _branched(rows: np.ndarray, branches: int) -> np.ndarray:
    """(R, taps, g c) -> (g, R, taps c)."""
    count, taps, channels = rows.shape
    parts = rows.reshape(count, taps, branches, channels // branches)
    return parts.transpose(2, 0, 1, 3).reshape(branches, count, -1)


def _convolution(layer: Any) -> MatrixForm:
    *size, channels, filters = layer.kernel.shape
    taps, g = math.prod(size), layer.groups

    def targets(z: np.ndarray, places: np.ndarray) -> np.ndarray:
        return _picked(z, places).reshape(len(places), g, filters // g).swapaxes(0, 1)

    return MatrixForm(
        (g, taps * channels, filters // g),
        tuple(layer.kernel.shape),
        (taps, channels, g, filters // g),
        (2, 0, 1, 3),
        _spatial(layer),
        lambda x, places: _branched(convolution_rows(layer, x, places), g),
        targets,
        _channels_last(layer),
    )


def depthwise_form(layer: Any, kernel: Any) -> MatrixForm:
    """The form of a depthwise kernel, that of a separable convolution too: each channel is a branch."""
    *size, channels, multiplier = kernel.shape
    taps = math.prod(size)

    def targets(z: np.ndarray, places: np.ndarray) -> np.ndarray:
        return _picked(z, places).reshape(len(places), channels, multiplier).swapaxes(0, 1)

    return MatrixForm(
        (channels, taps, multiplier),
        tuple(kernel.shape),
        (taps, channels, multiplier),
        (1, 0, 2),
        _spatial(layer),
        lambda x, places: _branched(convolution_rows(layer, x, places), channels),
        targets,
        _channels_last(layer),
    )


def pointwise_form(layer: Any) -> MatrixForm:
    """The form of a separable convolution's second kernel: a Dense layer on the channels of the first one's output."""
    *_, channels, filters = layer.pointwise_kernel.shape
    return MatrixForm(
        (1, channels, filters),
        tuple(layer.pointwise_kernel.shape),
        (channels, filters),
        (0, 1),
        _spatial(layer),
        lambda x, places: _picked(x, places)[None],
        lambda z, places: _picked(z, places)[None],
        _channels_last(layer),
    )


def _transposed(layer: Any) -> MatrixForm:
    *size, filters, channels = layer.kernel.shape
    taps = math.prod(size)
    return MatrixForm(
        (1, taps * channels, filters),
        tuple(layer.kernel.shape),
        (taps, filters, channels),
        (0, 2, 1),
        _spatial(layer),
        lambda x, places: transposed_rows(layer, x, places).reshape(1, len(places), -1),
        lambda z, places: _picked(z, places)[None],
        _channels_last(layer),
    )
