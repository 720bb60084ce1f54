"""A temporary file of bytes that no one else sees, and how much room there is for it."""

import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil

from keras_woodfisher.memory import size_text

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


class Spool:
    """A file in the temporary folder that vanishes when it is closed, or when the process ends, however it does.

    Several threads may use it.

    Args:
        size: Bytes that it will hold.

    Raises:
        OSError: If there is no room, or it can't be made.
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
            f"A temporary file of {size_text(size)} for the gradients can't be had in {self._folder}: {reason}. "
            "Set the environment variable TMPDIR to a folder with more room, or lower num_grads."
        )


def temporary_folder() -> str:
    """Where temporary files go."""
    return tempfile.gettempdir()


def disk_room(folder: str) -> int:
    """Free bytes for files in a folder; 0 where they would be in memory after all."""
    path = Path(folder).resolve()
    for partition in sorted(psutil.disk_partitions(all=True), key=lambda p: len(p.mountpoint), reverse=True):
        if path.is_relative_to(partition.mountpoint):
            if partition.fstype in _IN_MEMORY:
                return 0
            break
    return shutil.disk_usage(path).free
