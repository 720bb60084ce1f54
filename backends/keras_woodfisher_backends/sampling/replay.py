"""Gradients of layers that no rule knows: only such a layer is run again, one group of examples at a time.

One pass over many examples tells what a layer took and the gradient of what it gave. Run again on one group's part of
that, the layer's own derivative gives that group's gradient of whatever variables it uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops, tree

from keras_woodfisher_backends.keras_internals.models import mask_of, set_mask
from keras_woodfisher_backends.sampling.listening import Attributes, Record


class UnsplittableError(ValueError):
    """A layer takes or gives tensors whose first axis doesn't tell examples apart."""


def listen_to_arguments(layer: Any, record: Record) -> Attributes:
    """Hears all arguments of each call, and all outputs."""
    original = layer.call

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = tree.map_structure(
            lambda leaf: record.watch(leaf) if _is_float(leaf) else leaf, original(*args, **kwargs)
        )
        record.add("", (args, kwargs), outputs)
        return outputs

    return {"call": call}


def differentiable(outputs: Any) -> list[Any]:
    """The tensors of a nest that have gradients."""
    return [leaf for leaf in tree.flatten(outputs) if _is_float(leaf)]


def _is_float(leaf: Any) -> bool:
    return ops.is_tensor(leaf) and "float" in str(leaf.dtype)


@dataclass(frozen=True)
class _Part:
    """Stands in the place of a tensor that is cut into groups."""

    place: int
    mask: int | None


class Replay:
    """The calls of one layer, each to be run again on one group's part of it.

    Args:
        layer: The layer.
        groups: How many groups there are (n).
        examples: Examples of all groups together (n b).

    Attributes:
        parts: What a call takes of each group, (n, ...) each.
    """

    def __init__(self, layer: Any, groups: int, examples: int):
        self._layer = layer
        self._groups = groups
        self._examples = examples
        self._calls: list[tuple[Any, list[tuple[int, int]]]] = []
        self.parts: list[Any] = []

    def add(self, arguments: Any, outputs: Any, grads: Sequence[Any]) -> None:
        """Adds a call.

        Args:
            arguments: (args, kwargs).
            outputs: What the call gave.
            grads: The gradient of each of them that has one; None where the loss doesn't depend on it.

        Raises:
            UnsplittableError: If examples can't be told apart.
        """
        given = tree.flatten(outputs)
        floats = [place for place, leaf in enumerate(given) if _is_float(leaf)]
        wanted = [(place, self._cut(grad)) for place, grad in zip(floats, grads, strict=True) if grad is not None]
        if not wanted:
            return
        before = len(self.parts)
        inputs = tree.map_structure(self._replaced, arguments)
        if len(self.parts) == before or any(place is None for _, place in wanted):
            raise UnsplittableError(f"The first axis of what {self._layer.name} takes or gives isn't that of examples.")
        self._calls.append((inputs, [(place, part) for place, part in wanted if part is not None]))

    def __call__(self, part: Sequence[Any]) -> Any:
        """The sum of one group's outputs times their gradients."""
        total: Any = 0.0
        for inputs, wanted in self._calls:
            args, kwargs = tree.map_structure(lambda leaf: _taken(leaf, part), inputs)
            outputs = tree.flatten(self._layer(*args, **kwargs))
            for place, grad in wanted:
                total = total + ops.sum(outputs[place] * part[grad])
        return total

    def _replaced(self, leaf: Any) -> Any:
        place = self._cut(leaf) if ops.is_tensor(leaf) else None
        if place is None:
            return leaf
        mask = mask_of(leaf)
        return _Part(place, None if mask is None else self._cut(mask))

    def _cut(self, tensor: Any) -> int | None:
        size = tensor.shape[0] if len(tensor.shape) else 0
        if not size or size % self._examples:
            return None
        self.parts.append(ops.reshape(ops.stop_gradient(tensor), (self._groups, -1, *tensor.shape[1:])))
        return len(self.parts) - 1


def _taken(leaf: Any, part: Sequence[Any]) -> Any:
    if not isinstance(leaf, _Part):
        return leaf
    tensor = part[leaf.place]
    if leaf.mask is not None:
        set_mask(tensor, part[leaf.mask])
    return tensor
