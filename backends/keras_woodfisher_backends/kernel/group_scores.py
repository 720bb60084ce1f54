"""What it costs to remove groups of weights of one block together: Optimal Brain Surgeon for groups.

The least `1/2 delta^T F delta` with `delta_S = -w_S` is `1/2 w_S^T ([F^-1]_SS)^-1 w_S`, which is the sum of the single
scores `w_j^2 / (2 [F^-1]_jj)` only where `[F^-1]_SS` is diagonal. As in `block_kernel`, the smaller of two matrices
serves:

- up to m weights: `damp [F^-1]_SS = I - Z_S^T Z_S` with `Z = L^-1 G` and `m damp I + G G^T = L L^T`, all in float64;
- more of them: `damp / 2 (|w_S|^2 + u^T A_K^-1 u)` with `u = G_S w_S` and `A_K = m damp I + G_K G_K^T`, from
  `F_SS - F_SK F_KK^-1 F_KS = damp (I + G_S^T A_K^-1 G_S)`. Nothing cancels there, so it also serves where
  `I - Z_S^T Z_S` would have lost its digits.
"""

from typing import Any

import numpy as np

from keras_woodfisher_backends.kernel.factors import cholesky, dual_factor, gram, lower_bounds, primal_factor
from keras_woodfisher_backends.kernel.panels import Panels, Samples
from keras_woodfisher_backends.kernel.removal_sets import cheapest_sets

RISKY_PIVOT = 1e-8
"""Below this, a pivot of `I - Z_S^T Z_S` has lost half of its digits to rounding."""


