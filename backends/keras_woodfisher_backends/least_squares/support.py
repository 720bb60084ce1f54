"""Which weights of a matrix stay: an alternating direction method on the layer's output error.

Meng et al., "ALPS" (arXiv 2406.07831): minimise `tr(W^T H W) - 2 tr(W^T B)` over W, with a copy Z of W that has the
sparsity that is wanted, and multipliers V that draw the two together. H is decomposed once, so that each iteration is
two matrix products, whatever the penalty.
"""

from collections.abc import Callable

import numpy as np

from keras_woodfisher_backends.least_squares.arithmetic import DOUBLE, Arithmetic

Project = Callable[[np.ndarray], np.ndarray]
"""Which entries of a matrix (g, k, o) to keep, as bool, given how much each is worth: by size."""

_FIRST_PENALTY = 0.1
_GROWTH = ((0.1, 1.1), (0.005, 1.05), (0.0, 1.03))
"""Factors by which the penalty grows every third iteration, by the part of the kept weights that changed.

The slower it grows, the better the support: by 1 to 10 % of the error on the layers of a ResNet, against 1.5, 1.3, 1.1.
"""

_ITERATIONS = 300
_USUAL = 100
"""Iterations until nothing changes any more, with that growth."""

_HURRY = 4.0

_FLOPS = 1e12
"""Where so many would be more work than this, the penalty grows faster."""


def sparse_support(
    gram: np.ndarray,
    cross: np.ndarray,
    start: np.ndarray,
    project: Project,
    hurried: bool = False,
    arithmetic: Arithmetic = DOUBLE,
) -> tuple[np.ndarray, np.ndarray]:
    """The weights to keep, (g, k, o) bool, and values for them that are nearly the best.

    Args:
        gram: H, (g, k, k), positive definite.
        cross: B, (g, k, o).
        start: The dense matrix, (g, k, o).
        project: Chooses by size among weights that are scaled to inputs of the same size.
        hurried: Whether the penalty may grow fast.
        arithmetic: What computes the products.
    """
    scale = np.sqrt(np.einsum("gkk->gk", gram))[:, :, None]
    hurry = max(_HURRY if hurried else 1.0, 4.0 * _USUAL * gram.size * cross.shape[2] / _FLOPS)
    with arithmetic.scope():
        solve = _solver(gram / scale / scale.swapaxes(1, 2), cross / scale, arithmetic)
        scaled = (start * scale).astype(arithmetic.dtype)
        kept = project(scaled)
        sparse = np.where(kept, scaled, 0.0)
        multipliers = np.zeros_like(sparse)
        penalty = _FIRST_PENALTY
        total = max(1, int(kept.sum()))
        still, before = 0, kept
        for iteration in range(1, _ITERATIONS + 1):
            dense = solve(penalty * sparse - multipliers, penalty)
            moved = dense + multipliers / penalty
            kept = project(moved)
            sparse = np.where(kept, moved, 0.0)
            multipliers += penalty * (dense - sparse)
            if iteration % 3 == 0:
                changed = np.count_nonzero(kept != before) / (2 * total)
                before = kept
                if changed == 0.0:
                    still += 1
                    if still == 2:
                        break
                else:
                    still = 0
                penalty *= next(factor for least, factor in _GROWTH if changed >= least) ** hurry
    return kept, sparse / scale


def _solver(gram: np.ndarray, cross: np.ndarray, arithmetic: Arithmetic) -> Callable[[np.ndarray, float], np.ndarray]:
    """A function (R, p) -> W that solves `(H + p I) W = B + R`."""
    values, vectors = arithmetic.eigh(arithmetic.load(gram))
    turned = arithmetic.transposed(vectors)
    right = turned @ arithmetic.load(cross)

    def solve(shift: np.ndarray, penalty: float) -> np.ndarray:
        return arithmetic.host(vectors @ ((right + turned @ arithmetic.load(shift)) / (values[:, :, None] + penalty)))

    return solve
