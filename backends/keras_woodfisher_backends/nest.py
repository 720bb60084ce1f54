"""Nests of arrays with holes: a batch is (x, y, sample_weight), and y or sample_weight may be None."""

from collections.abc import Callable, Iterable
from typing import Any

from keras import tree


def map_arrays(function: Callable[..., Any], nest: Any, *others: Any) -> Any:
    """Applies a function to each array of a nest (and of others of the same structure); None stays None."""
    return tree.map_structure(lambda first, *rest: None if first is None else function(first, *rest), nest, *others)


def arrays(nest: Any) -> list[Any]:
    """The arrays of a nest, without the holes."""
    return [leaf for leaf in tree.flatten(nest) if leaf is not None]


def take(nest: Any, index: Any) -> Any:
    """`array[index]` of each array of a nest."""
    return map_arrays(lambda array: array[index], nest)


def shapes_of(nest: Any) -> tuple[tuple[int, ...], ...]:
    """The shape of an example of each array of a nest, leaves (N, ...)."""
    return tuple(tuple(array.shape[1:]) for array in arrays(nest))


def outline(nest: Any) -> Any:
    """The same nest with True for each array."""
    return map_arrays(lambda array: True, nest)


def fill(outlined: Any, leaves: Iterable[Any]) -> Any:
    """Puts arrays into an outline; None stays None. The inverse of `arrays`."""
    source = iter(leaves)
    return map_arrays(lambda here: next(source), outlined)
