"""From the costs of groups to masks: counts, ties, ramps, and what is never taken."""

import itertools

import numpy as np
import pytest

from keras_woodfisher.options.mask_types import TOLERANCE, highest
from keras_woodfisher.pruning.group_masks import grow_groups, grow_patterns, grows, marginal_costs
from keras_woodfisher.pruning.masks import grow


class Groups:
    """A `Structure` of groups of given sizes, variable after variable, with weights beside them that have no group."""

    def __init__(self, sizes, pattern=None, rest=0):
        self.pattern = pattern
        labels, self.edges, self.covered, group = [], [0], [], 0
        for variable in sizes:
            labels += [np.repeat(group + np.arange(len(variable)), variable), np.full(rest, -1)]
            group += len(variable)
            self.edges.append(group)
            self.covered.append(int(sum(variable)))
        self.labels = np.concatenate(labels).astype(int)
        self.number = group
        if pattern is not None:
            self.members = np.flatnonzero(self.labels >= 0).reshape(-1, pattern[1])
            self.most = pattern[1] - pattern[0]

    def zeros(self, mask):
        return np.bincount(self.labels[mask & (self.labels >= 0)], minlength=self.number)


@pytest.mark.parametrize("together", [True, False])
def test_groups_of_one_weight_are_pruned_like_weights(together):
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(2, 20, 3)
        costs = rng.choice([0.0, 0.5, 1.0, 2.0, *rng.uniform(size=5)], sizes.sum())
        pruned = rng.uniform(size=costs.size) < 0.2
        structure = Groups([np.ones(size, int) for size in sizes])
        # Not so much that only the last weight of a variable would be left.
        sparsity = [float(rng.uniform(0, 0.6))] * 3
        ranges = [(costs.size, sparsity[0])] if together else [(int(n), sparsity[0]) for n in sizes]
        truth = grow(costs, pruned, ranges)
        if any(part.all() for part in np.split(truth, np.cumsum(sizes)[:-1])):
            continue
        np.testing.assert_array_equal(grow_groups(structure, costs, pruned, sparsity, together), truth)
        assert grows(structure, pruned, sparsity, together) == bool((truth & ~pruned).any())


def test_whole_groups_go_in_the_order_of_their_cost_for_each_weight():
    structure = Groups([[4, 2, 4], [6, 2]], rest=3)
    costs = np.array([8.0, 1.0, 2.0, 9.0, 7.0])  # for each weight 2, 0.5, 0.5, 1.5, 3.5
    none = np.zeros(structure.labels.size, bool)

    def taken(sparsity):
        new = grow_groups(structure, costs, none, [sparsity] * 2, True)
        zeros = structure.zeros(new)
        assert set(zeros[zeros > 0]) <= set(np.array([4, 2, 4, 6, 2])[zeros > 0])
        assert not new[structure.labels == -1].any()
        return np.flatnonzero(zeros).tolist()

    # Of 18 weights: the zeros go 2, 6, 12; each group from half of it on. Group 0 is the last one of its variable.
    assert taken(0.9 / 18) == []
    assert taken(1.0 / 18) == [1]
    assert taken(3.9 / 18) == [1]
    assert taken(4.0 / 18) == [1, 2]
    assert taken(8.9 / 18) == [1, 2]
    assert taken(9.0 / 18) == [1, 2, 3]
    assert taken(0.999) == [1, 2, 3], "the last group of a variable stays"


def test_weights_that_are_pruned_already_count_and_make_a_group_cheaper():
    structure = Groups([[4, 4, 4]])
    pruned = np.zeros(12, bool)
    pruned[[0, 1, 2]] = True
    new = grow_groups(structure, np.array([1.0, 3.0, 5.0]), pruned, [4 / 12], True)
    # Cost for each weight that is left: 1, 0.75, 1.25. Three zeros are there; half of group 1 would be too far.
    assert not (new & ~pruned).any()
    assert not grows(Groups([[4, 4]]), np.repeat([True, False], 4), [0.9], True), "only one group is left"
    new = grow_groups(structure, np.array([1.0, 3.0, 5.0]), pruned, [5 / 12], True)
    assert np.flatnonzero(new).tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_marginal_costs_are_slopes_of_the_lower_hull():
    rng = np.random.default_rng(0)
    for _ in range(100):
        costs = rng.uniform(size=(3, 5)) * rng.choice([1.0, 10.0])
        costs[1, rng.integers(1, 6) :] = np.inf
        slopes = marginal_costs(costs)
        for cost, slope in zip(costs, slopes, strict=True):
            known = np.isfinite(cost)
            points = [(0, 0.0), *((k + 1, c) for k, c in enumerate(cost) if np.isfinite(c))]
            hull = [
                min(
                    y0 + (y1 - y0) * (k - x0) / (x1 - x0) if x1 > x0 else y0
                    for (x0, y0), (x1, y1) in itertools.product(points, points)
                    if x0 <= k <= x1
                )
                for k in range(known.sum() + 1)
            ]
            np.testing.assert_allclose(slope[known], np.diff(hull), rtol=1e-9, atol=1e-12)
            assert np.isinf(slope[~known]).all()
            assert (np.diff(slope[known]) >= -1e-12).all()


