"""Gradients in memory at half the size."""

import numpy as np

from keras_woodfisher.stores.half import encoded
from keras_woodfisher.stores.staged import StagedStore
from keras_woodfisher.stores.store import GradientStore


class HalfStore(StagedStore):
    """The gradients as one float16 array with a scale a row; a block is made float32 when it is asked for."""

    def __init__(self, shape: tuple[int, int], chunk: int, page: int):
        super().__init__(shape, chunk, "float16", page)
        self._array: np.ndarray = np.empty(shape, np.float16)

    def close(self) -> None:
        super().close()
        self._array = self._array[:0]

    def _write(self, rows: np.ndarray, first: int) -> None:
        scales = self._scales[first : first + len(rows)]
        for start in range(0, self._width, self._page):
            part = slice(start, start + self._page)
            self._array[first : first + len(rows), part] = encoded(rows[:, part], scales, self._dtype)

    def _read(self, columns: slice) -> np.ndarray:
        return self._array[: self._filled, columns]


_: type[GradientStore] = HalfStore
