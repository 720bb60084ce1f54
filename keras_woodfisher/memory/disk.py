"""Gradients on disk, one region a block, so that a block is one sequential read."""

import shutil
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from keras_woodfisher.memory.staged import StagedStore, encoded
from keras_woodfisher.memory.store import GradientStore
from keras_woodfisher.options.sizes import size_text

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


class Spool:
    """A file in the temporary folder that vanishes when it is closed, or when the process ends, however it does.

    Several threads may use it.

    Args:
        size: Bytes that it will hold.

    Raises:
        OSError: If there is no room, or it cannot be created.
    """

    def __init__(self, size: int):
        self._folder = tempfile.gettempdir()
        free = disk_room(self._folder)
        if size > free:
            raise self._error(size, f"{size_text(free)} are free there")
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise self._error(size, str(error)) from error
        self._size = size
        self._lock = threading.Lock()

    def write(self, offset: int, array: np.ndarray) -> None:
        """Writes the bytes of a contiguous array."""
        left = memoryview(array.data).cast("B")
        try:
            with self._lock:
                self._file.seek(offset)
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise self._error(self._size, str(error)) from error

    def read(self, offset: int, into: np.ndarray) -> None:
        """Fills a contiguous array."""
        left = memoryview(into.data).cast("B")
        with self._lock:
            self._file.seek(offset)
            while left:
                number = self._file.readinto(left)
                if not number:
                    raise OSError(f"The temporary file of gradients in {self._folder} has been cut short.")
                left = left[number:]

    def close(self) -> None:
        """Removes it."""
        self._file.close()

    def _error(self, size: int, reason: str) -> OSError:
        return OSError(
            f"A temporary file of {size_text(size)} for the gradients cannot be created in {self._folder}: {reason}. "
            "Set the environment variable TMPDIR to a folder with more room, or lower num_grads."
        )


def disk_room(folder: str) -> int:
    """Free bytes for files in a folder; 0 where they would be in memory after all."""
    path = Path(folder).resolve()
    for partition in sorted(psutil.disk_partitions(all=True), key=lambda p: len(p.mountpoint), reverse=True):
        if path.is_relative_to(partition.mountpoint):
            if partition.fstype in _IN_MEMORY:
                return 0
            break
    return shutil.disk_usage(path).free


class DiskStore(StagedStore):
    """The gradients in a temporary file, one of the `blocks` after the other; they cover all columns in their order."""

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