def pattern_case(seed, kept=2, size=4):
    """Costs that are convex, so that the best allocation is that of the lowest steps."""
    rng = np.random.default_rng(seed)
    structure = Groups([[size] * 2, [size] * 3], (kept, size), rest=2)
    steps = np.sort(rng.uniform(size=(5, structure.most)), axis=1)
    sets = np.zeros((5, structure.most, size), bool)
    for group, number in itertools.product(range(5), range(structure.most)):
        sets[group, number, rng.permutation(size)[: number + 1]] = True
    return structure, np.cumsum(steps, axis=1), sets


@pytest.mark.parametrize("seed", range(5))
def test_patterns_have_the_least_total_cost_of_all_allocations(seed):
    structure, costs, sets = pattern_case(seed)
    none = np.zeros(structure.labels.size, bool)
    for number in range(11):
        new = grow_patterns(structure, costs, sets, none, [number / 20] * 2, True)
        assert new.sum() == number
        zeros = structure.zeros(new)
        padded = np.concatenate([np.zeros((5, 1)), costs], axis=1)
        best = min(
            sum(padded[g, k] for g, k in enumerate(numbers))
            for numbers in itertools.product(range(3), repeat=5)
            if sum(numbers) == number
        )
        assert sum(padded[g, k] for g, k in enumerate(zeros)) == pytest.approx(best)
        for group, zero in enumerate(zeros.tolist()):
            if zero:
                np.testing.assert_array_equal(new[structure.members[group]], sets[group, zero - 1])


def test_patterns_by_variable_and_the_sparsity_of_the_pattern():
    structure, costs, sets = pattern_case(0)
    none = np.zeros(structure.labels.size, bool)
    new = grow_patterns(structure, costs, sets, none, [0.25, 0.5], False)
    assert structure.zeros(new)[:2].sum() == 2
    assert structure.zeros(new)[2:].tolist() == [2, 2, 2]
    # 0.497 is taken for one half.
    assert structure.zeros(grow_patterns(structure, costs, sets, none, [0.497] * 2, True)).tolist() == [2] * 5


@pytest.mark.parametrize(("below", "zeros"), [(0.0, 400), (TOLERANCE, 400), (1.01 * TOLERANCE, 396)])
def test_how_near_the_sparsity_of_the_pattern_is_near_enough(below, zeros):
    structure = Groups([[4] * 200], (2, 4))
    sets = np.tile(np.array([[True, False, False, False], [True, True, False, False]]), (200, 1, 1))
    costs = np.arange(1.0, 401.0).reshape(200, 2)
    new = grow_patterns(structure, costs, sets, np.zeros(800, bool), [highest((2, 4)) - below], True)
    assert new.sum() == zeros


def test_a_group_with_more_zeros_than_the_pattern_keeps_them_and_the_others_get_theirs():
    structure, costs, sets = pattern_case(1)
    pruned = np.zeros(structure.labels.size, bool)
    pruned[structure.members[0, :3]] = True
    costs[0] = np.inf
    new = grow_patterns(structure, costs, sets, pruned, [0.5] * 2, True)
    assert structure.zeros(new).tolist() == [3, 2, 2, 2, 2]
    assert not (pruned & ~new).any()
    assert not grows(structure, new, [0.5] * 2, True)
    assert grows(structure, pruned, [0.5] * 2, True)
    assert not grows(structure, pruned, [0.1] * 2, True)


def test_nan_costs_are_refused():
    structure, costs, sets = pattern_case(0)
    costs[0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="1 of 10 scores of groups are NaN"):
        grow_patterns(structure, costs, sets, np.zeros(structure.labels.size, bool), [0.5] * 2, True)
    with pytest.raises(FloatingPointError, match="1 of 2 scores of groups are NaN"):
        grow_groups(Groups([[2, 2]]), np.array([np.nan, 1.0]), np.zeros(4, bool), [0.5], True)


def test_the_smallest_group_decides_whether_anything_goes():
    structure = Groups([[8, 2, 8]])
    none = np.zeros(structure.labels.size, bool)
    # 3 of 18 weights: the group of two fits, those of eight don't.
    assert grows(structure, none, [3 / 18], True)
    taken = grow_groups(structure, np.array([9.0, 0.5, 9.0]), none, [3 / 18], True)
    assert structure.zeros(taken).tolist() == [0, 2, 0]
    assert not grows(structure, none, [0.5 / 18], True)


def test_a_variable_without_a_whole_group_has_no_last_one_to_keep():
    structure = Groups([[2, 2], [], [2, 2]])
    none = np.zeros(structure.labels.size, bool)
    new = grow_groups(structure, np.array([1.0, 2.0, 4.0, 3.0]), none, [0.9] * 3, True)
    assert structure.zeros(new).tolist() == [2, 0, 0, 2]


def test_one_variable_that_is_not_there_yet_is_enough():
    structure, costs, sets = pattern_case(0)
    none = np.zeros(structure.labels.size, bool)
    new = grow_patterns(structure, costs, sets, none, [0.5, 0.0], False)
    assert grows(structure, new, [0.5, 0.25], False) and grows(structure, none, [0.25, 0.0], False)
    assert not grows(structure, new, [0.5, 0.0], False)
