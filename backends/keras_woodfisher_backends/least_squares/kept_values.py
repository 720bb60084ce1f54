"""The best values of the weights that stay: one linear system an output."""

import numpy as np

_SMALL = 64
"""Matrices with so few inputs are solved many at a time."""

_CHUNK = 2**22
"""Numbers of those that are held at a time."""

_STEPS = 40
"""Steps of conjugate gradients that are counted on."""

_MOST_STEPS = 500
_TOLERANCE = 1e-8
"""Residual, as a part of the right side, at which an output is done."""


def least_squares(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`H_SS w_S = B_S` for the support S of each output, zero elsewhere: (g, k, o).

    Small systems are solved many at a time, others one by one, or, where that is more work, by conjugate gradients on
    all outputs together.

    Args:
        gram: H, (g, k, k), positive definite.
        cross: B, (g, k, o).
        kept: The supports, (g, k, o) bool.
    """
    if gram.shape[1] <= _SMALL:
        return _many_at_a_time(gram, cross, kept)
    out = np.zeros(cross.shape)
    for branch in range(len(gram)):
        sizes = kept[branch].sum(0).astype(np.float64)
        directly = float((sizes**3).sum()) / 1.5
        together = _STEPS * 2.0 * gram.shape[1] ** 2 * cross.shape[2]
        solve = _one_by_one if directly <= together else conjugate_gradients
        out[branch] = solve(gram[branch], cross[branch], kept[branch])
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


def conjugate_gradients(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The same for one branch: arrays (k, k), (k, o) and (k, o); preconditioned by the diagonal."""
    diagonal = gram.diagonal()[:, None]
    values = np.zeros(cross.shape)
    residual = np.where(kept, cross, 0.0)
    enough = _TOLERANCE**2 * np.square(residual).sum(0)
    step = residual / diagonal
    product = (residual * step).sum(0)
    for _ in range(_MOST_STEPS):
        if (np.square(residual).sum(0) <= enough).all():
            break
        image = np.where(kept, gram @ step, 0.0)
        length = product / np.maximum((step * image).sum(0), 1e-300)
        values += length * step
        residual -= length * image
        scaled = residual / diagonal
        before, product = product, (residual * scaled).sum(0)
        step = scaled + product / np.maximum(before, 1e-300) * step
    return values
