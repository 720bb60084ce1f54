"""The published way to the inverse Fisher: gradients are added one at a time (M-FAC, arXiv 2107.03356, algorithm 1).

Written as well as NumPy allows: float32, in place, two matrix-vector products a gradient. It stands here to be
compared with, and is checked against the dense inverse by whoever times it.
"""

import numpy as np
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import NumpyOperators


class RankOneRecurrence(BlockKernel):
    """`diag(F^-1)` by Sherman-Morrison, `v_k = F_{k-1}^-1 g_k` kept for each gradient: O(m^2 B) time, O(m B) memory."""

    def __init__(self, lanes: int = 1):
        super().__init__(NumpyOperators(), lanes=lanes, on_host=True)

    def inverse_diagonal(self, grads: np.ndarray, damp: float) -> np.ndarray:
        """(B,) float64; `grads` (m, B) float32."""
        m, width = grads.shape
        v = np.empty((m, width), np.float32)
        weight = np.empty(m, np.float32)
        diagonal = np.full(width, 1.0 / damp, np.float32)
        scratch = np.empty(width, np.float32)
        for k in range(m):
            row = np.divide(grads[k], np.float32(damp), out=v[k])
            if k:
                coefficients = v[:k] @ grads[k]
                coefficients *= weight[:k]
                row -= np.matmul(coefficients, v[:k], out=scratch)
            weight[k] = 1.0 / (m + grads[k] @ row)
            np.multiply(row, row, out=scratch)
            scratch *= weight[k]
            diagonal -= scratch
        return diagonal.astype(np.float64)
