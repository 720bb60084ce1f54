"""What all kept weights together should change by when some are removed: the quadratic model of the loss."""

from collections.abc import Sequence

import numpy as np
from keras_woodfisher_backends.kernel import BlockKernel
from keras_woodfisher_backends.panels import PANEL

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
        gradient: (d,) gradient of the mean loss, or None: then there is no Newton step.
    """

    def __init__(
        self,
        grads: GradientStore,
        kernel: BlockKernel,
        weights: np.ndarray,
        prune: np.ndarray,
        gradient: np.ndarray | None,
    ):
        self._grads = grads.block(slice(0, grads.shape[1]))
        self._kernel = kernel
        self._keep = ~prune
        self._gradient = None if gradient is None else np.where(prune, 0.0, gradient)
        removed = np.where(prune, weights, 0.0).astype(np.float64)
        sources = removed[:, None] if self._gradient is None else np.stack([removed, self._gradient], axis=1)
        self._values, self._basis = np.linalg.eigh(kernel.gram(self._grads, self._keep))
        self._sources = self._basis.T @ kernel.combine(self._grads, sources)

    def changes(self, compensations: Sequence[float], steps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """The changes for each damping.

        Args:
            compensations: Dampings of the compensation.
            steps: Dampings of the Newton step; none without a gradient.

        Returns:
            Compensations (k, d) and steps (l, d), float32, zero on what is removed.
        """
        duals = [self._dual(0, damp) for damp in compensations] + [self._dual(1, damp) for damp in steps]
        out = np.zeros((len(duals), self._keep.size), np.float32)
        stacked = np.stack(duals, axis=1)
        for start in range(0, self._keep.size, PANEL):
            part = slice(start, min(start + PANEL, self._keep.size))
            if self._keep[part].any():
                responses = self._kernel.project(self._grads[:, part], self._keep[part], stacked)
                out[:, part][:, self._keep[part]] = responses.T
        compensated, stepped = out[: len(compensations)], out[len(compensations) :]
        if self._gradient is not None and len(steps):
            stepped -= self._gradient
            stepped /= np.asarray(steps)[:, None]
        return compensated, stepped

    def _dual(self, source: int, damp: float) -> np.ndarray:
        """`(A + m damp I)^-1` applied to `G_Q w_Q` or to `G_K g_K`."""
        ridge = len(self._sources) * damp
        # Rounding may leave eigenvalues that are zero a little below it.
        return self._basis @ (self._sources[:, source] / (np.maximum(self._values, 0.0) + ridge))
