"""Stores that take a chunk of samples in a buffer before they put it where it belongs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_woodfisher.stores.half import decoded, scales_of
from keras_woodfisher.stores.view import BlockView


class StagedStore:
    """What those stores have in common. They say how to `_write` samples and how to `_read` columns.

    Args:
        shape: (m, d): the most samples, and unpruned weights.
        chunk: See `GradientStore`.
        dtype: `"float32"` or `"float16"`, see `half`.
        page: Columns that are read at a time where one block spans more.
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
        self.finish()

    def _write(self, rows: np.ndarray, first: int) -> None:
        raise NotImplementedError

    def _read(self, columns: slice) -> np.ndarray:
        raise NotImplementedError
