"""One block of the inverse Fisher: the formulas, written once for every framework.

`F = damp I + (1/m) G^T G` for the (m, B) gradient samples `G` of a block. With `A = m damp I + G G^T`
the Woodbury identity gives `F^-1 = (I - G^T A^-1 G) / damp`, so that one Cholesky factor of the smaller of `A`
(dual, B > m) and `F` (primal, B <= m) serves everything. Sources: WoodFisher (arXiv 2004.14340), M-FAC
(arXiv 2107.03356); the joint update is Optimal Brain Surgeon for a set of weights.

Gram matrices, Cholesky factors and solves are float64; `G` and the product `L^-1 G` are float32.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Self

import numpy as np

from keras_woodfisher_backends.kernel import factors
from keras_woodfisher_backends.kernel.group_scores import GroupScores
from keras_woodfisher_backends.kernel.operators import Operators
from keras_woodfisher_backends.kernel.panels import PANEL, Panels, PanelWidth, Samples, block_bytes
from keras_woodfisher_backends.kernel.stacking import Stack, Stacking


class BlockKernel:
    """Diagonal of the inverse, weight updates and costs of groups, of single blocks and of stacks, on one device.

    Methods that work raise numpy.linalg.LinAlgError if the matrix isn't positive definite in float64, and MemoryError
    if the device has no room even for a narrow panel. What they return is float64. Their arguments:

    - `grads`: the samples of the block, (m, B) float32. They are left unchanged, and may be strided views.
    - `damp`: the ridge on the diagonal of the Fisher, positive.
    - `weights`: the weights of the block, (B,).
    - `keep`, `prune`: sets K and Q of them, (B,) bool.

    Vectors that come with a `Stack` of n blocks are (n, B). Methods that count bytes take the gradient `samples` (m),
    the `width` of the widest block (B), and as `group` the most weights that are scored together.

    Args:
        operators: The framework's operators, bound to the device.
        panel: Columns of `G` to hold on the device at a time.
        lanes: How many threads should call it at the same time, each for blocks of its own.
        on_host: Whether its lanes share the cores of the host, and their BLAS threads.
        stacking: How several blocks of one width are computed at once; None: one after the other.

    Attributes:
        operators: As given.
        panels: What a block is cut by.
    """

    def __init__(
        self,
        operators: Operators,
        panel: int = PANEL,
        lanes: int = 1,
        on_host: bool = False,
        stacking: Stacking | None = None,
    ):
        self.operators = operators
        self.panels = Panels(operators, PanelWidth(panel), lanes, on_host)
        self._stacking = stacking

    @property
    def lanes(self) -> int:
        """How many threads should call it at the same time."""
        return self.panels.lanes

    @property
    def on_host(self) -> bool:
        """Whether its lanes share the cores of the host."""
        return self.panels.on_host

    def with_lanes(self, lanes: int) -> Self:
        """The kernel for so many threads. Where memory is so scarce that it is one, blocks aren't stacked."""
        return self._with(replace(self.panels, lanes=lanes))

    def sharing(self) -> Self:
        """The kernel for a single thread: it deals the panels of a block out to all lanes, by threads of its own."""
        return self._with(replace(self.panels, shared=True))

    def _with(self, panels: Panels) -> Self:
        kernel = copy(self)
        kernel.panels = panels
        return kernel

    def together(self, samples: int, width: int) -> int:
        """How many blocks should be given at a time."""
        if self._stacking is None or self.lanes == 1 or width > self.panels.width:
            return 1
        return self._stacking.number(samples, width)

    def memory(self, samples: int, width: int, group: int = 1, blocks: int | None = None) -> int:
        """Bytes that a lane takes at most, beside the gradients; `blocks` is how many there are, if it is known."""
        single = block_bytes(samples, width, group, self.panels.width)
        if self._stacking is None or self.lanes == 1 or blocks == 1:
            return single
        return max(single, self._stacking.memory(samples, width, blocks))

    def staged(self, samples: int, width: int, columns: int) -> int:
        """Bytes of samples on their way to the device, which are contiguous copies on the host.

        `columns` are the weights of all blocks that may be taken together.
        """
        single = 4 * samples * min(width, self.panels.width)
        return single if self._stacking is None else max(single, self._stacking.staged(samples, columns))

    def fit(self, samples: int, width: int, free: int, group: int = 1) -> None:
        """Makes panels as narrow, and stacks as small, as it takes for one lane to use `free` bytes of the device."""
        if self._stacking is not None:
            self._stacking.fit(free)
        self.panels.columns.fit(lambda panel: block_bytes(samples, width, group, panel) <= free)

    def gram(self, grads: Samples, keep: np.ndarray) -> np.ndarray:
        """`G_K G_K^T`, (m, m), for a set that isn't empty."""
        lower = self.panels.within_memory(lambda: self.operators.host(factors.gram(self.panels, grads, keep)))
        size = grads.shape[0]
        lower = np.tril(lower[:size, :size])
        return lower + np.tril(lower, -1).T

    def combine(self, grads: Samples, coefficients: np.ndarray) -> np.ndarray:
        """`G u`, (m,) or (m, k), for coefficients `u` (B,) or (B, k)."""
        return self.panels.within_memory(lambda: factors.combine(self.panels, grads, coefficients))

    def project(self, grads: Samples, keep: np.ndarray, dual: np.ndarray, out: np.ndarray) -> None:
        """Writes `(G_K^T x)^T`, computed in float64, into `out`, (B,) or (k, B); `x` is `dual`, (m,) or (m, k)."""
        self.panels.within_memory(lambda: factors.project(self.panels, grads, keep, dual, out))

    def group_costs(
        self, grads: Samples, damp: float, weights: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What removing each group costs, `1/2 w_S^T ([F^-1]_SS)^-1 w_S`.

        `labels` (B,) int says the group of each weight, -1 where it has none. Returns the labels that occur, ascending
        (n,), and their costs (n,).
        """
        scores = GroupScores(self.panels, grads, damp, weights.astype(np.float64))
        return self.panels.within_memory(lambda: scores.costs(labels))

    def cheapest_sets(
        self, grads: Samples, damp: float, weights: np.ndarray, members: np.ndarray, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each group the sets of 1, 2, ..., `most` of its weights that cost least together.

        `members` (n, M) int are the columns of each group, -1 where a weight was pruned earlier. Returns costs
        (n, most), infinite where a group has fewer weights, and the sets (n, most, M) bool. See
        `removal_sets.cheapest_sets` for which sets are compared.
        """
        scores = GroupScores(self.panels, grads, damp, weights)
        return self.panels.within_memory(lambda: scores.cheapest_sets(members, most))

    def inverse_diagonal(self, grads: Samples, damp: float) -> np.ndarray:
        """`diag(F^-1)`, (B,)."""
        return self.panels.within_memory(lambda: factors.inverse_diagonal(self.panels, grads, damp))

    def joint_update(self, grads: Samples, damp: float, weights: np.ndarray, prune: np.ndarray) -> np.ndarray:
        """The change (B,) of the kept weights that is optimal for the whole set that is pruned; zero on that set.

        Minimises `1/2 delta^T F delta` with `delta_Q = -w_Q`:
        `delta_K = G_K^T (m damp I + G_K G_K^T)^-1 G_Q w_Q`.
        """
        removed = np.where(prune, weights, 0.0).astype(np.float64)
        return self.panels.within_memory(lambda: factors.response(self.panels, grads, damp, ~prune, removed))

    def independent_update(
        self, grads: Samples, damp: float, weights: np.ndarray, prune: np.ndarray, diagonal: np.ndarray
    ) -> np.ndarray:
        """The sum (B,) of the changes that are optimal for each pruned weight by itself; zero on the pruned weights.

        `delta = F^-1 (-w_Q / diag(F^-1)_Q)` on the kept weights (WoodFisher, M-FAC), in push-through
        form `(1/damp) G_K^T A^-1 G_Q (w_Q / diag_Q)`, which doesn't cancel; `diagonal` is `diag(F^-1)`.
        """
        scaled = np.where(prune, weights / diagonal, 0.0)
        everything = np.ones(prune.shape, bool)
        response = self.panels.within_memory(lambda: factors.response(self.panels, grads, damp, everything, scaled))
        return np.where(prune, 0.0, response / damp)

    def inverse_diagonals(self, stack: Stack, damp: float) -> list[np.ndarray]:
        """`inverse_diagonal` of each block."""
        return self._by_stacks(
            stack,
            np.ones(len(stack), bool),
            lambda place: self.inverse_diagonal(stack[place], damp),
            lambda stacking, places: stacking.inverse_diagonals(stack, places, damp),
        )

    def joint_updates(self, stack: Stack, damp: float, weights: np.ndarray, prune: np.ndarray) -> list[np.ndarray]:
        """`joint_update` of each block."""
        keep = ~prune
        removed = np.where(prune, weights, 0.0).astype(np.float64)
        return self._by_stacks(
            stack,
            # With fewer weights than samples left the other matrix is the smaller one.
            np.count_nonzero(keep, axis=1) > stack.samples,
            lambda place: self.joint_update(stack[place], damp, weights[place], prune[place]),
            lambda stacking, places: stacking.responses(stack, places, damp, removed[places], keep[places]),
        )

    def independent_updates(
        self, stack: Stack, damp: float, weights: np.ndarray, prune: np.ndarray, diagonal: np.ndarray
    ) -> list[np.ndarray]:
        """`independent_update` of each block."""
        scaled = np.where(prune, weights / diagonal, 0.0)

        def many(stacking: Stacking, places: Sequence[int]) -> np.ndarray:
            return np.where(prune[places], 0.0, stacking.responses(stack, places, damp, scaled[places]) / damp)

        return self._by_stacks(
            stack,
            np.full(len(stack), stack.width > stack.samples),
            lambda place: self.independent_update(stack[place], damp, weights[place], prune[place], diagonal[place]),
            many,
        )

    def _by_stacks(
        self,
        stack: Stack,
        stackable: np.ndarray,
        one: Callable[[int], np.ndarray],
        many: Callable[[Stacking, Sequence[int]], np.ndarray],
    ) -> list[np.ndarray]:
        """Gives blocks that may be stacked to `many`, as many at a time as fit, and others to `one`."""
        out: dict[int, np.ndarray] = {}
        left: list[int] = np.flatnonzero(stackable).tolist()
        stacking = self._stacking
        while stacking and len(places := left[: self.together(stack.samples, stack.width)]) > 1:
            found = stacking.attempt(partial(many, stacking, places), len(places), stack)
            if found is not None:
                out.update(zip(places, found, strict=True))
                left = left[len(places) :]
        return [out[place] if place in out else one(place) for place in range(len(stack))]
