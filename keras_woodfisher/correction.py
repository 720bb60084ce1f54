"""What all kept weights together should change by when some are removed: the quadratic model of the loss."""

from collections.abc import Sequence

import numpy as np
from keras_woodfisher_backends.kernel import BlockKernel

from keras_woodfisher.stores.store import GradientStore


class WholeCorrection:
    """Corrections over all kept weights in one block, for any damping, from one decomposition.

    With `A = G_K G_K^T = U S U^T` over the kept set K and `w_Q` removed:

    - compensation, which minimises the quadratic cost of the removal (Optimal Brain Surgeon for a set):
      `G_K^T (A + m damp I)^-1 G_Q w_Q`;
    - a damped Newton step on the loss itself, with its gradient `g`:
      `-(F_KK + damp I)^-1 g_K = -(1 / damp) (g_K - G_K^T (A + m damp I)^-1 G_K g_K)`.

    Memory beyond `G` is that of `A`, in float64, and of the changes that are asked for, in float32.

    Args:
        grads: The samples (m, d) of the unpruned weights.
        kernel: Does the products.
        weights: (d,) unpruned weights.
        prune: (d,) bool, those that are removed now (Q); at least one stays.
    """

    def __init__(self, grads: GradientStore, kernel: BlockKernel, weights: np.ndarray, prune: np.ndarray):
        self._grads = grads.block(slice(0, grads.shape[1]))
        self._kernel = kernel
        self._keep = ~prune
        self._removed = np.where(prune, weights, 0.0).astype(np.float64)
        self._values, self._basis = np.linalg.eigh(kernel.gram(self._grads, self._keep))

    def compensations(self, dampings: Sequence[float]) -> np.ndarray:
        """The compensation for each damping, (k, d) float32, zero on what is removed."""
        return self._responses(self._removed, dampings)

    def steps(self, gradient: np.ndarray, dampings: Sequence[float]) -> np.ndarray:
        """The Newton step for each damping, (k, d) float32, zero on what is removed.

        Args:
            gradient: (d,) gradient of the mean loss.
            dampings: Ridges on the diagonal of the Fisher.
        """
        kept = np.where(self._keep, gradient, 0.0)
        out = self._responses(kept, dampings)
        out -= kept
        out /= np.asarray(dampings)[:, None]
        return out

    def _responses(self, right: np.ndarray, dampings: Sequence[float]) -> np.ndarray:
        """`G_K^T (A + m damp I)^-1 G right` for each damping."""
        source = self._basis.T @ self._kernel.combine(self._grads, right, alone=True)
        # Rounding may leave eigenvalues that are zero a little below it.
        values = np.maximum(self._values, 0.0)[:, None] + len(source) * np.asarray(dampings)
        duals = self._basis @ (source[:, None] / values)
        out = np.zeros((len(dampings), self._keep.size), np.float32)
        self._kernel.project(self._grads, self._keep, duals, out, alone=True)
        return out
