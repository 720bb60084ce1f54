"""Costs of groups to masks: whole groups, or up to M - N weights of each group of M; what is pruned stays pruned.

Everywhere here `weights` (d,) are all chosen weights, `pruned` (d,) bool says which of them are pruned now, and
`sparsity` gives the fraction to reach of the weights that belong to a group, one a variable. If `together`, all groups
are ranked together (by the first sparsity), else those of each variable by themselves.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from keras_woodfisher_backends.kernel.removal_sets import cheapest_sets

from keras_woodfisher.options.mask_types import TOLERANCE, highest
from keras_woodfisher.pruning.fisher import Advance, BlockFisher
from keras_woodfisher.pruning.groups import Structure

_CHUNK = 4096
"""Groups whose sets are compared at a time."""


def select(
    structure: Structure,
    weights: np.ndarray,
    pruned: np.ndarray,
    fisher: BlockFisher | None,
    sparsity: Sequence[float],
    together: bool,
    advance: Advance,
) -> np.ndarray:
    """The next set of pruned weights, (d,) bool.

    Costs are those of Optimal Brain Surgeon by the Fisher of the unpruned weights; without one, sums of squares.
    """
    if structure.pattern is None:
        costs = _group_costs(structure, weights, pruned, fisher, advance)
        return grow_groups(structure, costs, pruned, sparsity, together)
    costs, sets = _cheapest_sets(structure, weights, pruned, fisher, advance)
    return grow_patterns(structure, costs, sets, pruned, sparsity, together)


def grow_groups(
    structure: Structure, costs: np.ndarray, pruned: np.ndarray, sparsity: Sequence[float], together: bool
) -> np.ndarray:
    """Prunes the groups with the lowest cost (n,) for each weight that they still have.

    Group after group goes until one more would take the number of zeros further from what is asked for; the last group
    of a variable is never taken. Ties fall to the first group. Where all groups are single weights, this is
    `masks.grow`.
    """
    _check(costs)
    left = _left(structure, pruned)
    each = costs / np.maximum(left, 1)
    free = (left > 0) & ~_last_ones(structure, each, left)
    chosen = np.zeros(structure.number, bool)
    for groups, aim, zeros, _ in _ranges(structure, left, sparsity, together):
        candidates = groups.start + np.flatnonzero(free[groups])
        order = candidates[np.argsort(each[candidates], kind="stable")]
        chosen[order[_fits(left[order], zeros, aim)]] = True
    inside = structure.labels >= 0
    new = pruned.copy()
    new[inside] |= chosen[structure.labels[inside]]
    return new


def grow_patterns(
    structure: Structure,
    costs: np.ndarray,
    sets: np.ndarray,
    pruned: np.ndarray,
    sparsity: Sequence[float],
    together: bool,
) -> np.ndarray:
    """Prunes up to M - N weights of each group of M: those whose sets cost least for each weight.

    The number of zeros is exact, as in `masks.grow`, where groups have room for them. At the sparsity of the pattern
    every group gets M - N zeros. `costs` (n, M - N) are the least costs of removing 1, 2, ... further weights of a
    group, `sets` (n, M - N, M) bool the weights that this removes.
    """
    _check(costs)
    left = _left(structure, pruned)
    room = _room(structure, left)
    steps = 1 + np.arange(structure.most)
    costs = np.where(steps <= room[:, None], costs, np.inf)
    marginal = marginal_costs(costs)
    taken = np.zeros(structure.number, np.int64)
    for groups, aim, zeros, full in _ranges(structure, left, sparsity, together):
        number = _further(aim, zeros, room[groups], full)
        order = np.argsort(marginal[groups], axis=None, kind="stable")[:number]
        taken[groups] = np.bincount(order // structure.most, minlength=groups.stop - groups.start)
    smaller = np.flatnonzero(taken)
    new = pruned.copy()
    new[structure.members[smaller][sets[smaller, taken[smaller] - 1]]] = True
    return new


def grows(structure: Structure, pruned: np.ndarray, sparsity: Sequence[float], together: bool) -> bool:
    """Whether anything may be pruned on the way to a sparsity, whatever the costs."""
    left = _left(structure, pruned)
    ranges = _ranges(structure, left, sparsity, together)
    if structure.pattern is not None:
        room = _room(structure, left)
        return any(_further(aim, zeros, room[groups], full) > 0 for groups, aim, zeros, full in ranges)
    spare = _spare(structure, left)
    for groups, aim, zeros, _ in ranges:
        sizes = left[groups][spare[groups]]
        if sizes.size and _fits(sizes.min(keepdims=True), zeros, aim)[0]:
            return True
    return False


def marginal_costs(costs: np.ndarray) -> np.ndarray:
    """What each further weight of a group costs, so spread that no weight costs less than one before it.

    These are the slopes of the lower convex hull of (0, 0), (1, c_1), (2, c_2), ...: taking the lowest steps of all
    groups gives the least total cost, but for the one group in whose slope the count ends.

        >>> marginal_costs(np.array([[1.0, 4.0], [4.0, 6.0], [2.0, np.inf]]))
        array([[ 1.,  3.],
               [ 3.,  3.],
               [ 2., inf]])

    Args:
        costs: (n, k) cost of removing 1, 2, ..., k weights; infinite where that isn't possible.
    """
    number, most = costs.shape
    steps = np.arange(1, most + 1)
    out = np.full(costs.shape, np.inf)
    at, base = np.zeros(number, np.int64), np.zeros(number)
    while True:
        ahead = steps > at[:, None]
        slopes = np.where(ahead, (costs - base[:, None]) / np.where(ahead, steps - at[:, None], 1), np.inf)
        lowest = slopes.min(1)
        going = np.flatnonzero(np.isfinite(lowest))
        if not going.size:
            return out
        # Of equal slopes the farthest.
        to = most - np.argmin(slopes[going, ::-1], axis=1)
        passed = ahead[going] & (steps <= to[:, None])
        out[going] = np.where(passed, lowest[going, None], out[going])
        at[going], base[going] = to, costs[going, to - 1]


def _group_costs(
    structure: Structure, weights: np.ndarray, pruned: np.ndarray, fisher: BlockFisher | None, advance: Advance
) -> np.ndarray:
    if fisher is not None:
        keep = ~pruned
        return fisher.group_costs(weights[keep], structure.labels[keep], structure.number, advance)
    inside = structure.labels >= 0
    squares = np.square(np.where(pruned, 0.0, weights)[inside], dtype=np.float64)
    return np.bincount(structure.labels[inside], squares, structure.number)


def _cheapest_sets(
    structure: Structure, weights: np.ndarray, pruned: np.ndarray, fisher: BlockFisher | None, advance: Advance
) -> tuple[np.ndarray, np.ndarray]:
    members = structure.members
    if fisher is not None:
        keep = ~pruned
        columns = np.where(keep, np.cumsum(keep) - 1, -1)[members]
        return fisher.cheapest_sets(weights[keep], columns, structure.most, advance)
    size = members.shape[1]
    costs, sets = np.empty((len(members), structure.most)), np.empty((len(members), structure.most, size), bool)
    for start in range(0, len(members), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(members)))
        values, there = weights[members[part]].astype(np.float64), ~pruned[members[part]]
        alike = np.broadcast_to(np.eye(size), (len(values), size, size))
        costs[part], sets[part] = cheapest_sets(alike, np.ones(values.shape), values, there, structure.most)
    return costs, sets


def _left(structure: Structure, pruned: np.ndarray) -> np.ndarray:
    """How many unpruned weights each group has."""
    return np.bincount(structure.labels[(structure.labels >= 0) & ~pruned], minlength=structure.number)


def _room(structure: Structure, left: np.ndarray) -> np.ndarray:
    """How many weights of each group an N:M mask may still remove."""
    assert structure.pattern is not None
    return np.maximum(left - structure.pattern[0], 0)


def _ranges(
    structure: Structure, left: np.ndarray, sparsity: Sequence[float], together: bool
) -> Iterator[tuple[slice, float, int, bool]]:
    """Groups that are ranked by themselves, zeros to reach, zeros there are, and whether all that may go does."""
    edges, covers = structure.edges, structure.covered
    if together:
        edges, covers, sparsity = [0, structure.number], [sum(covers)], sparsity[:1]
    for (start, stop), covered, fraction in zip(pairwise(edges), covers, sparsity, strict=True):
        groups = slice(start, stop)
        full = structure.pattern is not None and fraction >= highest(structure.pattern) - TOLERANCE
        yield groups, fraction * covered, covered - int(left[groups].sum()), full


def _further(aim: float, zeros: int, room: np.ndarray, full: bool) -> int:
    """How many weights to remove: as `masks.count` has it, where there is room."""
    most = int(room.sum())
    return most if full else min(max(int(np.floor(aim + 0.5)) - zeros, 0), most)


def _fits(sizes: np.ndarray, zeros: int, aim: float) -> np.ndarray:
    """Which of the groups, one after the other, bring the number of zeros nearer to the aim; half a group does."""
    nearer = zeros + np.cumsum(sizes) - 0.5 * sizes <= aim + 1e-9
    return np.logical_and.accumulate(nearer)


def _last_ones(structure: Structure, each: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The most expensive group of each variable, which stays; of equal ones the last."""
    last = np.zeros(structure.number, bool)
    ranked = np.where(left > 0, each, -np.inf)
    for start, stop in pairwise(structure.edges):
        if stop > start:
            last[stop - 1 - np.argmax(ranked[start:stop][::-1])] = True
    return last


def _spare(structure: Structure, left: np.ndarray) -> np.ndarray:
    """The groups of variables that have more than one left."""
    spare = left > 0
    for start, stop in pairwise(structure.edges):
        spare[start:stop] &= np.count_nonzero(spare[start:stop]) > 1
    return spare


def _check(costs: np.ndarray) -> None:
    if np.isnan(costs).any():
        raise FloatingPointError(f"{int(np.isnan(costs).sum())} of {costs.size} scores of groups are NaN.")
