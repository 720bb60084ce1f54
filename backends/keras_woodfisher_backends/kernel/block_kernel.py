"""One block of the inverse Fisher: the formulas, written once for every framework.

`F = damp I + (1/m) G^T G` for the (m, B) gradient samples `G` of a block. With `A = m damp I + G G^T`
the Woodbury identity gives `F^-1 = (I - G^T A^-1 G) / damp`, so that one Cholesky factor of the smaller of `A`
(dual, B > m) and `F` (primal, B <= m) serves everything. Sources: WoodFisher (arXiv 2004.14340), M-FAC
(arXiv 2107.03356); the joint update is Optimal Brain Surgeon for a set of weights.

Gram matrices, Cholesky factors and solves are float64; `G` and the product `L^-1 G` are float32.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_woodfisher_backends.kernel.group_scores import GroupScores
from keras_woodfisher_backends.kernel.operators import Operators
from keras_woodfisher_backends.kernel.panels import Samples, least

RISKY_LEVERAGE = 0.95
"""Above this, `1 - leverage` would lose digits in float32, and the column is done again in float64."""


RISKY_ERROR = 1e-6
"""Where rounding in float32 may move `1 - leverage` by more than this, relatively, the same is done."""


class Stack:
    """The samples of blocks of one width, read when they are asked for.

    Args:
        read: Gives the samples of some columns, (m, c) float32.
        blocks: Columns of each block; at least one.
        samples: m.
        joined: Whether neighbours may be read together: `read` copies nothing.
    """

    def __init__(self, read: Callable[[slice], Samples], blocks: Sequence[slice], samples: int, joined: bool = False):
        self._read = read
        self._blocks = blocks
        self._joined = joined
        self.samples = samples
        self.width = blocks[0].stop - blocks[0].start

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, place: int) -> Samples:
        return self._read(self._blocks[place])

    def parts(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """The samples of some blocks, one after the other: (m, B), or (m, k B) of k neighbours."""
        run: slice | None = None
        for place in places:
            block = self._blocks[place]
            if run is not None and self._joined and run.stop == block.start:
                run = slice(run.start, block.stop)
                continue
            if run is not None:
                yield self._read(run)[:, :]
            run = block
        if run is not None:
            yield self._read(run)[:, :]


class BlockKernel(GroupScores):
    """Diagonal of the inverse and weight updates of blocks, on one device; see `Panels` for its arguments."""

    def together(self, samples: int, width: int) -> int:
        """How many blocks should be given at a time."""
        return 1

    def inverse_diagonals(self, stack: Stack, damp: float, alone: bool = False) -> list[np.ndarray]:
        """`inverse_diagonal` of each block."""
        return [self.inverse_diagonal(stack[place], damp, alone) for place in range(len(stack))]

    def joint_updates(
        self, stack: Stack, damp: float, weights: np.ndarray, prune: np.ndarray, alone: bool = False
    ) -> list[np.ndarray]:
        """`joint_update` of each block; the vectors of all are (n, B)."""
        rows = zip(range(len(stack)), weights, prune, strict=True)
        return [self.joint_update(stack[place], damp, w, p, alone) for place, w, p in rows]

    def independent_updates(
        self,
        stack: Stack,
        damp: float,
        weights: np.ndarray,
        prune: np.ndarray,
        diagonal: np.ndarray,
        alone: bool = False,
    ) -> list[np.ndarray]:
        """`independent_update` of each block, in the same way."""
        rows = zip(range(len(stack)), weights, prune, diagonal, strict=True)
        return [self.independent_update(stack[place], damp, w, p, d, alone) for place, w, p, d in rows]

    def inverse_diagonal(self, grads: Samples, damp: float, alone: bool = False) -> np.ndarray:
        """`diag(F^-1)`.

        Args:
            grads: Float32 samples of the block, (m, B); may be a strided view. Left unchanged.
            damp: Ridge on the diagonal of the Fisher, positive.
            alone: No other block is worked on meanwhile: the panels are shared among all lanes.

        Returns:
            (B,) float64.

        Raises:
            numpy.linalg.LinAlgError: If the matrix isn't positive definite in float64.
            MemoryError: If the device has no room even for a narrow panel.
        """
        return self._within_memory(lambda: self._inverse_diagonal(grads, damp, alone))

    def joint_update(
        self, grads: Samples, damp: float, weights: np.ndarray, prune: np.ndarray, alone: bool = False
    ) -> np.ndarray:
        """The change of the kept weights that is optimal for the whole set that is pruned.

        Minimises `1/2 delta^T F delta` with `delta_Q = -w_Q`:
        `delta_K = G_K^T (m damp I + G_K G_K^T)^-1 G_Q w_Q`.

        Args:
            grads: (m, B) float32.
            damp: Ridge on the diagonal of the Fisher.
            weights: (B,) weights of the block.
            prune: (B,) bool, the set Q.
            alone: As in `inverse_diagonal`.

        Returns:
            (B,) float64, zero on the pruned weights.
        """
        removed = np.where(prune, weights, 0.0).astype(np.float64)
        return self._within_memory(lambda: self._respond(grads, damp, ~prune, removed, alone))

    def independent_update(
        self,
        grads: Samples,
        damp: float,
        weights: np.ndarray,
        prune: np.ndarray,
        diagonal: np.ndarray,
        alone: bool = False,
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
            alone: As in `inverse_diagonal`.

        Returns:
            (B,) float64, zero on the pruned weights.
        """
        scaled = np.where(prune, weights / diagonal, 0.0)
        everything = np.ones(prune.shape, bool)
        delta = self._within_memory(lambda: self._respond(grads, damp, everything, scaled, alone)) / damp
        delta[prune] = 0.0
        return delta

    def _inverse_diagonal(self, grads: Samples, damp: float, alone: bool) -> np.ndarray:
        m, width = grads.shape
        ops = self._ops
        if width <= m:
            return ops.inverse_diagonal(self._primal_factor(grads, damp, None))[:width] * m
        out = np.empty(width)
        factor = self._dual_factor(grads, damp, None, alone)
        leverage = ops.leverage(factor)

        def work(part: slice, lane: int = 0) -> None:
            panel = grads[:, part]
            sums, spread = (array[None, : panel.shape[1]] for array in leverage(ops.load(panel)))
            out[part] = rest_of(ops, lambda place: factor, [panel], (sums, spread), damp)[0] / damp

        self._each(work, width, alone)
        return out

    def _respond(self, grads: Samples, damp: float, keep: np.ndarray, removed: np.ndarray, alone: bool) -> np.ndarray:
        """`G_K^T (m damp I + G_K G_K^T)^-1 G r`, by the smaller of the two matrices."""
        ops, m = self._ops, grads.shape[0]
        out = np.zeros(keep.size)
        kept = int(np.count_nonzero(keep))
        if kept == 0:
            return out
        source = self._combine(grads, removed)
        if kept <= m:
            factor = self._primal_factor(grads, damp, keep)
            self._project(grads, keep, source, out)
            out[keep] = ops.solve(factor, out[keep])[:kept]
            return out
        dual = ops.solve(self._dual_factor(grads, damp, keep, alone), source)
        self._project(grads, keep, dual, out)
        return out


