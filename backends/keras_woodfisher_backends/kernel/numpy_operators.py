"""The reference kernel, on NumPy: exact everywhere, and the fastest one on a CPU."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import numpy as np

from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.operators import Operators
from keras_woodfisher_backends.kernel.threads import host_threads
from keras_woodfisher_backends.kernel.triangular import inverse_factor, lower_square

_ROWS = 64
"""Rows of `L^-1` in one product: those that a panel of them doesn't reach are left out."""


class NumpyOperators:
    """`Operators` on the host's processor.

    A factor is `L^-1` in float64. Large arrays are kept from one block to the next, since fresh ones cost as much time
    (the system hands out memory page by page) as some of the products; each thread has its own.
    """

    def __init__(self) -> None:
        self._arrays = _ThreadArrays()

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        pass

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def load(self, panel: np.ndarray) -> np.ndarray:
        return panel

    def gram(self, panel: np.ndarray, total: np.ndarray | None) -> np.ndarray:
        return self._add_square(self._double(panel), total)

    def fisher(self, panel: np.ndarray, total: np.ndarray | None) -> np.ndarray:
        return self._add_square(self._double(panel).T, total)

    def plus(self, total: np.ndarray, part: np.ndarray) -> np.ndarray:
        total += part
        return total

    def minus(self, total: np.ndarray, part: np.ndarray) -> np.ndarray:
        return total - part

    def factor(self, matrix: np.ndarray, ridge: float) -> np.ndarray:
        size = len(matrix)
        matrix.flat[:: size + 1] += ridge
        inverse = self._arrays.take("inverse", (size, size))
        inverse_factor(matrix, inverse, self._arrays.take("product", (size * size // 2 + size,)))
        # Some LAPACKs let NaN pass; it always reaches the last entry.
        if not np.isfinite(inverse[-1, -1]):
            raise np.linalg.LinAlgError("Not finite.")
        return inverse

    def leverage(self, factor: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        inverse = self._arrays.take("single", factor.shape, np.float32)
        np.copyto(inverse, factor, casting="same_kind")
        columns = np.einsum("ij,ij->j", inverse, inverse)

        def column_sums(panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            total, spread = np.zeros(panel.shape[1]), np.zeros(panel.shape[1])
            for low, high in _row_panels(len(inverse)):
                rows = self._arrays.take("rows", (high - low, panel.shape[1]), np.float32)
                # L^-1 is lower triangular: rows below `high` use only that many rows of G.
                np.matmul(inverse[low:high, :high], panel[:high], out=rows)
                total += np.einsum("ij,ij->j", rows, rows)
                np.square(panel[low:high], out=rows)
                spread += columns[low:high] @ rows
            return total, spread

        return column_sums

    def leverage_float64(self, factor: np.ndarray, panel: np.ndarray) -> np.ndarray:
        rows = factor @ panel.astype(np.float64)
        return np.einsum("ij,ij->j", rows, rows)

    def inverse_diagonal(self, factor: np.ndarray) -> np.ndarray:
        return np.einsum("ij,ij->j", factor, factor)

    def group_gram(self, factor: np.ndarray, groups: np.ndarray) -> np.ndarray:
        panel = self._double(groups.reshape(len(groups), -1))
        solved = self._arrays.take("solved", panel.shape)
        for low, high in _row_panels(len(factor)):
            np.matmul(factor[low:high, :high], panel[:high], out=solved[low:high])
        by_group = self._arrays.take("by group", (*groups.shape[1:], len(groups)))
        np.copyto(by_group, solved.reshape(groups.shape).transpose(1, 2, 0))
        return by_group @ by_group.transpose(0, 2, 1)

    def solve(self, factor: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (factor @ right) @ factor

    def host(self, matrix: np.ndarray) -> np.ndarray:
        return matrix

    def combine(self, panel: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        return self._double(panel) @ coefficients

    def project(self, panel: np.ndarray, dual: np.ndarray) -> np.ndarray:
        return self._double(panel).T @ dual

    def _add_square(self, left: np.ndarray, total: np.ndarray | None) -> np.ndarray:
        size = len(left)
        # The sum outlives the call, and one thread may begin several.
        out = np.empty((size, size)) if total is None else self._arrays.take("product", (size, size))
        lower_square(left, out)
        if total is None:
            return out
        total += out
        return total

    def _double(self, panel: np.ndarray) -> np.ndarray:
        double = self._arrays.take("double", panel.shape)
        np.copyto(double, panel)
        return double


class _ThreadArrays(threading.local):
    """Arrays by name, of each thread; they go when it ends, or with the operators."""

    def __init__(self) -> None:
        self._flat: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: type = np.float64) -> np.ndarray:
        """An array that holds anything, and is the same one whenever this is called with its name."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.size < size:
            self._flat.pop(name, None)
            flat = self._flat[name] = np.empty(size, dtype)
        return flat[:size].reshape(shape)


def _row_panels(rows: int) -> Iterator[tuple[int, int]]:
    return pairwise([*range(0, rows, _ROWS), rows])


_: type[Operators] = NumpyOperators


def host_kernel() -> BlockKernel:
    """The kernel that runs on the host's processor, on as many blocks at a time as its BLAS has threads."""
    return BlockKernel(NumpyOperators(), lanes=host_threads(), on_host=True)
