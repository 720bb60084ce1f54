"""What it costs to remove groups of weights of one block together: Optimal Brain Surgeon for groups.

The least `1/2 delta^T F delta` with `delta_S = -w_S` is `1/2 w_S^T ([F^-1]_SS)^-1 w_S`, which is the sum of the single
scores `w_j^2 / (2 [F^-1]_jj)` only where `[F^-1]_SS` is diagonal. As in `kernel`, the smaller of two matrices serves:

- up to m weights: `damp [F^-1]_SS = I - Z_S^T Z_S` with `Z = L^-1 G` and `m damp I + G G^T = L L^T`, all in float64;
- more of them: `damp / 2 (|w_S|^2 + u^T A_K^-1 u)` with `u = G_S w_S` and `A_K = m damp I + G_K G_K^T`, from
  `F_SS - F_SK F_KK^-1 F_KS = damp (I + G_S^T A_K^-1 G_S)`. Nothing cancels there, so it also serves where
  `I - Z_S^T Z_S` would have lost its digits.
"""

from typing import Any

import numpy as np

from keras_woodfisher_backends.kernel.panels import Factors, Samples, least
from keras_woodfisher_backends.kernel.removal_sets import cheapest_sets

RISKY_PIVOT = 1e-8
"""Below this, a pivot of `I - Z_S^T Z_S` has lost half of its digits to rounding."""


