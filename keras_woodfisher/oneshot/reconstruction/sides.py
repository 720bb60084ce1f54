"""The dense and the pruned model as two halves of a batch, and the same random numbers for both."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras_woodfisher_backends.keras_internals.models import layers_of
from keras_woodfisher_backends.nest import arrays


class Sides:
    """Takes tensors of both sides apart, calls layers for one of them, and puts tensors together.

    Attributes:
        examples: Of each side.
        alone: Whether a layer is being called for one side.
    """

    def __init__(self) -> None:
        self.examples = 1
        self.alone = False

    def split(self, nest: Any, rows: int) -> tuple[Any, Any]:
        """The two sides of every tensor that holds so many rows of each; both have all others."""

        def part(rows_of: slice) -> Any:
            return tree.map_structure(lambda leaf: leaf[rows_of] if _length(leaf) == 2 * rows else leaf, nest)

        return part(slice(None, rows)), part(slice(rows, None))

    def join(self, dense: Any, pruned: Any, rows: int) -> Any:
        """What a layer gave for each side; what isn't of examples (a loss) is the dense one's.

        Args:
            dense: Tensors.
            pruned: The same.
            rows: Of the layer's input, of each side.
        """

        def put(one: Any, other: Any) -> Any:
            length = _length(one)
            if length and (length in (rows, self.examples) or (len(one.shape) > 1 and length % self.examples == 0)):
                return ops.concatenate([one, other])
            return one

        return tree.map_structure(put, dense, pruned)

    def one(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's call, for the examples of one side."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self.alone = self.alone, True
            try:
                return own(*args, **kwargs)
            finally:
                self.alone = before

        return call

    def alike(self, generators: Sequence[Any], own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A layer's call in which both sides get the same random numbers, if it draws any.

        Args:
            generators: Of the layer and those within it.
            own: The call.
            args: Its arguments, the input first.
            kwargs: The same.
        """
        places = places_of(generators)
        output = own(*args, **kwargs)
        rows, odd = divmod(_length(arrays(args[0])[0]), 2)
        if odd or rows % self.examples or _same(places, places_of(generators)):
            return output

        def again(side: Any) -> Any:
            rewind(generators, places)
            return self.one(own)(*side[0], **side[1])

        dense, pruned = self.split((args, kwargs), rows)
        return self.join(again(dense), again(pruned), rows)


def has_values(nest: Any) -> bool:
    """Whether numbers can be read from tensors: within a loop that the framework compiles they only stand for some."""
    try:
        for leaf in arrays(nest):
            ops.convert_to_numpy(leaf[:1])
    except Exception:  # noqa: BLE001 (each framework has errors of its own for it)
        return False
    return True


def generators_of(layer: Any) -> list[Any]:
    """The random generators of a layer and of those within it."""
    kind = keras.random.SeedGenerator
    return [value for inner in layers_of(layer) for value in vars(inner).values() if isinstance(value, kind)]


def places_of(generators: Sequence[Any]) -> list[Any]:
    """How far random generators have come."""
    return [ops.stop_gradient(generator.state) for generator in generators]


def rewind(generators: Sequence[Any], places: Sequence[Any]) -> None:
    """Has random generators draw once more what they drew from some places on."""
    for generator, place in zip(generators, places, strict=True):
        generator.state.assign(place)


def _length(leaf: Any) -> int:
    """The first axis of a tensor; 0 of anything else."""
    shape: Any = getattr(leaf, "shape", ())
    return int(shape[0]) if len(shape) else 0


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(np.array_equal(*map(ops.convert_to_numpy, pair)) for pair in pairs)
