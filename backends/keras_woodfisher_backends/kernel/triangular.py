"""Symmetric products, and the inverse of a Cholesky factor, by halves: nearly all of the work is matrix products."""

import numpy as np
from scipy.linalg import lapack

_SMALL = 64
"""Up to this size LAPACK's own routines are faster."""

_LARGE = 128
"""From this size on it pays to leave out the zero quarter of a triangle."""


def inverse_factor(matrix: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    """`L^-1` for the Cholesky factor `L` of a positive definite matrix.

    With `L = [[L11, 0], [L21, L22]]`: `L21 = A21 L11^-T`, `L22` is the factor of `A22 - L21 L21^T`, and the lower left
    part of the inverse is `-L22^-1 L21 L11^-1`. Time is about `n^3` flops, most of them in large products (a
    factorisation followed by an inversion needs less, in smaller pieces that take longer).

    Args:
        matrix: (n, n) float64; only its lower triangle is read. It is overwritten.
        out: (n, n) float64. Its lower triangle becomes `L^-1`, the upper one zero.
        scratch: At least `n^2 / 2 + n` float64.

    Raises:
        numpy.linalg.LinAlgError: If the matrix isn't positive definite.
    """
    size = len(matrix)
    if size <= _SMALL:
        factor = np.linalg.cholesky(matrix)
        inverse, info = lapack.dtrtri(factor, lower=1)
        if info:
            raise np.linalg.LinAlgError(f"The Cholesky factor is singular at row {info}.")
        out[...] = inverse
        return
    half = size // 2
    rest = size - half
    first, second, below = out[:half, :half], out[half:, half:], out[half:, :half]
    lower, corner = matrix[half:, :half], matrix[half:, half:]
    product = scratch[: rest * half].reshape(rest, half)
    square = scratch[: rest * rest].reshape(rest, rest)
    out[:half, half:] = 0.0
    inverse_factor(matrix[:half, :half], first, scratch)
    _times_upper(lower, first.T, product)
    lower[...] = product
    lower_square(lower, square)
    corner -= square
    inverse_factor(corner, second, scratch)
    _times_lower(lower, first, product)
    _lower_times(second, product, below)
    np.negative(below, out=below)


def lower_square(left: np.ndarray, out: np.ndarray) -> None:
    """The lower triangle of `left @ left.T`; what is above it may be anything finite.

    Args:
        left: (n, k) float64.
        out: (n, n) float64.
    """
    size = len(left)
    if size <= _LARGE:
        # NumPy computes half of a product with its own transpose, and mirrors it.
        np.matmul(left, left.T, out=out)
        return
    half = size // 2
    lower_square(left[:half], out[:half, :half])
    lower_square(left[half:], out[half:, half:])
    np.matmul(left[half:], left[:half].T, out=out[half:, :half])
    out[:half, half:] = 0.0


def _times_upper(left: np.ndarray, upper: np.ndarray, out: np.ndarray) -> None:
    """`left @ upper` where what is below the diagonal of `upper` is zero."""
    half = _split(len(upper))
    np.matmul(left[:, :half], upper[:half, :half], out=out[:, :half])
    np.matmul(left, upper[:, half:], out=out[:, half:])


def _times_lower(left: np.ndarray, lower: np.ndarray, out: np.ndarray) -> None:
    """`left @ lower` where what is above the diagonal of `lower` is zero."""
    half = _split(len(lower))
    np.matmul(left, lower[:, :half], out=out[:, :half])
    np.matmul(left[:, half:], lower[half:, half:], out=out[:, half:])


def _lower_times(lower: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    """`lower @ right` where what is above the diagonal of `lower` is zero."""
    half = _split(len(lower))
    np.matmul(lower[:half, :half], right[:half], out=out[:half])
    np.matmul(lower[half:], right, out=out[half:])


def _split(size: int) -> int:
    return size // 2 if size >= _LARGE else 0
