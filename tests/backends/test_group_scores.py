"""Costs of groups in one block: every device's kernel against the constrained quadratic, solved densely."""

import itertools

import keras
import numpy as np
import pytest
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.kernel import group_scores, removal_sets
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import NumpyOperators, host_kernel

NAME = keras.backend.backend()
DEVICES = get_backend(NAME).devices()
DAMP = 1e-3
SHAPES = [(1, 1), (5, 3), (8, 8), (8, 40), (16, 60), (30, 29), (6, 70)]


@pytest.fixture(params=DEVICES)
def kernel(request, backend):
    return backend.kernel(request.param)


def samples(m, width, seed=0):
    return np.random.default_rng(seed).normal(size=(m, width)).astype(np.float32)


def least_quadratic(grads, damp, weights, removed):
    """The least `1/2 delta^T F delta` with `delta = -w` on the removed weights."""
    fisher = dense_fisher(grads.astype(np.float64), damp)
    delta, kept = -weights * removed, ~removed
    delta[kept] = np.linalg.solve(fisher[np.ix_(kept, kept)], -fisher[np.ix_(kept, removed)] @ delta[removed])
    return 0.5 * delta @ fisher @ delta


def dense_fisher(grads, damp):
    return damp * np.eye(grads.shape[1]) + grads.T @ grads / len(grads)


def least_quadratic_in_long_double(grads, damp, weights, removed):
    """The same by elimination of the kept weights, where float64 isn't enough for a matrix of that condition."""
    rest = dense_fisher(grads.astype(np.longdouble), np.longdouble(damp))
    order = np.argsort(removed, kind="stable")
    rest = rest[np.ix_(order, order)]
    for _ in range(np.count_nonzero(~removed)):
        rest = rest[1:, 1:] - np.outer(rest[1:, 0] / rest[0, 0], rest[0, 1:])
    return 0.5 * float(weights[removed] @ rest @ weights[removed])


def costs_by_definition(grads, damp, weights, labels):
    found = np.unique(labels[labels >= 0])
    return found, np.array([least_quadratic(grads, damp, weights, labels == group) for group in found])


def labelled(width, groups, seed=0):
    """Groups of different sizes in no order; some weights have none."""
    return np.random.default_rng(seed).choice([-1, *(7 * np.arange(groups))], width)


@pytest.mark.parametrize("m, width", SHAPES)
@pytest.mark.parametrize("groups", [1, 3, 20])
def test_costs_are_the_least_of_the_quadratic(kernel, m, width, groups):
    grads, labels = samples(m, width), labelled(width, groups)
    weights = np.random.default_rng(1).normal(size=width)
    found, costs = kernel.group_costs(grads, DAMP, weights, labels)
    labels_there, truth = costs_by_definition(grads, DAMP, weights, labels)
    np.testing.assert_array_equal(found, labels_there)
    np.testing.assert_allclose(costs, truth, rtol=1e-8)


@pytest.mark.parametrize("m, width", [(8, 40), (40, 8)])
def test_a_group_of_one_weight_has_its_own_score(kernel, m, width):
    grads, weights = samples(m, width), np.random.default_rng(1).normal(size=width)
    found, costs = kernel.group_costs(grads, DAMP, weights, np.arange(width))
    assert found.tolist() == list(range(width))
    np.testing.assert_allclose(costs, 0.5 * weights**2 / kernel.inverse_diagonal(grads, DAMP), rtol=2e-6)


def test_the_whole_block_and_no_group_at_all(kernel):
    grads, weights = samples(5, 20), np.random.default_rng(1).normal(size=20)
    _, cost = kernel.group_costs(grads, DAMP, weights, np.zeros(20, int))
    double = grads.astype(np.float64)
    everything = 0.5 * (DAMP * weights @ weights + np.square(double @ weights).sum() / 5)
    np.testing.assert_allclose(cost, [everything], rtol=1e-10)
    found, none = kernel.group_costs(grads, DAMP, weights, np.full(20, -1))
    assert found.size == none.size == 0


