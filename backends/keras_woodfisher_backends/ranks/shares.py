"""Which rows are sampled, and which columns are held, by which process."""

from collections.abc import Sequence

import numpy as np

MULTIPLE = 16
"""Rows are dealt out by so many, where there are so many for each: torch rounds those of shorter chunks otherwise."""


def row_share(rows: int, rank: int, size: int) -> slice:
    """The rows that a process samples, of those of all; some may have none.

    >>> [row_share(56, rank, 3) for rank in range(3)]
    [slice(0, 16, None), slice(16, 48, None), slice(48, 56, None)]
    >>> [row_share(4, rank, 3) for rank in range(3)]
    [slice(0, 1, None), slice(1, 3, None), slice(3, 4, None)]

    Args:
        rows: How many there are.
        rank: The number of the process.
        size: How many processes there are.
    """
    # A power of two.
    multiple = min(MULTIPLE, 1 << max(0, (rows // size).bit_length() - 1))
    units = -(-rows // multiple)
    edges = [min(rows, multiple * round(units * place / size)) for place in (rank, rank + 1)]
    return slice(*edges)


def column_edges(stops: Sequence[int], size: int) -> list[int]:
    """Where the columns of each of `size` processes begin, and where the last ones end: whole blocks, about as many.

    >>> column_edges([3, 5, 9, 10], 2)
    [0, 5, 10]
    >>> column_edges([7], 3)
    [0, 0, 7, 7]

    Args:
        stops: Where blocks end.
        size: How many processes there are.
    """
    places = np.array([0, *stops])
    total = int(places[-1])
    edges = [int(places[np.abs(places - total * rank / size).argmin()]) for rank in range(1, size)]
    return [0, *edges, total]
