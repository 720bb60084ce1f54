"""One update of a model against the dense float64 definition of WoodFisher and Optimal Brain Surgeon."""

import itertools

import keras
import numpy as np
import pytest
from gathering import GivenGradients
from keras import layers, ops

from keras_woodfisher.model.targets import Target, find_targets
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.masks import zeros_of
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.reports.stage_report import StageReport

NAME = keras.backend.backend()
DAMP = 1e-4


def small_model(policy="float32"):
    return keras.Sequential(
        [
            layers.Input((4,)),
            layers.Dense(5, name="one", dtype=policy),
            layers.Dense(3, name="two", dtype=policy),
        ]
    )


def make(model=None, **kwargs):
    defaults = {"damp": DAMP, "fisher_block_size": 8, "verbose": 0}
    return Pruner(model or small_model(), PruningOptions(**(defaults | kwargs)))


def samples(pruner, m=12, seed=1):
    width = sum(t.size for t in pruner.targets)
    return np.random.default_rng(seed).normal(size=(m, width)).astype(np.float32)


def weights_of(pruner):
    return np.concatenate([t.read() for t in pruner.targets]).astype(np.float64)


def pruned_of(pruner):
    return np.concatenate(pruner.pruned)


def dense_fisher(pruner, grads, keep, size):
    """`F` of all weights: one dense block for each `size` kept weights of a variable, zero elsewhere."""
    fisher = DAMP * np.eye(grads.shape[1])
    start, groups = 0, []
    for target in pruner.targets:
        groups.append([i for i in range(start, start + target.size) if keep[i]])
        start += target.size
    if size is None:
        groups, size = [list(itertools.chain(*groups))], len(keep)
    for columns in groups:
        for low in range(0, len(columns), size):
            block = columns[low : low + size]
            part = grads[:, block].astype(np.float64)
            fisher[np.ix_(block, block)] += part.T @ part / len(grads)
    return fisher


def obs(fisher, weights, old, ranges, update):
    """Scores, the set to prune, and the new weights, by definition. `ranges`: (slice, number of zeros)."""
    keep = np.flatnonzero(~old)
    inverse = np.linalg.inv(fisher[np.ix_(keep, keep)])
    scores = np.full(len(weights), -np.inf)
    scores[keep] = weights[keep] ** 2 / (2 * np.diag(inverse))
    new = old.copy()
    for part, number in ranges:
        order = np.argsort(scores[part], kind="stable")
        new[part.start + order[:number]] = True
    pruned_now = new & ~old
    left = ~new
    changed = np.where(new, 0.0, weights)
    if update == "joint":
        block = fisher[np.ix_(left, left)]
        changed[left] += np.linalg.solve(block, fisher[np.ix_(left, pruned_now)] @ weights[pruned_now])
    else:
        for q in np.flatnonzero(pruned_now[keep]):
            step = -weights[keep][q] / inverse[q, q] * inverse[:, q]
            changed[keep] += np.where(new[keep], 0.0, step)
    return new, changed


@pytest.mark.parametrize("size", [None, 1, 3, 8, 1000])
@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("m", [3, 12])
def test_an_update_is_that_of_the_definition(m, update, size):
    pruner = make(fisher_block_size=size, update=update)
    grads, before = samples(pruner, m), weights_of(pruner)
    old = np.zeros(35, bool)
    for sparsity in (0.3, 0.6):  # the second one starts from pruned weights
        fisher = dense_fisher(pruner, grads, ~old, size)
        number = int(np.floor(sparsity * 35 + 0.5))
        new, truth = obs(fisher, before, old, [(slice(0, 35), number)], update)
        done = pruner.update([sparsity] * 2, GivenGradients(grads), m)
        np.testing.assert_array_equal(pruned_of(pruner), new)
        assert new.sum() == number
        np.testing.assert_allclose(weights_of(pruner), truth, rtol=1e-4, atol=1e-5)
        assert done.samples == m and done.sparsity == pruner.sparsity
        assert [phase.name for phase in done.phases] == ["gradients", "inverse", "update"]
        old, before = new, weights_of(pruner)


