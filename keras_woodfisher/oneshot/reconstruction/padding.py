"""Which positions are padding, as far as a model's masks tell.

Keras's masks get lost: additions and attention don't pass them on. A position that was masked anywhere before in the
same pass counts as masked wherever there are as many positions.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import tree
from keras_woodfisher_backends.keras_internals.models import mask_of

_INPUT = "padding_mask"
"""The name of the input that says it in KerasHub's models."""


class KnownMasks:
    """The masks (N, T) that were seen in a pass, by their number of positions; of several the latest."""

    def __init__(self, x: Any):
        self._masks: dict[int, Any] = {}
        if isinstance(x, Mapping) and _INPUT in x:
            self._keep(x[_INPUT])

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._masks)

    def see(self, args: Any, kwargs: Any) -> None:
        """Looks for masks among the arguments of a layer's call."""
        for leaf in tree.flatten(args):
            if hasattr(leaf, "shape"):
                self._keep(mask_of(leaf))
        for name, value in kwargs.items():
            if name.endswith("mask") and name != "attention_mask":
                self._keep(value)

    def begin(self, layer: Any, x: Any) -> None:
        """Takes the mask that a layer begins, such as an embedding's; additions would lose it."""
        if getattr(layer, "mask_zero", False) or isinstance(layer, keras.layers.Masking):
            self._keep(layer.compute_mask(x))

    def of(self, x: Any) -> Any:
        """The mask that goes with an input (N, T, ...), or None."""
        mask = mask_of(x)
        if mask is None and len(x.shape) > 2:
            mask = self._masks.get(x.shape[1])
        return None if mask is None or tuple(mask.shape) != tuple(x.shape[: len(mask.shape)]) else mask

    def _keep(self, mask: Any) -> None:
        if hasattr(mask, "shape") and len(mask.shape) == 2:
            self._masks[mask.shape[1]] = mask
