"""A fast way to take gradient samples, used only where it gives what one backward pass a group gives."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_woodfisher_backends.nest import arrays, take
from keras_woodfisher_backends.protocol import Sampler

TOLERANCE = 1e-3
"""Largest relative distance between a fast sample and the direct one."""


class VerifiedSampler:
    """Compares the first and the last sample of the first chunk, then trusts the fast way or never uses it.

    Args:
        fast: The samples of a chunk, or None for a chunk that it can't do.
        direct: The samples of a chunk, one backward pass each: always right.
    """

    def __init__(self, fast: Callable[..., list[np.ndarray] | None], direct: Sampler):
        self._fast = fast
        self._direct = direct
        self.trusted: bool | None = None

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        rows = None if self.trusted is False else self._fast(values, others, batch)
        if rows is not None and self.trusted is None:
            self.trusted = self._agrees(rows, values, others, batch)
        if rows is not None and self.trusted:
            return rows
        return self._direct(values, others, batch)

    def _agrees(self, rows: list[np.ndarray], values: Any, others: Any, batch: Any) -> bool:
        ends = np.array([0, arrays(batch)[0].shape[0] - 1])
        exact = self._direct(values, others, take(batch, ends))
        for row, truth in zip(rows, exact, strict=True):
            for fast, direct in zip(row[ends], truth, strict=True):
                if not np.linalg.norm(fast - direct) <= TOLERANCE * np.linalg.norm(direct):
                    return False
        return True