@pytest.mark.parametrize("update", ["joint", "independent"])
def test_each_variable_has_its_own_sparsity(update):
    pruner = make(global_sparsity=False, update=update)
    grads, before = samples(pruner), weights_of(pruner)
    none = np.zeros(35, bool)
    # 20 and 15 weights: 5 and 11 zeros (10.5 is rounded up).
    new, truth = obs(
        dense_fisher(pruner, grads, ~none, 8), before, none, [(slice(0, 20), 5), (slice(20, 35), 11)], update
    )
    pruner.update([0.25, 0.7], GivenGradients(grads), 12)
    assert [int(p.sum()) for p in pruner.pruned] == [5, 11]
    np.testing.assert_array_equal(pruned_of(pruner), new)
    np.testing.assert_allclose(weights_of(pruner), truth, rtol=1e-4, atol=1e-5)


def test_the_joint_update_minimises_the_quadratic():
    pruner = make(fisher_block_size=None)
    grads, before = samples(pruner, 6), weights_of(pruner)
    fisher = dense_fisher(pruner, grads, np.ones(35, bool), None)
    pruner.update([0.5, 0.5], GivenGradients(grads), 6)
    change, left = weights_of(pruner) - before, ~pruned_of(pruner)
    least = change @ fisher @ change
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(50):
            other = change + scale * left * rng.normal(size=35)
            assert other @ fisher @ other > least
    without = np.where(left, 0.0, -before)
    assert without @ fisher @ without > 1.5 * least


def test_scores_find_the_best_single_weight():
    # Brute force: pruning each weight by itself, with the best change of all others.
    pruner = make(fisher_block_size=None)
    grads, before = samples(pruner, 50), weights_of(pruner)
    fisher = dense_fisher(pruner, grads, np.ones(35, bool), None)
    costs = []
    for q in range(35):
        rest = np.arange(35) != q
        change = np.zeros(35)
        change[q] = -before[q]
        change[rest] = np.linalg.solve(fisher[np.ix_(rest, rest)], fisher[rest, q] * before[q])
        costs.append(change @ fisher @ change)
    pruner.update([1 / 35] * 2, GivenGradients(grads), 50)
    assert np.flatnonzero(pruned_of(pruner)).tolist() == [int(np.argmin(costs))]


def test_magnitude_prunes_the_smallest_and_corrects_nothing():
    pruner = make(method="magnitude")
    before = weights_of(pruner)
    done = pruner.update([0.4] * 2, None, 0)
    lowest = np.sort(np.argsort(np.abs(before))[:14])
    np.testing.assert_array_equal(np.flatnonzero(pruned_of(pruner)), lowest)
    np.testing.assert_array_equal(weights_of(pruner), np.where(pruned_of(pruner), 0.0, before))
    assert done == StageReport(pruner.sparsity)


def test_equal_weights_are_pruned_in_order_and_exactly():
    model = small_model()
    for layer in model.layers:
        layer.kernel.assign(np.ones(layer.kernel.shape))
    pruner = make(model, method="magnitude")
    pruner.update([0.5] * 2, None, 0)
    assert np.flatnonzero(pruned_of(pruner)).tolist() == list(range(18))


def test_what_is_pruned_stays_pruned():
    pruner = make()
    grads = samples(pruner)
    pruner.update([0.5] * 2, GivenGradients(grads), 12)
    first = pruned_of(pruner)
    # Training may have moved them; at the next update they are zero again.
    for target, pruned in zip(pruner.targets, pruner.pruned, strict=True):
        target.write(np.where(pruned, 7.0, target.read()))
    pruner.update([0.7] * 2, GivenGradients(grads), 12)
    assert pruned_of(pruner)[first].all()
    assert not weights_of(pruner)[pruned_of(pruner)].any()
    before = weights_of(pruner)
    source = GivenGradients(grads)
    assert pruner.update([0.6] * 2, source, 12) == StageReport(pruner.sparsity)  # sparsity never falls
    assert source.asked == []
    np.testing.assert_array_equal(weights_of(pruner), before)


