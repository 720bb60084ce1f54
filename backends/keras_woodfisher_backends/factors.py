"""The matrix of a block that is factored: of its samples or of its weights, whichever is smaller."""

from typing import Any

import numpy as np

from keras_woodfisher_backends.panels import Panels, Samples, chosen


class Factors(Panels):
    """Cholesky factors over panels; see `Panels` for its arguments."""

    def _dual_factor(self, grads: Samples, damp: float, keep: np.ndarray | None, alone: bool) -> Any:
        """Of `m damp I + G_K G_K^T` (m, m)."""
        return self._factor(self._gram(grads, keep, alone), grads.shape[0], damp)

    def _primal_factor(self, grads: Samples, damp: float, keep: np.ndarray | None) -> Any:
        """Of `m F_KK = m damp I + G_K^T G_K`, for few weights and any number of samples."""
        total = None
        for rows in self._parts(grads.shape[0]):
            panels = [
                grads[rows, part] if keep is None else chosen(grads[rows, part], keep[part])
                for part in self._parts(grads.shape[1])
            ]
            panel = panels[0] if len(panels) == 1 else np.concatenate(panels, axis=1)
            total = self._ops.fisher(self._ops.load(panel), total)
        return self._factor(total, grads.shape[0], damp)

    def _factor(self, matrix: Any, samples: int, damp: float) -> Any:
        try:
            return self._ops.factor(matrix, samples * damp)
        except np.linalg.LinAlgError as error:
            raise np.linalg.LinAlgError(
                f"The Fisher of a block isn't positive definite with damp={damp:g}: its gradients are too large for "
                "that damp, or not finite. Give a larger damp."
            ) from error


def least(panel: np.ndarray, damp: float) -> np.ndarray:
    """`damp / F_jj`: no `1 - leverage` is below it, whatever rounding says, so scores stay positive."""
    ridge = panel.shape[0] * damp
    return ridge / (ridge + np.square(panel.astype(np.float64)).sum(0))
