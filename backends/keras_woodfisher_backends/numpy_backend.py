"""The reference kernel, on NumPy and SciPy: exact everywhere, and the fastest one on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import numpy as np
import scipy.linalg
from scipy.linalg import lapack
from threadpoolctl import threadpool_info

from keras_woodfisher_backends.kernel import BlockKernel, Operators

_ROW_PANELS = 4
_SMALL = 64


class NumpyOperators:
    """`Operators` on the host's processor.

    What takes time goes through NumPy, not SciPy: each brings a BLAS of its own, and the threads of one that still
    spin after a call slow down the other. NumPy also lets other threads run meanwhile.
    """

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def load(self, panel: np.ndarray) -> np.ndarray:
        return panel

    def gram(self, panel: np.ndarray) -> np.ndarray:
        double = panel.astype(np.float64)
        gram = np.zeros((len(double), len(double)))
        for low, high in _row_panels(len(double)):
            # The lower triangle is all that the Cholesky factorisation reads.
            np.matmul(double[low:high], double[:high].T, out=gram[low:high, :high])
        return gram

    def fisher(self, panel: np.ndarray) -> np.ndarray:
        double = panel.astype(np.float64)
        return double.T @ double

    def factor(self, matrix: np.ndarray, ridge: float) -> np.ndarray:
        matrix.flat[:: matrix.shape[0] + 1] += ridge
        factor = np.linalg.cholesky(matrix)
        # Some LAPACKs let NaN pass; it always reaches the last entry.
        if not np.isfinite(factor[-1, -1]):
            raise np.linalg.LinAlgError("Not finite.")
        return factor

    def leverage(self, factor: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        inverse = _triangular_inverse(factor).astype(np.float32)
        columns = np.einsum("ij,ij->j", inverse, inverse)

        def column_sums(panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            total = np.zeros(panel.shape[1])
            for low, high in _row_panels(len(inverse)):
                # L^-1 is lower triangular: rows below `high` use only that many rows of G.
                rows = inverse[low:high, :high] @ panel[:high]
                total += np.einsum("ij,ij->j", rows, rows)
            return total, (columns @ np.square(panel)).astype(np.float64)

        return column_sums

    def leverage_float64(self, factor: np.ndarray, panel: np.ndarray) -> np.ndarray:
        rows = scipy.linalg.solve_triangular(
            factor, panel.astype(np.float64), lower=True, overwrite_b=True, check_finite=False
        )
        return np.einsum("ij,ij->j", rows, rows)

    def inverse_diagonal(self, factor: np.ndarray) -> np.ndarray:
        inverse = _triangular_inverse(factor)
        return np.einsum("ij,ij->j", inverse, inverse)

    def solve(self, factor: np.ndarray, right: np.ndarray) -> np.ndarray:
        return scipy.linalg.cho_solve((factor, True), right, check_finite=False)

    def combine(self, panel: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        return panel.astype(np.float64) @ coefficients

    def project(self, panel: np.ndarray, dual: np.ndarray) -> np.ndarray:
        return dual @ panel.astype(np.float64)


def _row_panels(rows: int) -> Iterator[tuple[int, int]]:
    return pairwise(np.linspace(0, rows, _ROW_PANELS + 1).astype(int).tolist())


def _triangular_inverse(factor: np.ndarray) -> np.ndarray:
    """`L^-1`, halved until it is small: nearly all of the work is matrix products."""
    size = len(factor)
    if size <= _SMALL:
        inverse, info = lapack.dtrtri(factor, lower=1)
        if info:
            raise np.linalg.LinAlgError(f"The Cholesky factor is singular at row {info}.")
        return inverse
    half = size // 2
    inverse = np.zeros_like(factor)
    inverse[:half, :half] = _triangular_inverse(factor[:half, :half])
    inverse[half:, half:] = _triangular_inverse(factor[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (factor[half:, :half] @ inverse[:half, :half])
    return inverse


_: type[Operators] = NumpyOperators


def host_kernel() -> BlockKernel:
    """The kernel that runs on the host's processor, on as many blocks at a time as its BLAS has threads."""
    return BlockKernel(NumpyOperators(), workers=host_threads())


def host_threads() -> int:
    """Threads that BLAS uses now (OMP_NUM_THREADS and the like set it), 1 where that isn't known."""
    return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
