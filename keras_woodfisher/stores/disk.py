"""Gradients on disk, one region a block, so that a block is one sequential read."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from keras_woodfisher.stores.half import encoded
from keras_woodfisher.stores.spool import Spool
from keras_woodfisher.stores.staged import StagedStore
from keras_woodfisher.stores.store import GradientStore


class DiskStore(StagedStore):
    """The gradients in a temporary file, block-major.

    Args:
        shape: (m, d): the most samples, and unpruned weights.
        chunk: See `GradientStore`.
        dtype: `"float32"` or `"float16"`.
        page: Columns that are read at a time where one block spans more.
        blocks: The blocks, which cover all columns in their order.
    """

    def __init__(self, shape: tuple[int, int], chunk: int, dtype: str, page: int, blocks: Sequence[slice]):
        super().__init__(shape, chunk, dtype, page)
        self._type = np.dtype(dtype)
        self._regions = [
            slice(low, min(low + page, block.stop)) for block in blocks for low in range(block.start, block.stop, page)
        ]
        self._starts = [region.start for region in self._regions]
        self._spool = Spool(self._type.itemsize * shape[0] * shape[1])

    def close(self) -> None:
        super().close()
        self._spool.close()

    def _write(self, rows: np.ndarray, first: int) -> None:
        scales = self._scales[first : first + len(rows)]
        for region in self._regions:
            self._spool.write(self._offset(region, first), encoded(rows[:, region], scales, self._dtype))

    def _read(self, columns: slice) -> np.ndarray:
        regions = self._regions[bisect_right(self._starts, columns.start) - 1 :]
        if regions[0] == columns:
            out = np.empty((self._filled, columns.stop - columns.start), self._type)
            self._spool.read(self._offset(columns, 0), out)
            return out
        parts = []
        for region in regions:
            if region.start >= columns.stop:
                break
            part = np.empty((self._filled, region.stop - region.start), self._type)
            self._spool.read(self._offset(region, 0), part)
            parts.append(part[:, max(columns.start - region.start, 0) : columns.stop - region.start])
        return np.concatenate(parts, axis=1)

    def _offset(self, region: slice, row: int) -> int:
        """Where a row of a region begins: regions lie one after the other, each with room for all samples."""
        return self._type.itemsize * (region.start * self._capacity + row * (region.stop - region.start))


_: type[GradientStore] = DiskStore
