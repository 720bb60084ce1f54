"""What a walk notes of layers whose sizes depend on the channels that stay."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from keras import layers

from keras_woodfisher.deployment.shrinking.kernels import SEPARABLE, TRANSPOSED, reads_of

Count = Callable[[np.ndarray], int]
"""How many of some channels stay."""


@dataclass
class Sizes:
    """A layer, and what of it the channels that stay decide.

    Attributes:
        layer: The layer.
        inputs: (channels in,) its input channels, as the first call gave them.
        outputs: (channels out,) its output channels.
        cuts: Of each variable, by its name, the axes that count channels, and these.
        config: What its configuration changes to.
        constant: (channels out,) whether an output is constant in every call.
    """

    layer: Any
    inputs: np.ndarray
    outputs: np.ndarray
    cuts: Mapping[str, tuple[tuple[int, np.ndarray], ...]]
    config: Callable[[Count], dict[str, Any]] = lambda count: {}
    constant: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


class Linear:
    """A layer each of whose outputs is a sum over its input channels: where they aren't needed, they can go.

    Attributes:
        layer: The layer.
        sizes: Its channels.
        reads: (inputs, outputs) bool, whether an output depends on an input.
    """

    def __init__(self, layer: Any, sizes: Sizes):
        self.layer, self.sizes = layer, sizes
        self.reads = reads_of(layer)
        self._given: list[np.ndarray] = []
        self._pads = False

    def called(self, constants: np.ndarray, pads: bool) -> None:
        """Notes the constants (nan: not constant) that a call gets, and whether it adds zeros at the borders."""
        self._given.append(constants)
        self._pads |= pads

    @cached_property
    def constants(self) -> np.ndarray:
        """(inputs,) the constants that all calls get; nan where there is none, or not the same."""
        first = self._given[0]
        same = np.all([given == first for given in self._given], axis=0)
        return np.where(same, first, np.nan)

    @cached_property
    def foldable(self) -> np.ndarray:
        """(inputs,) whether a constant input counts as much at each place, so that the bias can have it."""
        constants = self.constants
        return (constants == 0) | (~np.isnan(constants) & (not self._pads))

    @cached_property
    def joinable(self) -> np.ndarray:
        """(inputs,) whether a constant input that isn't foldable can be had by another one that is constant, too."""
        return ~np.isnan(self.constants) & ~self.foldable & (not isinstance(self.layer, SEPARABLE))

    @property
    def kernel_axes(self) -> tuple[int, int]:
        """The axes of the kernel that count inputs and outputs."""
        return (-1, -2) if isinstance(self.layer, TRANSPOSED) else (-2, -1)


def linear_sizes(layer: Any, inputs: np.ndarray, outputs: np.ndarray) -> Sizes:
    """The sizes of a dense, separable or convolutional layer, or a transposed convolution."""
    units = "units" if isinstance(layer, layers.Dense) else "filters"
    bias = {"bias": ((0, outputs),)}
    if isinstance(layer, SEPARABLE):
        between = np.repeat(inputs, layer.depth_multiplier)
        kernels = {"depthwise_kernel": ((-2, inputs),), "pointwise_kernel": ((-2, between), (-1, outputs))}
    elif isinstance(layer, TRANSPOSED):
        kernels = {"kernel": ((-1, inputs), (-2, outputs))}
    else:
        kernels = {"kernel": ((-2, inputs), (-1, outputs))}
    return Sizes(layer, inputs, outputs, kernels | bias, lambda count: {units: count(outputs)})