class Elsewhere:
    """Samples that are read panel by panel."""

    def __init__(self, grads):
        self._grads = grads
        self.shape = grads.shape
        self.read = 0

    def __getitem__(self, key):
        part = self._grads[key]
        self.read += part.shape[1]
        return part


@pytest.mark.parametrize("panel", [7, 64])
@pytest.mark.parametrize("lanes, groups", [(1, 9), (2, 9), (2, 2)])
@pytest.mark.parametrize("kind", [np.asarray, Elsewhere])
def test_panels_and_lanes_change_nothing(backend, panel, lanes, groups, kind):
    grads, labels = samples(12, 64), labelled(64, groups)
    weights = np.random.default_rng(1).normal(size=64)
    members = np.arange(64).reshape(16, 4)
    truth = costs_by_definition(grads, DAMP, weights, labels)[1]
    sets = host_kernel().cheapest_sets(grads, DAMP, weights, members, 2)
    grads = kind(grads)
    for operators in (NumpyOperators(), backend.kernel("cpu:0").operators):
        kernel = BlockKernel(operators, panel=panel, lanes=lanes).sharing()
        np.testing.assert_allclose(kernel.group_costs(grads, DAMP, weights, labels)[1], truth, rtol=1e-8)
        costs, chosen = kernel.cheapest_sets(grads, DAMP, weights, members, 2)
        np.testing.assert_allclose(costs, sets[0], rtol=1e-8)
        np.testing.assert_array_equal(chosen, sets[1])


def test_each_group_reads_its_own_panels_only():
    grads, labels = Elsewhere(samples(4, 600)), np.arange(600) // 10
    kernel = BlockKernel(NumpyOperators(), panel=20)
    kernel.group_costs(grads, DAMP, np.ones(600), labels)
    # All of them once for the Gram matrix, and each group's one panel.
    assert grads.read == 600 + 60 * 20


@pytest.mark.parametrize("panel", [16, 1000])
def test_groups_that_explain_nearly_everything(backend, monkeypatch, panel):
    grads = samples(32, 60)
    grads[:, 3:] *= 1e-6
    grads *= 300.0
    weights, labels, damp = np.random.default_rng(1).normal(size=60), np.arange(60) // 20, 1e-7
    truth = [least_quadratic_in_long_double(grads, damp, weights, labels == group) for group in range(3)]
    for device in DEVICES:
        kernel = BlockKernel(backend.kernel(device).operators, panel=panel)
        np.testing.assert_allclose(kernel.group_costs(grads, damp, weights, labels)[1], truth, rtol=1e-5)
    # Without the sum over samples the first group is off.
    monkeypatch.setattr(group_scores, "RISKY_PIVOT", 0.0)
    careless = host_kernel().group_costs(grads, damp, weights, labels)[1]
    assert np.abs(careless / truth - 1).max() > 5e-5


def test_the_two_definitions_agree():
    grads, labels = samples(6, 20), labelled(20, 3)
    weights = np.random.default_rng(1).normal(size=20)
    for group in (0, 7, 14):
        one = least_quadratic(grads, DAMP, weights, labels == group)
        assert one == pytest.approx(least_quadratic_in_long_double(grads, DAMP, weights, labels == group), rel=1e-9)


