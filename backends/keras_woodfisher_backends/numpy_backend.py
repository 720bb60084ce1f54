"""The reference kernel, on NumPy and SciPy: exact everywhere, and the fastest one on a CPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import numpy as np
import scipy.linalg
from scipy.linalg import lapack

from keras_woodfisher_backends.kernel import BlockKernel, Operators

_ROW_PANELS = 4


class NumpyOperators:
    """`Operators` on the host's BLAS and LAPACK."""

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def load(self, panel: np.ndarray) -> np.ndarray:
        return panel

    def gram(self, panel: np.ndarray) -> np.ndarray:
        double = panel.astype(np.float64)
        return double @ double.T

    def fisher(self, panel: np.ndarray) -> np.ndarray:
        double = panel.astype(np.float64)
        return double.T @ double

    def factor(self, matrix: np.ndarray, ridge: float) -> np.ndarray:
        matrix.flat[:: matrix.shape[0] + 1] += ridge
        factor = scipy.linalg.cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
        # Some LAPACKs let NaN pass; it always reaches the last entry.
        if not np.isfinite(factor[-1, -1]):
            raise np.linalg.LinAlgError("Not finite.")
        return factor

    def leverage(self, factor: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        inverse = _triangular_inverse(factor).astype(np.float32)
        columns = np.einsum("ij,ij->j", inverse, inverse)
        edges = np.linspace(0, inverse.shape[0], _ROW_PANELS + 1).astype(int)

        def column_sums(panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            total = np.zeros(panel.shape[1])
            for low, high in pairwise(edges):
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


def _triangular_inverse(factor: np.ndarray) -> np.ndarray:
    inverse, info = lapack.dtrtri(factor, lower=1)
    if info:
        raise np.linalg.LinAlgError(f"The Cholesky factor is singular at row {info}.")
    return inverse


_: type[Operators] = NumpyOperators


def host_kernel() -> BlockKernel:
    """The kernel that runs on the host's processor."""
    return BlockKernel(NumpyOperators())