def rest_of(
    ops: Operators,
    factor: Callable[[int], Any],
    panels: Sequence[np.ndarray] | np.ndarray,
    leverage: tuple[np.ndarray, np.ndarray],
    damp: float,
) -> np.ndarray:
    """`1 - leverage` of each column of n panels, by a second look in float64 where float32 isn't enough.

    Args:
        ops: Of the device.
        factor: Gives the factor of the block that a panel is of.
        panels: n times (m, c).
        leverage: What float32 gave, and the spread (see `Operators.leverage`), both (n, c).
        damp: Ridge on the diagonal of the Fisher.

    Returns:
        (n, c) float64.
    """
    sums, spread = leverage
    rest: np.ndarray = 1.0 - sums
    error = 2.0 * np.finfo(np.float32).eps * np.sqrt(sums * spread)
    risky = ~((sums <= RISKY_LEVERAGE) & (error <= RISKY_ERROR * rest))
    for place in np.flatnonzero(risky.any(axis=1)).tolist():
        chosen = np.flatnonzero(risky[place])
        columns = np.take(panels[place], chosen, axis=1)
        again = ops.leverage_float64(factor(place), ops.load(columns))[: chosen.size]
        rest[place, chosen] = np.maximum(1.0 - again, least(columns, damp))
    return rest
