"""From dictionaries (a JSON configuration, overrides) to a tree."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.scalars import check_text
from keras_woodfisher.recipe.tree import Items, Node, Pairs, Scalar, check_depth, check_size
from keras_woodfisher.recipe.wording import MOST_BITS, shown


def plain_tree(value: Any, path: str = "") -> Node:
    """The tree of a plain value; the value is left as it is.

    Args:
        value: None, bool, int, float, str, NumPy scalars, and lists, tuples and mappings of them.
        path: Where the value stands, for messages.

    Raises:
        RecipeError: If something else is found, or it is too large, too deep, or within itself.
    """
    return _Builder().node(value, path, ())


class _Builder:
    def __init__(self) -> None:
        self._count = 0

    def node(self, value: Any, path: str, parents: tuple[int, ...]) -> Node:
        self._count += 1
        try:
            check_size(self._count, None)
            check_depth(len(parents), None)
            if isinstance(value, Mapping):
                return self._mapping(value, path, _within(value, path, parents))
            if isinstance(value, list | tuple):
                inner = _within(value, path, parents)
                return Items(tuple(self.node(item, f"{path}[{i}]", inner) for i, item in enumerate(value)))
        except RecipeError as error:
            error.field = error.field or path or None
            raise
        return Scalar(_scalar(value, path))

    def _mapping(self, value: Mapping[Any, Any], path: str, parents: tuple[int, ...]) -> Pairs:
        pairs = []
        for key, item in value.items():
            self._count += 1
            inner = Scalar(_scalar(key, f"a key of {path}" if path else "a key"))
            name = str(inner.value)[:100]
            pairs.append((inner, self.node(item, f"{path}.{name}" if path else name, parents)))
        return Pairs(tuple(pairs))


def _within(value: Any, path: str, parents: tuple[int, ...]) -> tuple[int, ...]:
    if id(value) in parents:
        raise RecipeError("A list or mapping holds itself. Write the value out.", field=path or None)
    return (*parents, id(value))


def _scalar(value: Any, path: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and type(value) not in (bool, int, float, str):
        raise RecipeError(
            "A recipe holds plain data (str, int, float, bool, None, lists and mappings), "
            f"got {type(value).__module__}.{type(value).__qualname__}.",
            field=path or None,
        )
    if isinstance(value, str):
        check_text(value, field=path)
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise RecipeError(f"A number may have up to {MOST_BITS} bits, got {shown(value)}.", field=path)
    return value
