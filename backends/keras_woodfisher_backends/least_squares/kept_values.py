"""The best values of the weights that stay: one linear system an output."""

from typing import Any

import numpy as np

from keras_woodfisher_backends.least_squares.arithmetic import DOUBLE, Arithmetic

_SMALL = 64
"""Matrices with so few inputs are solved many at a time."""

_CHUNK = 2**22
"""Numbers of those that are held at a time."""

_STEPS = 40
"""Steps of conjugate gradients that are counted on."""

_MOST_STEPS = 500
_TOLERANCE, _LOOSE = 1e-8, 1e-5
"""Residual, as a part of the right side, at which an output is done, in float64 and in float32."""

_ROUNDS, _GAIN = 3, 1e-3
"""In float32: how often the residual is taken anew in float64, and how much smaller it becomes each time."""


def least_squares(
    gram: np.ndarray,
    cross: np.ndarray,
    kept: np.ndarray,
    start: np.ndarray | None = None,
    arithmetic: Arithmetic = DOUBLE,
) -> np.ndarray:
    """`H_SS w_S = B_S` for the support S of each output, zero elsewhere: (g, k, o).

    Small systems are solved many at a time, others one by one, or, where that is more work, by conjugate gradients on
    all outputs together.

    Args:
        gram: H, (g, k, k), positive definite.
        cross: B, (g, k, o).
        kept: The supports, (g, k, o) bool.
        start: Where conjugate gradients begin, (g, k, o); by default at zero.
        arithmetic: What computes their products.
    """
    if gram.shape[1] <= _SMALL:
        return _many_at_a_time(gram, cross, kept)
    out = np.zeros(cross.shape)
    for branch in range(len(gram)):
        sizes = kept[branch].sum(0).astype(np.float64)
        directly = float((sizes**3).sum()) / 1.5
        together = _STEPS * 2.0 * gram.shape[1] ** 2 * cross.shape[2]
        system = gram[branch], cross[branch], kept[branch]
        if directly <= together:
            out[branch] = _one_by_one(*system)
        else:
            out[branch] = conjugate_gradients(*system, None if start is None else start[branch], arithmetic)
    return out


def _many_at_a_time(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray) -> np.ndarray:
    out = np.zeros(cross.shape)
    systems = kept.swapaxes(1, 2)
    size = max(1, _CHUNK // (gram.shape[1] ** 2 * systems.shape[1]))
    for start in range(0, len(gram), size):
        part = slice(start, start + size)
        inside = systems[part]
        matrices = np.where(inside[:, :, :, None] & inside[:, :, None, :], gram[part, None], 0.0)
        diagonal = np.einsum("goii->goi", matrices)
        diagonal += ~inside
        right = np.where(inside, cross[part].swapaxes(1, 2), 0.0)
        out[part] = np.linalg.solve(matrices, right[..., None])[..., 0].swapaxes(1, 2)
    return out


def _one_by_one(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray) -> np.ndarray:
    out = np.zeros(cross.shape)
    for column in range(cross.shape[1]):
        support = np.flatnonzero(kept[:, column])
        if support.size:
            out[support, column] = np.linalg.solve(gram[np.ix_(support, support)], cross[support, column])
    return out


def conjugate_gradients(
    gram: np.ndarray,
    cross: np.ndarray,
    kept: np.ndarray,
    start: np.ndarray | None = None,
    arithmetic: Arithmetic = DOUBLE,
) -> np.ndarray:
    """The same for one branch: arrays (k, k), (k, o) and (k, o)."""
    precise = arithmetic.dtype == np.float64
    enough = (_TOLERANCE if precise else _LOOSE) * np.linalg.norm(np.where(kept, cross, 0.0), axis=0)
    values = np.zeros(cross.shape) if start is None else np.where(kept, start, 0.0).astype(np.float64)
    with arithmetic.scope():
        matrix = arithmetic.load(gram)
        for _ in range(1 if precise else _ROUNDS):
            # In float64, whatever the steps are computed in.
            residual = np.where(kept, cross - gram @ values, 0.0)
            if (np.linalg.norm(residual, axis=0) <= enough).all():
                break
            aim = enough if precise else np.maximum(enough, _GAIN * np.linalg.norm(residual, axis=0))
            values += _steps(matrix, gram.diagonal()[:, None], residual, kept, aim, arithmetic)
    return values


def _steps(
    gram: Any, diagonal: np.ndarray, residual: np.ndarray, kept: np.ndarray, enough: np.ndarray, arithmetic: Arithmetic
) -> np.ndarray:
    """The change that makes the norms of all residuals (k, o) at most `enough` (o,); preconditioned by the diagonal."""
    residual, diagonal = residual.astype(arithmetic.dtype), diagonal.astype(arithmetic.dtype)
    values = np.zeros_like(residual)
    step = residual / diagonal
    product = (residual * step).sum(0)
    for _ in range(_MOST_STEPS):
        if (np.linalg.norm(residual, axis=0) <= enough).all():
            break
        image = np.where(kept, arithmetic.host(gram @ arithmetic.load(step)), 0.0)
        length = product / np.maximum((step * image).sum(0), 1e-30)
        values += length * step
        residual -= length * image
        scaled = residual / diagonal
        before, product = product, (residual * scaled).sum(0)
        step = scaled + product / np.maximum(before, 1e-30) * step
    return values
