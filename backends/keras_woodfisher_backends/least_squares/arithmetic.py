"""Where the products and the decomposition of large matrices are done: on the host, or on an accelerator.

What is small is computed in float64. Where that would take long, the choice of weights is computed in float32, and so
are the steps towards their values, whose residual is taken in float64 again.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from keras import ops

from keras_woodfisher_backends.protocol import Backend

_LONG = 1e10
"""Operations from which float64 takes too long on a processor. Float32 costs 0.1 % of the output error there."""

_WORTH_SENDING = 2e9
"""Operations from which an accelerator is faster than the host, transfers counted."""

_DEVICE_SHARE = 0.8
"""Part of a device's free memory that may be used."""


class Arithmetic(Protocol):
    """Matrices of one kind, which know `+`, `*`, `/` and `@`."""

    dtype: Any

    def scope(self) -> AbstractContextManager[Any]:
        """Entered around all work with its matrices."""
        ...

    def load(self, array: np.ndarray) -> Any:
        """A matrix, or a stack of them."""
        ...

    def host(self, array: Any) -> np.ndarray:
        """The same as a NumPy array."""
        ...

    def transposed(self, array: Any) -> Any:
        """With the last two axes exchanged."""
        ...

    def eigh(self, array: Any) -> tuple[Any, Any]:
        """Eigenvalues (g, k) and eigenvectors (g, k, k) of symmetric matrices (g, k, k)."""
        ...


class OnHost:
    """NumPy."""

    def __init__(self, dtype: Any):
        self.dtype = dtype

    def scope(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def load(self, array: np.ndarray) -> np.ndarray:
        return array.astype(self.dtype, copy=False)

    def host(self, array: np.ndarray) -> np.ndarray:
        return array

    def transposed(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(-1, -2)

    def eigh(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh(array)
        return values, vectors


DOUBLE, SINGLE = OnHost(np.float64), OnHost(np.float32)


class OnDevice:
    """Keras's operations on one device, in full float32.

    Args:
        backend: The adapter of the framework.
        device: Its name for the device.
    """

    dtype = np.float32

    def __init__(self, backend: Backend, device: str):
        self._backend = backend
        self.device = device

    def scope(self) -> AbstractContextManager[Any]:
        return self._backend.placed(self.device)

    def fits(self, size: int) -> bool:
        """Whether the device has room for so many bytes, as far as the framework can tell."""
        free = self._backend.free_memory(self.device)
        return free is None or size <= _DEVICE_SHARE * free

    def load(self, array: np.ndarray) -> Any:
        return ops.convert_to_tensor(np.ascontiguousarray(array, self.dtype))

    def host(self, array: Any) -> np.ndarray:
        return np.asarray(ops.convert_to_numpy(array))

    def transposed(self, array: Any) -> Any:
        return ops.swapaxes(array, -1, -2)

    def eigh(self, array: Any) -> tuple[Any, Any]:
        values, vectors = ops.linalg.eigh(array)
        return values, vectors


def arithmetic_for(shape: tuple[int, int, int], device: OnDevice | None = None) -> Arithmetic:
    """What to use for a matrix (g, k, o).

    Args:
        shape: Its shape.
        device: An accelerator, if there is one.
    """
    branches, inputs, outputs = shape
    work = branches * inputs**2 * (9.0 * inputs + 4.0 * 20.0 * outputs)
    size = 4 * branches * inputs * (3 * inputs + 4 * outputs)
    if device is not None and work > _WORTH_SENDING and device.fits(size):
        return device
    return SINGLE if work > _LONG else DOUBLE