@pytest.mark.parametrize("m, width", [(30, 36), (60, 36)])
@pytest.mark.parametrize("size, most", [(4, 2), (4, 3), (3, 1), (6, 3)])
def test_cheapest_sets_are_those_of_all_sets(kernel, m, width, size, most):
    grads, rng = samples(m, width), np.random.default_rng(1)
    weights = rng.normal(size=width)
    members = rng.permutation(width).reshape(-1, size)
    members[0, 1] = members[1, :2] = -1  # pruned earlier
    costs, sets = kernel.cheapest_sets(grads, DAMP, weights, members, most)
    joint_matters = False
    for row, (group, found, chosen) in enumerate(zip(members, costs, sets, strict=True)):
        there = np.flatnonzero(group >= 0)
        single = {
            place: least_quadratic(grads, DAMP, weights, np.arange(width) == group[place]) for place in there.tolist()
        }
        for number in range(1, most + 1):
            options = {
                places: least_quadratic(grads, DAMP, weights, np.isin(np.arange(width), group[list(places)]))
                for places in itertools.combinations(there.tolist(), number)
            }
            if not options:
                assert np.isinf(found[number - 1])
                continue
            best = min(options, key=lambda places: options[places])
            np.testing.assert_allclose(found[number - 1], options[best], rtol=1e-8)
            assert tuple(np.flatnonzero(chosen[number - 1])) == best, row
            joint_matters |= set(best) != set(sorted(single, key=lambda place: single[place])[:number])
    assert joint_matters or most == 1, "the sums of single costs choose other sets somewhere"


def test_large_groups_lose_one_weight_after_the_other(kernel):
    grads, weights = samples(10, 40), np.random.default_rng(1).normal(size=40)
    members = np.arange(40).reshape(2, 20)
    members[1, 4] = -1
    costs, sets = kernel.cheapest_sets(grads, DAMP, weights, members, 12)
    for group, found, chosen in zip(members, costs, sets, strict=True):
        gone = np.zeros(40, bool)
        for cost, taken in zip(found, chosen, strict=True):
            options = {}
            for column in group[group >= 0].tolist():
                if not gone[column]:
                    more = gone.copy()
                    more[column] = True
                    options[column] = least_quadratic(grads, DAMP, weights, more)
            best = min(options, key=lambda column: options[column])
            gone[best] = True
            np.testing.assert_allclose(cost, options[best], rtol=1e-7)
            assert set(group[taken]) == set(np.flatnonzero(gone))


def test_one_after_the_other_is_never_better(monkeypatch):
    grads, weights = samples(70, 80), np.random.default_rng(1).normal(size=80)
    members = np.arange(80).reshape(10, 8)
    best, _ = host_kernel().cheapest_sets(grads, DAMP, weights, members, 4)
    monkeypatch.setattr(removal_sets, "MOST_SETS", 1)
    greedy, _ = host_kernel().cheapest_sets(grads, DAMP, weights, members, 4)
    np.testing.assert_allclose(greedy[:, 0], best[:, 0], rtol=1e-9)
    assert (greedy >= best * (1 - 1e-9)).all()
    assert (greedy[:, 1:] > best[:, 1:] * 1.001).any()


def test_nothing_is_overwritten(kernel):
    grads, labels, weights = samples(8, 40), labelled(40, 5), np.random.default_rng(1).normal(size=40)
    members = np.arange(40).reshape(10, 4)
    before = [array.copy() for array in (grads, labels, weights, members)]
    kernel.group_costs(grads, DAMP, weights, labels)
    kernel.cheapest_sets(grads, DAMP, weights, members, 2)
    for now, then in zip((grads, labels, weights, members), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_group_that_rounding_has_spoilt_is_found_among_others(rng):
    """It alone is solved otherwise: NaN stands for it."""
    roots = rng.normal(size=(5, 3, 3))
    matrices, weights = roots @ roots.swapaxes(1, 2) + np.eye(3), rng.normal(size=(5, 3))
    truth = np.einsum("ni,nij,nj->n", weights, np.linalg.inv(matrices), weights)
    for bad in ([], [0], [3], [1, 4]):
        spoilt = np.where(np.isin(np.arange(5), bad)[:, None, None], -matrices, matrices)
        expected = np.where(np.isin(np.arange(5), bad), np.nan, truth)
        np.testing.assert_allclose(group_scores._solved_forms(spoilt, weights), expected)
