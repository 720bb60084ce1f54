"""What is known of a model's channels while its calls are gone through; rules write here."""

from typing import Any

import numpy as np
from keras_woodfisher_backends.keras_internals.graphs import Call

from keras_woodfisher.deployment.shrinking.channels import GIVEN, UNKNOWN, Channels, Ties
from keras_woodfisher.deployment.shrinking.records import Linear, Sizes
from keras_woodfisher.model.quantized import mode_of


class Notes:
    """What rules write down.

    Attributes:
        ties: Which channels can only go together, and which must stay.
        linears: Dense layers and convolutions, by their identity.
        sizes: All layers whose sizes depend on channels, by their identity.
        entrances: What inner models get as their inputs, by their identity.
        fixed: Layers that have a call in which their sizes can't change.
    """

    def __init__(self) -> None:
        self.ties = Ties()
        self.linears: dict[int, Linear] = {}
        self.sizes: dict[int, Sizes] = {}
        self.entrances: dict[int, list[Channels]] = {}
        self.fixed: set[int] = set()

    def along(self, found: Channels, tensor: Any, axis: int, call: Call) -> Channels:
        """The channels of a tensor along an axis; new ones that must stay where they are counted along another."""
        if found.axis == axis:
            return found
        self.ties.need(found.sets, f"{call.operation.name} reads them along another axis")
        sets = self.ties.fresh(tensor.shape[axis])
        self.ties.need(sets, GIVEN)
        return Channels(axis, sets, np.full(len(sets), np.nan))

    def barrier(self, call: Call, given: list[Channels]) -> Channels:
        """What must get all of its channels, and of whose outputs nothing is known."""
        layer = call.operation
        self.fixed.add(id(layer))
        for found in given:
            self.ties.need(found.sets, f"{layer.name} ({_kind_of(layer)}) needs all of its channels")
        return UNKNOWN

    def note(self, sizes: Sizes, inputs: np.ndarray) -> Sizes:
        """Notes a layer, or that another call of it gets these input channels; the note that counts."""
        known = self.sizes.setdefault(id(sizes.layer), sizes)
        if len(known.inputs) == len(inputs):
            self.ties.tie(known.inputs, inputs)
        else:
            self.fixed.add(id(sizes.layer))
            self.ties.need(inputs, f"{sizes.layer.name} is called with different shapes")
        return known


def _kind_of(operation: Any) -> str:
    kind = type(operation).__name__
    mode = mode_of(operation)
    return kind if mode is None else f"{kind}, quantised to {mode}"