def test_zeros_that_are_there_count():
    model = small_model()
    one = model.layers[0]
    kernel = ops.convert_to_numpy(one.kernel).copy()
    kernel[1, 2] = kernel[3, 0] = 0.0
    one.kernel.assign(kernel)
    pruner = make(model)
    pruner.find_zeros()
    assert [int(p.sum()) for p in pruner.pruned] == [2, 0]
    np.testing.assert_array_equal(pruner.masks()[0], kernel == 0)
    assert pruner.sparsity == 2 / 35


def test_a_variable_of_zeros_was_pruned_where_others_are_sparse():
    model = small_model()
    one, two = model.layers
    two.kernel.assign(np.zeros((5, 3)))
    two_alone = find_targets(model, ["two/kernel"])
    for targets in (find_targets(model, "__ALL_PRUNABLE__"), two_alone):
        # An output layer that begins with zeros: it isn't trained yet.
        assert zeros_of(model, targets)[-1].sum() == 0
    one.kernel.assign(np.where(np.arange(20).reshape(4, 5) == 7, 0.0, ops.convert_to_numpy(one.kernel)))
    for targets in (find_targets(model, "__ALL_PRUNABLE__"), two_alone):
        assert zeros_of(model, targets)[-1].sum() == 15
    one.kernel.assign(np.zeros((4, 5)))
    assert [zeros.sum() for zeros in zeros_of(model, find_targets(model, "__ALL_PRUNABLE__"))] == [0, 0]


def test_a_zero_by_chance_makes_no_model_sparse():
    model = keras.Sequential([layers.Input((40,)), layers.Dense(50), layers.Dense(3, kernel_initializer="zeros")])
    kernel = ops.convert_to_numpy(model.layers[0].kernel).copy()
    kernel[0, 0] = 0.0
    model.layers[0].kernel.assign(kernel)
    assert [zeros.sum() for zeros in zeros_of(model, find_targets(model, "__ALL_PRUNABLE__"))] == [1, 0]


def test_a_block_or_variable_may_be_pruned_as_a_whole():
    for update in ("joint", "independent"):
        model = small_model()
        model.layers[1].kernel.assign(1e-6 * np.random.default_rng(0).normal(size=(5, 3)))
        pruner = make(model, update=update)
        pruner.update([0.5] * 2, GivenGradients(samples(pruner)), 12)
        assert pruner.pruned[1].all()
        assert np.isfinite(weights_of(pruner)).all()
        pruner.update([0.8] * 2, GivenGradients(samples(pruner)), 12)
        assert pruned_of(pruner).sum() == 28


def bits(model):
    return [ops.convert_to_numpy(w).tobytes() for w in model.weights]


