"""Gradients in the memory of a device."""

from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends import get_backend

from keras_woodfisher.memory.staged import StagedStore, encoded
from keras_woodfisher.memory.store import GradientStore


class DeviceStore(StagedStore):
    """The gradients as tensors on a device, one that `keras.device` knows; a block comes to the host when asked for."""

    def __init__(self, shape: tuple[int, int], chunk: int, dtype: str, page: int, device: str):
        super().__init__(shape, chunk, dtype, page)
        self._device = device
        self._parts: list[Any] = []
        self._backend = get_backend(keras.backend.backend())

    def close(self) -> None:
        super().close()
        self._parts = []

    def _write(self, rows: np.ndarray, first: int) -> None:
        stored = encoded(rows, self._scales[first : first + len(rows)], self._dtype)
        with keras.device(self._device):
            # A copy: on a host's device the tensor may share the buffer's memory.
            self._parts.append(ops.copy(ops.convert_to_tensor(stored)))

    def _read(self, columns: slice) -> np.ndarray:
        width = columns.stop - columns.start
        # `slice`, not indexing, which JAX compiles anew for each start. Anywhere but where the parts are it would move
        # all of them; the numbers that say what to slice stay on the host.
        with self._backend.in_turn(), keras.device(self._device):
            parts = [ops.slice(part, (0, columns.start), (part.shape[0], width)) for part in self._parts]
        return np.concatenate([ops.convert_to_numpy(part) for part in parts])


_: type[GradientStore] = DeviceStore