class GroupScores:
    """Costs of groups of one block.

    Args:
        panels: Cuts the block.
        grads: (m, B) float32.
        damp: Ridge on the diagonal of the Fisher.
        weights: (B,) float64 weights of the block.
    """

    def __init__(self, panels: Panels, grads: Samples, damp: float, weights: np.ndarray):
        self._panels = panels
        self._ops = panels.operators
        self._grads = grads
        self._damp = damp
        self._weights = weights
        self._samples, self._width = grads.shape
        self._primal = self._width <= self._samples

    def costs(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `BlockKernel.group_costs`."""
        order = np.argsort(labels, kind="stable")[int((labels < 0).sum()) :]
        found, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
        if not found.size:
            return found, np.zeros(0)
        return found, 0.5 * self._damp * self._quadratic_forms(_Groups(order, starts, sizes))

    def cheapest_sets(self, members: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """See `BlockKernel.cheapest_sets`."""
        number, size = members.shape
        costs, sets = np.empty((number, most)), np.empty((number, most, size), bool)
        factor = self._factor()
        parts = self._panels.parts(self._width)
        bounds = np.concatenate([lower_bounds(self._grads[:, part], self._damp) for part in parts])

        def work(part: slice, lane: int) -> None:
            here = members[part]
            there = here >= 0
            inverse = self._inverse_blocks(factor, here)
            values = np.where(there, self._weights[here], 0.0)
            lowest = np.where(there, bounds[here], 1.0)
            costs[part], sets[part] = cheapest_sets(inverse, lowest, values, there, most)

        self._panels.run(work, self._chunks(np.full(number, size)))
        return 0.5 * self._damp * costs, sets

    def _quadratic_forms(self, groups: "_Groups") -> np.ndarray:
        """`w_S^T (damp [F^-1]_SS)^-1 w_S` of each group."""
        out = np.full(len(groups.sizes), np.nan)
        # Alike in size, so that little is padded.
        small = np.flatnonzero(groups.sizes <= self._samples)
        small = small[np.argsort(groups.sizes[small], kind="stable")]
        if small.size:
            factor = self._factor()

            def work(part: slice, lane: int) -> None:
                members = groups.members(small[part])
                inverse = self._inverse_blocks(factor, members)
                out[small[part]] = _solved_forms(inverse, np.where(members >= 0, self._weights[members], 0.0))

            self._panels.run(work, self._chunks(groups.sizes[small]))
        # Large groups, and those that lost too many digits.
        left = np.flatnonzero(np.isnan(out))
        # The sum over the others is the more accurate one, but with many groups in a wide block it takes too long.
        subtract = (groups.sizes > self._samples) & (self._width > self._panels.columns.widest)
        whole = gram(self._panels, self._grads) if subtract[left].any() else None

        def rest(group: int, lane: int) -> None:
            out[group] = self._form_by_samples(groups.columns(group), whole if subtract[group] else None)

        self._panels.run(rest, left.tolist())
        return out

    def _form_by_samples(self, columns: np.ndarray, whole: Any) -> float:
        """`|w_S|^2 + u^T A_K^-1 u`; `A_K` by subtraction from the Gram matrix of the whole block, if it is given."""
        m, removed = self._samples, self._weights[columns]
        squares = float(removed @ removed)
        source, square = np.zeros(m), None
        for part in self._panels.parts(len(columns)):
            here = columns[part]
            panel = np.empty((m, len(here)), np.float32)
            self._gather(here, panel, np.arange(len(here)))
            loaded = self._ops.load(panel)
            source += self._ops.combine(loaded, removed[part])[:m]
            if whole is not None:
                square = self._ops.gram(loaded, square)
        if len(columns) == self._width:
            return squares + float(source @ source) / (m * self._damp)
        if whole is None:
            keep = np.ones(self._width, bool)
            keep[columns] = False
            # Groups are shared among the lanes already.
            factor = dual_factor(self._panels.in_this_thread, self._grads, self._damp, keep)
        else:
            factor = cholesky(self._ops, self._ops.minus(whole, square), m, self._damp)
        return squares + float(source @ self._ops.solve(factor, source)[:m])

    def _factor(self) -> Any:
        factor = primal_factor if self._primal else dual_factor
        return factor(self._panels, self._grads, self._damp)

    def _inverse_blocks(self, factor: Any, members: np.ndarray) -> np.ndarray:
        """`damp [F^-1]_SS` of each group, (n, g, g) float64; that of the identity where `members` is -1."""
        there = members >= 0
        places, columns = np.flatnonzero(there), members[there]
        panel = np.zeros((min(self._samples, self._width), members.size), np.float32)
        if self._primal:
            panel[columns, places] = 1.0
        else:
            self._gather(columns, panel, places)
        blocks = self._ops.group_gram(factor, panel.reshape(-1, *members.shape))
        blocks *= self._samples * self._damp if self._primal else -1.0
        diagonal = np.arange(members.shape[1])
        blocks[:, diagonal, diagonal] += ~there if self._primal else 1.0
        return blocks

    def _gather(self, columns: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """`out[:, places] = grads[:, columns]`, of only those panels that hold any."""
        if isinstance(self._grads, np.ndarray):
            out[:, places] = np.take(self._grads, columns, axis=1)
            return
        step = self._panels.width
        numbers = columns // step
        for number in np.unique(numbers).tolist():
            here = numbers == number
            part = slice(number * step, min((number + 1) * step, self._width))
            out[:, places[here]] = np.take(self._grads[:, part], columns[here] - part.start, axis=1)

    def _chunks(self, sizes: np.ndarray) -> list[slice]:
        """Runs of groups that fill half a panel, given their ascending sizes: there are several copies of it."""
        chunks, start = [], 0
        for stop in range(1, len(sizes) + 1):
            if stop == len(sizes) or (stop + 1 - start) * int(sizes[stop]) > self._panels.width // 2:
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


def _solved_forms(inverse: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`w^T M^-1 w` of each group; NaN where rounding may have spoilt M."""
    try:
        factor = np.linalg.cholesky(inverse)
    except np.linalg.LinAlgError:
        if len(inverse) == 1:
            return np.full(1, np.nan)
        half = len(inverse) // 2
        parts = (slice(half), slice(half, None))
        return np.concatenate([_solved_forms(inverse[part], weights[part]) for part in parts])
    pivots = np.square(np.diagonal(factor, axis1=1, axis2=2)).min(1)
    solved = np.linalg.solve(factor, weights[..., None])[..., 0]
    return np.where(pivots < RISKY_PIVOT, np.nan, np.square(solved).sum(1))
