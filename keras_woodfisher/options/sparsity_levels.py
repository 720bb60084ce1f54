"""Final sparsities that differ between variables: `{sparsity: names}`, as recipes write them."""

from collections.abc import Mapping
from typing import Any

from keras_woodfisher.options.checks import by_number, fraction, names

Levels = tuple[tuple[float, tuple[str, ...]], ...]
"""Pairs of a final sparsity and the names and patterns that it goes for."""


def checked_levels(value: Mapping[Any, Any], name: str = "final_sparsity") -> Levels:
    """The levels of a dictionary, in its order; `name` is that of the argument.

    >>> checked_levels({0.9: ["a/kernel"], "0.95": "re:b"})
    ((0.9, ('a/kernel',)), (0.95, ('re:b',)))

    Raises:
        ValueError, TypeError: If a key isn't a sparsity, or a value isn't a list of names.
    """
    levels = []
    for key, listed in by_number(value).items():
        sparsity = fraction(f"a key of {name}", key)
        found = names(f"{name}[{key}]", listed)
        levels.append((sparsity, (found,) if isinstance(found, str) else found))
    if not levels or not all(found for _, found in levels):
        raise ValueError(f"{name} as a dictionary needs names for each sparsity, got {dict(value)!r}.")
    return tuple(levels)


def names_of(levels: Levels) -> tuple[str, ...]:
    """All names and patterns, as `params` takes them."""
    return tuple(name for _, listed in levels for name in listed)


def arguments_of(levels: Levels, params: Any, global_sparsity: bool | None) -> tuple[tuple[str, ...], bool]:
    """`params` and `global_sparsity` where the final sparsity is a dictionary.

    Raises:
        ValueError: If one of them was given beside it, and says something else.
    """
    if params is not None and (isinstance(params, str) or len(params)):
        raise ValueError(
            f"A dictionary of final sparsities names the variables itself, so params must be empty, got {params!r}. "
            "Leave it out, or give one sparsity for all."
        )
    if global_sparsity:
        raise ValueError(
            "A dictionary of final sparsities gives each variable one of its own, which global_sparsity=True "
            "would overrule. Leave one of them out."
        )
    return names_of(levels), False
