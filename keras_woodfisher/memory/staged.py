"""Stores that take a chunk of samples in a buffer before they put it where it belongs."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_woodfisher.memory.store import GradientStore


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


def scales_of(rows: np.ndarray, dtype: str) -> np.ndarray:
    """The factor of each row, (n,) float32: a power of two, so that scaling itself loses nothing; 1 for float32.

    In float16, an entry above `2^-29` of its row's largest is off by at most `2^-11` (4.9e-4) of itself, a smaller
    one by at most `2^-40` of the largest.
    """
    if dtype == "float32" or rows.shape[1] == 0:
        return np.ones(len(rows), np.float32)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    # The largest entry comes to lie in [2^14, 2^15); the scale itself stays a normal number.
    return np.ldexp(np.float32(1.0), np.maximum(np.frexp(largest)[1] - 15, -126)).astype(np.float32)


def encoded(rows: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Rows as they are stored, contiguous."""
    if dtype == "float32":
        return np.ascontiguousarray(rows)
    return (rows / scales[:, None]).astype(np.float16)


def decoded(stored: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 rows of what was stored."""
    if stored.dtype == np.float32:
        return stored
    rows = stored.astype(np.float32)
    rows *= scales[:, None]
    return rows


class StagedStore:
    """What those stores have in common. They say how to `_write` samples and how to `_read` columns.

    Args:
        shape: (m, d): the most samples, and unpruned weights.
        chunk: See `GradientStore`.
        dtype: `"float32"` or `"float16"`, see `scales_of`.
        page: Columns that are read (or kept) at a time where one block spans more.
    """

    def __init__(self, shape: tuple[int, int], chunk: int, dtype: str, page: int):
        self.chunk = chunk
        self._capacity, self._width = shape
        self._dtype = dtype
        self._page = page
        self._buffer = np.empty((min(chunk, shape[0]), shape[1]), np.float32)
        self._scales = np.ones(shape[0], np.float32)
        self._filled = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self._filled, self._width

    def __len__(self) -> int:
        return self._filled

    def room(self, number: int) -> np.ndarray:
        return self._buffer[:number]

    def keep(self, good: np.ndarray) -> None:
        rows = self._buffer[: good.size]
        number = int(np.count_nonzero(good))
        for place, index in enumerate(np.flatnonzero(good)) if number < good.size else ():
            rows[place] = rows[index]
        rows = rows[:number]
        if number:
            self._scales[self._filled : self._filled + number] = scales_of(rows, self._dtype)
            self._write(rows, self._filled)
        self._filled += number

    def finish(self) -> None:
        """Gives the buffer back: nothing more is added."""
        self._buffer = self._buffer[:0].copy()

    def groups(self, blocks: Sequence[slice]) -> Iterator[Sequence[slice]]:
        yield blocks

    def block(self, block: slice) -> Any:
        width = block.stop - block.start
        if width <= max(self._page, self._filled):
            return self.columns(block)
        return BlockView(self.columns, block, len(self), self._page)

    def columns(self, columns: slice) -> np.ndarray:
        """(m, c) float32."""
        return decoded(self._read(columns), self._scales[: self._filled])

    def close(self) -> None:
        self._buffer = self._buffer[:0].copy()

    def _write(self, rows: np.ndarray, first: int) -> None:
        raise NotImplementedError

    def _read(self, columns: slice) -> np.ndarray:
        raise NotImplementedError


class HalfStore(StagedStore):
    """The gradients as one float16 array with a scale a row; a block is made float32 when it is asked for."""

    def __init__(self, shape: tuple[int, int], chunk: int, page: int):
        super().__init__(shape, chunk, "float16", page)
        self._array: np.ndarray = np.empty(shape, np.float16)

    def close(self) -> None:
        super().close()
        # A view would keep all of it.
        self._array = self._array[:0].copy()

    def _write(self, rows: np.ndarray, first: int) -> None:
        scales = self._scales[first : first + len(rows)]
        for start in range(0, self._width, self._page):
            part = slice(start, start + self._page)
            self._array[first : first + len(rows), part] = encoded(rows[:, part], scales, self._dtype)

    def _read(self, columns: slice) -> np.ndarray:
        return self._array[: self._filled, columns]


_: type[GradientStore] = HalfStore