class Fails(BaseException):
    """Something that no `except Exception` catches, as KeyboardInterrupt is."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, Fails])
def test_a_failing_write_leaves_the_weights_as_they_were(monkeypatch, error):
    model = small_model()
    pruner = make(model)
    before, write = bits(model), Target.write

    def fail_at_the_second(self, flat):
        if self is pruner.targets[1]:
            raise error("in the middle")
        write(self, flat)
        assert bits(model) != before

    monkeypatch.setattr(Target, "write", fail_at_the_second)
    with pytest.raises(error, match="in the middle"):
        pruner.update([0.5] * 2, GivenGradients(samples(pruner)), 12)
    assert bits(model) == before
    assert not pruned_of(pruner).any()
    monkeypatch.undo()
    pruner.update([0.5] * 2, GivenGradients(samples(pruner)), 12)
    assert pruner.sparsity == 18 / 35


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_arent_finite_change_nothing(value):
    model = small_model()
    pruner = make(model)
    grads, before = samples(pruner), bits(model)
    grads[3, 5] = value
    with pytest.raises(np.linalg.LinAlgError, match="larger damp"), np.errstate(invalid="ignore"):
        pruner.update([0.5] * 2, GivenGradients(grads), 12)
    assert bits(model) == before
    assert not pruned_of(pruner).any()


def test_weights_that_arent_finite_change_nothing():
    model = small_model()
    kernel = ops.convert_to_numpy(model.layers[0].kernel).copy()
    kernel[0, 0] = np.nan
    model.layers[0].kernel.assign(kernel)
    pruner, before = make(model), bits(model)
    with pytest.raises(FloatingPointError, match=r"weights aren't finite: 1 of .* nothing was pruned"):
        pruner.update([0.5] * 2, GivenGradients(samples(pruner)), 12)
    assert bits(model) == before


def test_a_correction_that_overflows_changes_nothing():
    model = small_model()
    model.layers[0].kernel.assign(np.full((4, 5), 3e38))
    pruner, before = make(model, fisher_block_size=None, update="independent"), bits(model)
    grads = np.ones((3, 35), np.float32)
    message = "corrected weights aren't finite; nothing was changed"
    with pytest.raises(FloatingPointError, match=message), np.errstate(over="ignore", invalid="ignore"):
        pruner.update([0.9] * 2, GivenGradients(grads), 3)
    assert bits(model) == before


@pytest.mark.parametrize("policy", ["float64", "bfloat16", "mixed_float16"])
def test_other_types_of_weights(policy):
    if policy == "float64" and NAME == "jax":
        policy = "mixed_bfloat16"  # JAX has no float64 by default
    model = small_model(policy)
    pruner = make(model)
    grads, before = samples(pruner), weights_of(pruner)
    none = np.zeros(35, bool)
    new, truth = obs(dense_fisher(pruner, grads, ~none, 8), before, none, [(slice(0, 35), 18)], "joint")
    pruner.update([0.5] * 2, GivenGradients(grads), 12)
    np.testing.assert_array_equal(pruned_of(pruner), new)
    tolerance = {"float64": 1e-9, "bfloat16": 4e-3}.get(policy, 1e-5)
    np.testing.assert_allclose(weights_of(pruner), truth, rtol=tolerance, atol=tolerance)
    kernel = model.layers[0].kernel
    assert keras.backend.standardize_dtype(kernel.dtype) == model.layers[0].variable_dtype
    assert ((ops.convert_to_numpy(kernel) == 0) == pruner.masks()[0]).all()


def test_devices_share_the_blocks():
    names = ["cpu", "cpu:0"] if NAME == "torch" else ["cpu", "cpu:0", "cpu:1"]
    weights = ops.convert_to_numpy(small_model().layers[0].kernel)
    results = []
    for devices in (["cpu"], names):
        model = small_model()
        model.layers[0].kernel.assign(weights)
        model.layers[1].kernel.assign(np.arange(1, 16).reshape(5, 3) / 10)
        pruner = make(model, available_gpus=devices, fisher_block_size=3)
        pruner.update([0.5] * 2, GivenGradients(samples(pruner)), 12)
        results.append((pruned_of(pruner), weights_of(pruner)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_the_phases_are_shown_as_verbose_says(capsys):
    shown = {}
    for verbose in (0, 1, 2):
        pruner = make(verbose=verbose)
        pruner.update([0.5] * 2, GivenGradients(samples(pruner)), 12)
        shown[verbose] = capsys.readouterr().out
    assert shown[0] == ""
    for verbose in (1, 2):
        assert [line for line in shown[verbose].splitlines() if line.startswith("WoodFisher pruning")] == [
            f"WoodFisher pruning: {name}" for name in ("gradients", "inverse", "update")
        ]


def test_one_variable_of_every_rank_is_pruned_where_its_scores_are_lowest():
    # Damping alone: scores are then w^2 damp / 2, so that the order of axes can't hide a mistake in writing back.
    model = keras.Sequential(
        [
            layers.Input((6, 6, 2)),
            layers.Conv2D(3, (2, 3)),
            layers.Conv2DTranspose(2, 2),
            layers.DepthwiseConv2D(2),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    pruner = make(model)
    before = {t.name: ops.convert_to_numpy(t.variable).copy() for t in pruner.targets}
    width = sum(t.size for t in pruner.targets)
    pruner.update([0.5] * 4, GivenGradients(np.full((1, width), 1e-12, np.float32)), 1)
    threshold = np.median(np.abs(np.concatenate([values.ravel() for values in before.values()])))
    for target in pruner.targets:
        values = before[target.name]
        np.testing.assert_allclose(
            ops.convert_to_numpy(target.variable), np.where(np.abs(values) < threshold, 0.0, values), rtol=1e-6
        )
    assert pruned_of(pruner).sum() == width // 2
