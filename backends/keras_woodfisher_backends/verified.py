"""A fast way to take gradient samples, used only where it gives what one backward pass a group gives."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_woodfisher_backends.nest import take
from keras_woodfisher_backends.protocol import Sampler

TOLERANCE = 1e-3
"""Largest relative distance between a fast sample and the direct one."""


class VerifiedSampler:
    """Compares the two largest samples of the first chunk, then trusts the fast way or never uses it.

    The largest, because the gradient of an example that the model is sure of is little more than rounding. A fast way
    that fails on the first chunk (a layer may do anything to its tensors) isn't used either.

    Args:
        fast: The samples of a chunk, or None for a chunk that it can't do.
        direct: The samples of a chunk, one backward pass each: always right.
    """

    def __init__(self, fast: Callable[..., list[np.ndarray] | None], direct: Sampler):
        self._fast = fast
        self._direct = direct
        self.trusted: bool | None = None

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        rows = None
        if self.trusted is None:
            rows = self._first(values, others, batch)
        elif self.trusted:
            rows = self._fast(values, others, batch)
        return self._direct(values, others, batch) if rows is None else rows

    def _first(self, values: Any, others: Any, batch: Any) -> list[np.ndarray] | None:
        try:
            rows = self._fast(values, others, batch)
        except Exception:  # noqa: BLE001 - what is wrong with the model itself, the direct way will say
            self.trusted = False
            return None
        if rows is not None:
            self.trusted = self._agrees(rows, values, others, batch)
        return rows if self.trusted else None

    def _agrees(self, rows: list[np.ndarray], values: Any, others: Any, batch: Any) -> bool:
        sizes = np.array([[np.linalg.norm(sample) for sample in row] for row in rows])
        total = np.nan_to_num(np.square(sizes).sum(0), nan=0.0, posinf=0.0)
        largest = np.argsort(total, kind="stable")[-2:]
        exact = self._direct(values, others, take(batch, largest))
        for row, truth in zip(rows, exact, strict=True):
            for fast, direct in zip(row[largest], truth, strict=True):
                if not np.linalg.norm(fast - direct) <= TOLERANCE * np.linalg.norm(direct):
                    return False
        return True
