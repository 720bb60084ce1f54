"""Which zeros may be made: single weights, N of M, blocks, filters or channels."""

import re
from numbers import Integral
from typing import Any

UNSTRUCTURED = "unstructured"
NAMED = (UNSTRUCTURED, "block4", "filter", "channel")
TOLERANCE = 0.005
"""A sparsity so close to the one of an N:M pattern stands for it: 0.667 for 1:3."""

Mask = str | tuple[int, int]


def checked_mask(value: Any) -> Mask:
    """A mask type in one form: a name, "N:M", or the two sides of a block.

        >>> [checked_mask(value) for value in ("block4", "2:4", [4, 1])]
        ['block4', '2:4', (4, 1)]

    Raises:
        ValueError, TypeError: If there is no such mask type.
    """
    if isinstance(value, (list, tuple)):
        if len(value) != 2 or any(isinstance(side, bool) or not isinstance(side, Integral) for side in value):
            raise TypeError(
                f"mask_type as a block must be two whole numbers, [outputs, inputs], got {list(value)!r}. "
                "Write [1, 4] for four inputs of one output unit."
            )
        if min(value) < 1:
            raise ValueError(f"mask_type: the sides of a block must be at least 1, got {list(value)}.")
        return int(value[0]), int(value[1])
    if not isinstance(value, str):
        raise TypeError(f'mask_type must be a text such as "2:4" or a block such as [1, 4], got {value!r}.')
    if value not in NAMED and pattern_of(value) is None:
        raise ValueError(
            "mask_type must be unstructured, block4, filter, channel, [a, b] or N:M such as 2:4 (N of M weights stay, "
            f"0 < N < M), got {value!r}."
        )
    return value


def pattern_of(mask: Mask) -> tuple[int, int] | None:
    """(N, M) of an N:M mask, else None."""
    found = None if isinstance(mask, tuple) else re.fullmatch(r"(\d{1,4}):(\d{1,4})", mask)
    pair = (int(found[1]), int(found[2])) if found else (0, 0)
    return pair if 0 < pair[0] < pair[1] else None


def block_of(mask: Mask) -> tuple[int, int] | None:
    """The sides (outputs, inputs) of what a mask divides a matrix into; None where that isn't blocks."""
    if isinstance(mask, tuple):
        return mask
    pattern = (1, 4) if mask == "block4" else pattern_of(mask)
    return None if pattern is None else (1, pattern[1])


def check_final(mask: Mask, final: float) -> None:
    """Refuses a sparsity that a mask can't reach.

        >>> check_final("2:4", 0.5)
        >>> check_final("1:3", 0.667)

    Raises:
        ValueError: If it is above that of an N:M pattern.
    """
    pattern = pattern_of(mask)
    if pattern is not None and final > highest(pattern) + TOLERANCE:
        kept, size = pattern
        raise ValueError(
            f"mask_type {mask} keeps {kept} of {size} weights, so the final sparsity is at most "
            f"{highest(pattern):.4g}, got {final:g}. Lower it, or choose a pattern that keeps fewer weights."
        )


def highest(pattern: tuple[int, int]) -> float:
    """The sparsity of an N:M pattern.

    >>> highest((2, 4))
    0.5
    """
    kept, size = pattern
    return (size - kept) / size


def mask_text(mask: Mask) -> str:
    """As recipes write it."""
    return str(list(mask)) if isinstance(mask, tuple) else mask