class GroupScores(Factors):
    """Costs of groups of one block, on one device; see `Panels` for its arguments."""

    def group_costs(
        self, grads: Samples, damp: float, weights: np.ndarray, labels: np.ndarray, alone: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """What removing each group costs, `1/2 w_S^T ([F^-1]_SS)^-1 w_S`.

        Args:
            grads: (m, B) float32.
            damp: Ridge on the diagonal of the Fisher.
            weights: (B,) weights of the block.
            labels: (B,) int, the group of each weight; -1 where it has none.
            alone: No other block is worked on meanwhile: the panels are shared among all lanes.

        Returns:
            The labels that occur, ascending (n,), and their costs (n,) float64.

        Raises:
            numpy.linalg.LinAlgError: If the matrix isn't positive definite in float64.
            MemoryError: If the device has no room even for a narrow panel.
        """
        order = np.argsort(labels, kind="stable")[int((labels < 0).sum()) :]
        found, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
        if not found.size:
            return found, np.zeros(0)
        groups = _Groups(order, starts, sizes)
        weights = weights.astype(np.float64)
        return found, self._within_memory(lambda: self._group_costs(grads, damp, weights, groups, alone))

    def cheapest_sets(
        self,
        grads: Samples,
        damp: float,
        weights: np.ndarray,
        members: np.ndarray,
        most: int,
        alone: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each group the sets of 1, 2, ... of its weights that cost least together.

        Args:
            grads: (m, B) float32.
            damp: Ridge on the diagonal of the Fisher.
            weights: (B,) weights of the block.
            members: (n, M) int, the columns of each group; -1 where a weight was pruned earlier.
            most: The largest number of weights to remove of a group.
            alone: As in `group_costs`.

        Returns:
            Costs (n, most) float64, infinite where a group has fewer weights, and the sets (n, most, M) bool. See
            `removal_sets.cheapest_sets` for which sets are compared.
        """
        return self._within_memory(lambda: self._cheapest_sets(grads, damp, weights, members, most, alone))

    def _group_costs(
        self, grads: Samples, damp: float, weights: np.ndarray, groups: "_Groups", alone: bool
    ) -> np.ndarray:
        m, width = grads.shape
        costs = np.full(len(groups.sizes), np.nan)
        # Alike in size, so that little is padded.
        small = np.flatnonzero(groups.sizes <= m)
        small = small[np.argsort(groups.sizes[small], kind="stable")]
        if small.size:
            factor = self._small_factor(grads, damp, alone)
            chunks = self._chunks(groups.sizes[small])

            def work(part: slice, lane: int = 0) -> None:
                members = groups.members(small[part])
                inverse = self._inverse_blocks(factor, grads, damp, members)
                costs[small[part]] = _costs(inverse, np.where(members >= 0, weights[members], 0.0))

            self._share(work, chunks, alone)
        # Large groups, and those that lost too many digits.
        left = np.flatnonzero(np.isnan(costs))
        # The sum over the others is the more accurate one, but with many groups in a wide block it takes too long.
        subtract = (groups.sizes > m) & (width > self._widest)
        gram = self._gram(grads, None, alone) if subtract[left].any() else None

        def rest(group: int, lane: int = 0) -> None:
            whole = gram if subtract[group] else None
            costs[group] = self._cost_by_samples(grads, damp, weights, groups.columns(group), whole)

        self._share(rest, left.tolist(), alone)
        return 0.5 * damp * costs

    def _cost_by_samples(
        self, grads: Samples, damp: float, weights: np.ndarray, columns: np.ndarray, gram: Any
    ) -> float:
        """`|w_S|^2 + u^T A_K^-1 u`; `A_K` from `gram` of the whole block by subtraction, where that is given."""
        m, width = grads.shape
        removed = weights[columns]
        plain = float(removed @ removed)
        source, square = np.zeros(m), None
        for part in self._parts(len(columns)):
            here = columns[part]
            panel = np.empty((m, len(here)), np.float32)
            self._gather(grads, here, panel, np.arange(len(here)))
            loaded = self._ops.load(panel)
            source += self._ops.combine(loaded, removed[part])[:m]
            if gram is not None:
                square = self._ops.gram(loaded, square)
        if len(columns) == width:
            return plain + float(source @ source) / (m * damp)
        if gram is None:
            keep = np.ones(width, bool)
            keep[columns] = False
            factor = self._dual_factor(grads, damp, keep, alone=False)
        else:
            factor = self._factor(self._ops.minus(gram, square), m, damp)
        return plain + float(source @ self._ops.solve(factor, source)[:m])

    def _cheapest_sets(
        self, grads: Samples, damp: float, weights: np.ndarray, members: np.ndarray, most: int, alone: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        number, size = members.shape
        costs, sets = np.empty((number, most)), np.empty((number, most, size), bool)
        factor = self._small_factor(grads, damp, alone)
        bounds = self._leasts(grads, damp)

        def work(part: slice, lane: int = 0) -> None:
            here = members[part]
            there = here >= 0
            inverse = self._inverse_blocks(factor, grads, damp, here)
            values = np.where(there, weights[here], 0.0)
            lowest = np.where(there, bounds[here], 1.0)
            costs[part], sets[part] = cheapest_sets(inverse, lowest, values, there, most)

        self._share(work, self._chunks(np.full(number, size)), alone)
        return 0.5 * damp * costs, sets

    def _small_factor(self, grads: Samples, damp: float, alone: bool) -> Any:
        m, width = grads.shape
        return self._primal_factor(grads, damp, None) if width <= m else self._dual_factor(grads, damp, None, alone)

    def _inverse_blocks(self, factor: Any, grads: Samples, damp: float, members: np.ndarray) -> np.ndarray:
        """`damp [F^-1]_SS` of each group, (n, g, g) float64; that of the identity where `members` is -1."""
        m, width = grads.shape
        there = members >= 0
        places, columns = np.flatnonzero(there), members[there]
        primal = width <= m
        panel = np.zeros((min(m, width), members.size), np.float32)
        if primal:
            panel[columns, places] = 1.0
        else:
            self._gather(grads, columns, panel, places)
        blocks = self._ops.group_gram(factor, panel.reshape(-1, *members.shape))
        blocks *= m * damp if primal else -1.0
        diagonal = np.arange(members.shape[1])
        blocks[:, diagonal, diagonal] += ~there if primal else 1.0
        return blocks

    def _gather(self, grads: Samples, columns: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """`out[:, places] = grads[:, columns]`, of only those panels that hold any."""
        if isinstance(grads, np.ndarray):
            out[:, places] = np.take(grads, columns, axis=1)
            return
        step = self._panel
        panels = columns // step
        for panel in np.unique(panels).tolist():
            here = panels == panel
            part = slice(panel * step, min((panel + 1) * step, grads.shape[1]))
            out[:, places[here]] = np.take(grads[:, part], columns[here] - part.start, axis=1)

    def _leasts(self, grads: Samples, damp: float) -> np.ndarray:
        """`least` of every weight, (B,)."""
        return np.concatenate([least(grads[:, part], damp) for part in self._parts(grads.shape[1])])

    def _chunks(self, sizes: np.ndarray) -> list[slice]:
        """Runs of groups that fill half a panel, given their ascending sizes: there are several copies of it."""
        chunks, start = [], 0
        for stop in range(1, len(sizes) + 1):
            if stop == len(sizes) or (stop + 1 - start) * int(sizes[stop]) > self._panel // 2:
                chunks.append(slice(start, stop))
                start = stop
        return chunks


class _Groups:
    """Groups of columns: those of group i are `order[starts[i] : starts[i] + sizes[i]]`."""

    def __init__(self, order: np.ndarray, starts: np.ndarray, sizes: np.ndarray):
        self._order = order
        self._starts = starts
        self.sizes = sizes

    def columns(self, group: int) -> np.ndarray:
        return self._order[self._starts[group] : self._starts[group] + self.sizes[group]]

    def members(self, chosen: np.ndarray) -> np.ndarray:
        """The columns of each chosen group, (n, largest size), filled up with -1."""
        steps = np.arange(int(self.sizes[chosen].max()))
        there = steps < self.sizes[chosen, None]
        places = np.where(there, self._starts[chosen, None] + steps, 0)
        return np.where(there, self._order[places], -1)


def _costs(inverse: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`w^T M^-1 w` of each group; NaN where rounding may have spoilt M."""
    try:
        factor = np.linalg.cholesky(inverse)
    except np.linalg.LinAlgError:
        if len(inverse) == 1:
            return np.full(1, np.nan)
        half = len(inverse) // 2
        return np.concatenate([_costs(inverse[:half], weights[:half]), _costs(inverse[half:], weights[half:])])
    pivots = np.square(np.diagonal(factor, axis1=1, axis2=2)).min(1)
    solved = np.linalg.solve(factor, weights[..., None])[..., 0]
    return np.where(pivots < RISKY_PIVOT, np.nan, np.square(solved).sum(1))
