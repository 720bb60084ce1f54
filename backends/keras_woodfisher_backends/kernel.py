"""One block of the inverse Fisher: the formulas, written once for every framework.

`F = damp I + (1/m) G^T G` for the (m, B) gradient samples `G` of a block. With `A = m damp I + G G^T`
the Woodbury identity gives `F^-1 = (I - G^T A^-1 G) / damp`, so that one Cholesky factor of the smaller of `A`
(dual, B > m) and `F` (primal, B <= m) serves everything. Sources: WoodFisher (arXiv 2004.14340), M-FAC
(arXiv 2107.03356); the joint update is Optimal Brain Surgeon for a set of weights.

Gram matrices, Cholesky factors and solves are float64; `G` and the product `L^-1 G` are float32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

PANEL = 8192
"""Columns of `G` that are worked on at a time: it bounds the memory when one block spans everything."""

RISKY_LEVERAGE = 0.95
"""Above this, `1 - leverage` would lose digits in float32, and the column is done again in float64."""

RISKY_ERROR = 1e-6
"""Where rounding in float32 may move `1 - leverage` by more than this, relatively, the same is done."""


class Operators(Protocol):
    """The few operators that a framework provides. Device arrays are opaque to the kernel."""

    def scope(self) -> AbstractContextManager[Any]:
        """Entered around each call of the kernel: device placement and precision."""
        ...

    def load(self, panel: np.ndarray) -> Any:
        """A float32 panel (m, c) on the device. Zero columns may be added on the right."""
        ...

    def gram(self, panel: Any) -> Any:
        """`P P^T` (m, m) in float64; what is above the diagonal may be missing."""
        ...

    def fisher(self, panel: Any) -> Any:
        """`P^T P` (c, c) in float64."""
        ...

    def factor(self, matrix: Any, ridge: float) -> Any:
        """The lower Cholesky factor of `matrix + ridge I`. May overwrite `matrix`.

        Raises:
            numpy.linalg.LinAlgError: If that isn't positive definite and finite.
        """
        ...

    def leverage(self, factor: Any) -> Any:
        """A function panel -> (leverage, spread), float32 products, as NumPy float64.

        The leverage is the column sums of `(L^-1 P)^2`. The spread is `c @ P^2` with the column sums `c` of
        `(L^-1)^2`: float32 rounding moves a column of `L^-1 P` by about `eps sqrt(spread)`, which is far more than
        its own size tells if `L^-1` is large and most of it cancels (samples that are nearly equal).
        """
        ...

    def leverage_float64(self, factor: Any, panel: Any) -> np.ndarray:
        """The same, all in float64."""
        ...

    def inverse_diagonal(self, factor: Any) -> np.ndarray:
        """The diagonal of `(L L^T)^-1`, as NumPy float64."""
        ...

    def solve(self, factor: Any, right: np.ndarray) -> np.ndarray:
        """`(L L^T)^-1 right` in float64. `right` may be shorter than L: the rest is zero."""
        ...

    def combine(self, panel: Any, coefficients: np.ndarray) -> np.ndarray:
        """`P u` (m,) in float64."""
        ...

    def project(self, panel: Any, dual: np.ndarray) -> np.ndarray:
        """`P^T x` (c,) in float64."""
        ...


class BlockKernel:
    """Diagonal of the inverse and weight updates of one block, on one device.

    Args:
        operators: The framework's operators, bound to the device.
        panel: Columns of `G` to hold on the device at a time.
        workers: See the attribute.

    Attributes:
        workers: How many threads may call it at the same time, each for a block of its own. Above 1 the work is the
            host's, and is done faster that way than with several threads for one block.
    """

    def __init__(self, operators: Operators, panel: int = PANEL, workers: int = 1):
        self._ops = operators
        self._panel = panel
        self.workers = workers

    def memory(self, samples: int, width: int) -> int:
        """Bytes that one block of (m, B) = (`samples`, `width`) takes at most, beside the gradients of the block."""
        matrix = 8 * min(samples, width) ** 2
        panel = 8 * samples * min(width, self._panel)
        # Double panel, product of the panel, and Fisher or Gram matrix, factor, its inverse and a copy.
        return panel + panel // 2 + 4 * matrix

    def inverse_diagonal(self, grads: np.ndarray, damp: float) -> np.ndarray:
        """`diag(F^-1)`.

        Args:
            grads: Float32 samples of the block, (m, B); may be a strided view. Left unchanged.
            damp: Ridge on the diagonal of the Fisher, positive.

        Returns:
            (B,) float64.

        Raises:
            numpy.linalg.LinAlgError: If the matrix isn't positive definite in float64.
        """
        m, width = grads.shape
        ops = self._ops
        with ops.scope():
            if width <= m:
                fisher = ops.fisher(ops.load(grads))
                return ops.inverse_diagonal(self._factor(fisher, m, damp))[:width] * m
            factor = self._dual_factor(grads, damp, None)
            leverage = ops.leverage(factor)
            out = np.empty(width)
            for part in self._parts(width):
                panel = grads[:, part]
                sums, spread = (array[: panel.shape[1]] for array in leverage(ops.load(panel)))
                rest = 1.0 - sums
                error = 2.0 * np.finfo(np.float32).eps * np.sqrt(sums * spread)
                risky = np.flatnonzero(~((sums <= RISKY_LEVERAGE) & (error <= RISKY_ERROR * rest)))
                if risky.size:
                    again = ops.leverage_float64(factor, ops.load(panel[:, risky]))[: risky.size]
                    rest[risky] = np.maximum(1.0 - again, self._least(panel[:, risky], damp))
                out[part] = rest / damp
            return out

    @staticmethod
    def _least(panel: np.ndarray, damp: float) -> np.ndarray:
        """`damp / F_jj`: no `1 - leverage` is below it, whatever rounding says, so scores stay positive."""
        ridge = panel.shape[0] * damp
        return ridge / (ridge + np.square(panel.astype(np.float64)).sum(0))

    def joint_update(self, grads: np.ndarray, damp: float, weights: np.ndarray, prune: np.ndarray) -> np.ndarray:
        """The change of the kept weights that is optimal for the whole set that is pruned.

        Minimises `1/2 delta^T F delta` with `delta_Q = -w_Q`:
        `delta_K = G_K^T (m damp I + G_K G_K^T)^-1 G_Q w_Q`.

        Args:
            grads: (m, B) float32.
            damp: Ridge on the diagonal of the Fisher.
            weights: (B,) weights of the block.
            prune: (B,) bool, the set Q.

        Returns:
            (B,) float64, zero on the pruned weights.
        """
        keep = ~prune
        with self._ops.scope():
            source = self._combine(grads, np.where(prune, weights, 0.0).astype(np.float64))
            return self._respond(grads, damp, keep, source)

    def independent_update(
        self,
        grads: np.ndarray,
        damp: float,
        weights: np.ndarray,
        prune: np.ndarray,
        diagonal: np.ndarray,
    ) -> np.ndarray:
        """The sum of the changes that are optimal for each pruned weight by itself.

        `delta = F^-1 (-w_Q / diag(F^-1)_Q)` on the kept weights (WoodFisher, M-FAC), in push-through
        form `(1/damp) G_K^T A^-1 G_Q (w_Q / diag_Q)`, which doesn't cancel.

        Args:
            grads: (m, B) float32.
            damp: Ridge on the diagonal of the Fisher.
            weights: (B,) weights of the block.
            prune: (B,) bool, the set Q.
            diagonal: (B,) `diag(F^-1)` as returned by `inverse_diagonal`.

        Returns:
            (B,) float64, zero on the pruned weights.
        """
        with self._ops.scope():
            scaled = np.where(prune, weights / diagonal, 0.0)
            source = self._combine(grads, scaled)
            everything = np.ones(prune.shape, bool)
            delta = self._respond(grads, damp, everything, source) / damp
        delta[prune] = 0.0
        return delta

    def _respond(self, grads: np.ndarray, damp: float, keep: np.ndarray, source: np.ndarray) -> np.ndarray:
        """`G_K^T (m damp I + G_K G_K^T)^-1 source`, by the smaller of the two matrices."""
        ops, m = self._ops, grads.shape[0]
        out = np.zeros(keep.size)
        kept = int(np.count_nonzero(keep))
        if kept == 0:
            return out
        if kept <= m:
            panel = ops.load(grads if kept == keep.size else grads[:, keep])
            factor = self._factor(ops.fisher(panel), m, damp)
            out[keep] = ops.solve(factor, ops.project(panel, source)[:kept])[:kept]
            return out
        dual = ops.solve(self._dual_factor(grads, damp, keep), source)
        for part in self._parts(keep.size):
            chosen = keep[part]
            panel = self._select(grads[:, part], chosen)
            if panel.shape[1]:
                here = out[part]
                here[chosen] = ops.project(ops.load(panel), dual)[: panel.shape[1]]
        return out

    def _dual_factor(self, grads: np.ndarray, damp: float, keep: np.ndarray | None) -> Any:
        gram = None
        for part in self._parts(grads.shape[1]):
            panel = grads[:, part]
            if keep is not None:
                panel = self._select(panel, keep[part])
            if panel.shape[1]:
                product = self._ops.gram(self._ops.load(panel))
                gram = product if gram is None else gram + product
        return self._factor(gram, grads.shape[0], damp)

    def _factor(self, matrix: Any, samples: int, damp: float) -> Any:
        try:
            return self._ops.factor(matrix, samples * damp)
        except np.linalg.LinAlgError as error:
            raise np.linalg.LinAlgError(
                f"The Fisher of a block isn't positive definite with damp={damp:g}: its gradients are too large for "
                "that damp, or not finite. Give a larger damp."
            ) from error

    def _combine(self, grads: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        total = np.zeros(grads.shape[0])
        for part in self._parts(grads.shape[1]):
            used = coefficients[part] != 0
            if used.any():
                panel = self._select(grads[:, part], used)
                total += self._ops.combine(self._ops.load(panel), coefficients[part][used])
        return total

    @staticmethod
    def _select(panel: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return panel if columns.all() else panel[:, columns]

    def _parts(self, width: int) -> Iterator[slice]:
        for start in range(0, width, self._panel):
            yield slice(start, min(start + self._panel, width))
