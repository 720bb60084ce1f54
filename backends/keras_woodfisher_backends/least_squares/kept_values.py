"""The best values of the weights that stay: one linear system an output."""

import numpy as np

_SMALL = 64
_CHUNK = 2**22


def least_squares(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`H_SS w_S = B_S` for the support S of each output, zero elsewhere: (g, k, o).

    Args:
        gram: H, (g, k, k), positive definite.
        cross: B, (g, k, o).
        kept: The supports, (g, k, o) bool.
    """
    out = np.zeros(cross.shape)
    if gram.shape[1] <= _SMALL:
        systems = kept.swapaxes(1, 2)
        size = max(1, _CHUNK // (gram.shape[1] ** 2 * systems.shape[1]))
        for start in range(0, len(gram), size):
            part = slice(start, start + size)
            inside = systems[part]
            pairs = inside[:, :, :, None] & inside[:, :, None, :]
            matrices = np.where(pairs, gram[part, None], 0.0)
            diagonal = np.einsum("goii->goi", matrices)
            diagonal += ~inside
            right = np.where(inside, cross[part].swapaxes(1, 2), 0.0)
            out[part] = np.linalg.solve(matrices, right[..., None])[..., 0].swapaxes(1, 2)
        return out
    for branch in range(len(gram)):
        for column in range(cross.shape[2]):
            support = np.flatnonzero(kept[branch, :, column])
            if support.size:
                part = gram[branch][np.ix_(support, support)]
                out[branch, support, column] = np.linalg.solve(part, cross[branch, support, column])
    return out
