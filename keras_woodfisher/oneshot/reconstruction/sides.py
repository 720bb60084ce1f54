"""The dense and the pruned model as two halves of a batch, and the same random numbers for both."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras_woodfisher_backends.keras_internals.models import layers_of
from keras_woodfisher_backends.nest import arrays


class Sides:
    """Calls of layers for one side alone.

    Attributes:
        alone: Whether such a call is going on.
    """

    def __init__(self) -> None:
        self.alone = False

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
        length = arrays(args[0])[0].shape[0]
        if length % 2 or _same(places, places_of(generators)):
            return output
        found = []
        for part in (slice(None, length // 2), slice(length // 2, None)):
            rewind(generators, places)
            some, named = halves((args, kwargs), part, length)
            found.append(self.one(own)(*some, **named))
        return tree.map_structure(lambda one, other: ops.concatenate([one, other]), *found)


def has_values(nest: Any) -> bool:
    """Whether numbers can be read from tensors: within a loop that the framework compiles they only stand for some."""
    try:
        for leaf in arrays(nest):
            ops.convert_to_numpy(leaf[:1])
    except Exception:  # noqa: BLE001 (each framework has errors of its own for it)
        return False
    return True


def halves(nest: Any, part: slice, length: int) -> Any:
    """The examples `part` of every tensor that holds `length` of them."""

    def take(leaf: Any) -> Any:
        shape = getattr(leaf, "shape", None)
        return leaf[part] if shape is not None and len(shape) and shape[0] == length else leaf

    return tree.map_structure(take, nest)


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


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(np.array_equal(*map(ops.convert_to_numpy, pair)) for pair in pairs)
