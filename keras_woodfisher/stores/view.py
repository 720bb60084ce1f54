"""One block that is too wide to be in memory as a whole."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class BlockView:
    """(m, B) float32 of a block, of which only a page of columns is in memory. Several threads may use it.

    Args:
        read: The samples of a range of columns of G, (m, c) float32.
        block: The columns of the block.
        samples: Samples (m).
        page: Columns of a page.

    Attributes:
        shape: (m, B).
    """

    def __init__(self, read: Callable[[slice], np.ndarray], block: slice, samples: int, page: int):
        self.shape = (samples, block.stop - block.start)
        self._read = read
        self._start = block.start
        self._page = page
        self._held: tuple[int, np.ndarray] | None = None
        self._lock = threading.Lock()

    def __getitem__(self, key: Any) -> np.ndarray:
        """`view[rows, columns]`, columns by a slice, a bool mask or indices: a copy, so that no page is kept twice."""
        rows, columns = key
        if isinstance(columns, slice):
            places = np.arange(*columns.indices(self.shape[1]))
        else:
            places = np.asarray(columns)
            places = np.flatnonzero(places) if places.dtype == bool else places
        numbers = places // self._page
        out = np.empty((len(range(*rows.indices(self.shape[0]))), places.size), np.float32)
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            with self._lock:
                out[:, _range(here)] = self._hold(number)[rows, _range(places[here] - number * self._page)]
        return out

    def _hold(self, number: int) -> np.ndarray:
        if self._held is None or self._held[0] != number:
            self._held = None
            low = number * self._page
            high = min(low + self._page, self.shape[1])
            self._held = number, self._read(slice(self._start + low, self._start + high))
        return self._held[1]


def _range(places: np.ndarray) -> Any:
    """A slice where it says the same: copying by indices is slow, and makes a copy in between."""
    if places.size and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places
