"""Structured masks end to end: updates against the definition, ramps, the callback, one shot, recipes."""

import itertools

import keras
import numpy as np
import pytest
from gathering import GivenGradients
from keras import layers, ops

import keras_woodfisher as kw
from keras_woodfisher.callbacks.update_plan import Ramps
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.schedule import checked_schedule
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.stages import StagedUpdates

DAMP = 1e-3
MASKS = ["2:4", "1:4", "block4", [2, 2], "filter", "channel"]


def make(mask, shape=(8,), **kwargs):
    model = keras.Sequential([layers.Input(shape), layers.Dense(4, name="one"), layers.Dense(6, name="two")])
    defaults = {"damp": DAMP, "fisher_block_size": 8, "verbose": 0}
    return model, Pruner(model, PruningOptions(mask_type=mask, **(defaults | kwargs)))


def flat(pruner):
    return np.concatenate([t.read() for t in pruner.targets]).astype(np.float64)


def samples(pruner, m):
    """Correlated ones, so that costs aren't sums."""
    rng = np.random.default_rng(1)
    width = sum(t.size for t in pruner.targets)
    return (rng.normal(size=(m, width)) + 1.5 * rng.normal(size=(m, 1))).astype(np.float32)


def dense_fisher(pruner, grads, sizes=(8, 8)):
    """`F` of all weights in blocks of so many for each variable."""
    fisher, start = DAMP * np.eye(grads.shape[1]), 0
    for target, size in zip(pruner.targets, sizes, strict=True):
        for low in range(start, start + target.size, size):
            block = slice(low, min(low + size, start + target.size))
            part = grads[:, block].astype(np.float64)
            fisher[block, block] += part.T @ part / len(grads)
        start += target.size
    return fisher


def best_change(fisher, weights, removed):
    """Cost and weights of the least `1/2 delta^T F delta` with `delta = -w` on the removed weights."""
    delta, kept = -weights * removed, ~removed
    delta[kept] = np.linalg.solve(fisher[np.ix_(kept, kept)], -fisher[np.ix_(kept, removed)] @ delta[removed])
    return 0.5 * delta @ fisher @ delta, np.where(removed, 0.0, weights + delta)


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize("mask", ["block4", [2, 2], "filter", "channel"])
def test_groups_with_the_lowest_cost_go_and_the_others_are_corrected(mask, m):
    _, pruner = make(mask)
    grads, weights = samples(pruner, m), flat(pruner)
    # A channel of the second layer has six weights: a block of eight ends after the first one.
    fisher = dense_fisher(pruner, grads, (8, 6) if mask == "channel" else (8, 8))
    labels = pruner.structure.labels
    each = {g: best_change(fisher, weights, labels == g)[0] / (labels == g).sum() for g in range(labels.max() + 1)}
    expected, last = np.zeros(labels.size, bool), {}
    for low, high in itertools.pairwise(pruner.structure.edges):
        last[max(range(low, high), key=lambda g: each[g])] = True
    for group in sorted(set(each) - set(last), key=lambda g: each[g]):
        if expected.sum() + 0.5 * (labels == group).sum() > 0.4 * labels.size:
            break
        expected |= labels == group
    assert expected.any()
    _, truth = best_change(fisher, weights, expected)
    pruner.update([0.4] * 2, GivenGradients(grads), m)
    np.testing.assert_array_equal(np.concatenate(pruner.pruned), expected)
    np.testing.assert_allclose(flat(pruner), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("m", [5, 40])
def test_two_of_four_are_those_with_the_least_joint_cost(m):
    _, pruner = make("2:4")
    grads, weights = samples(pruner, m), flat(pruner)
    fisher, expected, single = dense_fisher(pruner, grads), np.zeros(weights.size, bool), []
    diagonal = np.diag(np.linalg.inv(fisher))
    for members in pruner.structure.members:
        options = {}
        for pair in itertools.combinations(members.tolist(), 2):
            options[pair] = best_change(fisher, weights, np.isin(np.arange(weights.size), pair))[0]
        best = min(options, key=lambda pair: options[pair])
        expected[list(best)] = True
        single.append(set(members[np.argsort((weights**2 / diagonal)[members])[:2]].tolist()) == set(best))
    assert not all(single), "two single scores would choose otherwise"
    _, truth = best_change(fisher, weights, expected)
    pruner.update([0.5] * 2, GivenGradients(grads), m)
    np.testing.assert_array_equal(np.concatenate(pruner.pruned), expected)
    np.testing.assert_allclose(flat(pruner), truth, rtol=1e-4, atol=1e-5)


def zeros_of_groups(pruner):
    structure, mask = pruner.structure, np.concatenate(pruner.pruned)
    return np.bincount(structure.labels[mask & (structure.labels >= 0)], minlength=structure.number)


@pytest.mark.parametrize("method", ["woodfisher", "magnitude"])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [8, None, 5])
def test_ramps_only_add_zeros_and_keep_the_structure(mask, together, method, size):
    _, pruner = make(mask, (9,), global_sparsity=together, method=method, fisher_block_size=size)
    structure, highest = pruner.structure, 0.5 if mask == "2:4" else 0.75
    source = None if method == "magnitude" else GivenGradients(samples(pruner, 12))
    before = np.zeros(structure.labels.size, bool)
    for sparsity in (0.1, 0.25, 0.4, highest):
        sparsities = [sparsity] * 2 if together else [sparsity, 0.5 * sparsity]
        pruner.update(sparsities, source, 12)
        now, zeros = np.concatenate(pruner.pruned), zeros_of_groups(pruner)
        assert not (before & ~now).any(), "what is pruned stays pruned"
        assert not now[structure.labels < 0].any(), "what has no group stays dense"
        np.testing.assert_array_equal(flat(pruner)[now], 0.0)
        wanted = sparsity * sum(structure.covered) if together else np.dot(sparsities, structure.covered)
        if structure.pattern is not None:
            assert zeros.max() <= structure.most
            assert abs(now.sum() - wanted) <= 0.5 * len(sparsities)
        else:
            sizes = np.bincount(structure.labels[structure.labels >= 0])
            assert set(zeros / sizes) <= {0.0, 1.0}, "groups are pruned as a whole"
            assert abs(now.sum() - wanted) <= (0.5 if together else 1) * structure.largest
        before = now
    if structure.pattern is not None and together:
        assert (zeros == structure.most).all()


def test_magnitude_goes_by_the_sum_of_squares():
    model, pruner = make("block4", method="magnitude")
    kernels = [np.abs(ops.convert_to_numpy(layer.kernel)) for layer in model.layers]
    pruner.update([0.5] * 2, None, 0)
    blocks = [(k, low, unit) for k, kernel in enumerate(kernels) for low in range(0, len(kernel), 4)
              for unit in range(kernel.shape[1])]  # fmt: skip
    sums = sorted(blocks, key=lambda b: np.square(kernels[b[0]][b[1] : b[1] + 4, b[2]]).sum())
    expected = set(sums[: len(blocks) // 2])
    for k, low, unit in blocks:
        values = ops.convert_to_numpy(model.layers[k].kernel)[low : low + 4, unit]
        assert (values == 0).all() == ((k, low, unit) in expected)
    # 2:4 keeps the two largest of each four.
    model, pruner = make("2:4", method="magnitude")
    kernel = ops.convert_to_numpy(model.layers[0].kernel).T.reshape(-1, 4)
    pruner.update([0.5] * 2, None, 0)
    after = ops.convert_to_numpy(model.layers[0].kernel).T.reshape(-1, 4)
    np.testing.assert_array_equal(after != 0, np.abs(kernel) >= np.sort(np.abs(kernel), axis=1)[:, 2:3])


def conv_net():
    model = keras.Sequential(
        [
            layers.Input((6, 6, 3)),
            layers.Conv2D(8, 3, name="first", activation="relu"),
            layers.Conv2D(4, 3, name="second", activation="relu"),
            layers.Flatten(),
            layers.Dense(3, name="out"),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.fixture
def images(rng):
    return rng.normal(size=(48, 6, 6, 3)).astype("float32"), rng.integers(0, 3, 48).astype("int32")


def is_two_of_four(kernel):
    rows = ops.convert_to_numpy(kernel).reshape(-1, kernel.shape[-1])
    rows = rows[: len(rows) // 4 * 4].T.reshape(-1, 4)
    return bool(((rows == 0).sum(1) == 2).all())


@pytest.mark.parametrize("how", [{"num_grads": 32}, {"method": "magnitude"}])
def test_one_shot_two_of_four(images, how):
    model = conv_net()
    report = kw.prune(model, images, 0.5, mask_type="2:4", quality="fast", verbose=0, **how)
    assert all(is_two_of_four(layer.kernel) for layer in model.layers if layer.weights)
    # 27 inputs of a unit: six fours, and three weights that stay.
    assert [v.pruned for v in report.variables] == [12 * 8, 36 * 4, 8 * 3]
    assert report.notes == (
        f"mask_type 2:4 leaves dense what fills no group: {report.variables[0].name} (24 of 216 weights).",
    )
    assert report.notes[0] in str(report)


@pytest.mark.parametrize("data", [True, False])
def test_the_callback_ramps_to_two_of_four_and_holds_it(images, data, capsys):
    model, seen = conv_net(), []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append([ops.convert_to_numpy(layer.kernel) == 0 for layer in self.model.layers if layer.weights])

    pruner = kw.WoodFisherPruning(
        0.5,
        end_epoch=3,
        start_epoch=1,
        update_frequency=0.5,
        data=images if data else None,
        num_grads=4,
        damp=1e-2,
        mask_type="2:4",
    )
    model.fit(*images, epochs=4, batch_size=12, verbose=0, callbacks=[pruner, Watch()])
    for before, now in itertools.pairwise(seen):
        assert not any((b & ~n).any() for b, n in zip(before, now, strict=True))
    counts = sorted({sum(int(zero.sum()) for zero in zeros) for zeros in seen})
    assert len(counts) >= 4, "zeros grow step by step"
    assert counts[-1] == 12 * 8 + 36 * 4 + 8 * 3
    assert all(is_two_of_four(layer.kernel) for layer in model.layers if layer.weights)
    assert "leaves dense what fills no group" in "".join(capsys.readouterr())
    model.fit(*images, epochs=1, batch_size=12, verbose=0, callbacks=[kw.KeepZeros(), Watch()])
    assert all(is_two_of_four(layer.kernel) for layer in model.layers if layer.weights)
    again = kw.WoodFisherPruning.from_config(pruner.get_config())
    assert again.get_config() == pruner.get_config()
    assert again.options.mask_type == "2:4"
    block = kw.WoodFisherPruning(0.5, end_epoch=1, mask_type=[2, 4])
    assert block.get_config()["mask_type"] == [2, 4]
    assert kw.WoodFisherPruning.from_config(block.get_config()).options.mask_type == (2, 4)


def test_filters_and_channels_of_a_net_are_zero_as_a_whole(images):
    for mask, axis in (("filter", -1), ("channel", -2)):
        model = conv_net()
        kw.prune(model, images, 0.5, mask_type=mask, quality="fast", num_grads=32, exclude=["out/kernel"], verbose=0)
        pruned = 0
        for layer in model.layers[:2]:
            zero = np.moveaxis(ops.convert_to_numpy(layer.kernel) == 0, axis, 0).reshape(layer.kernel.shape[axis], -1)
            assert set(zero.mean(1)) <= {0.0, 1.0}
            assert not zero.all()
            pruned += zero.sum()
        assert abs(pruned - 0.5 * (216 + 288)) <= 0.5 * 72


REFUSED = [
    ({"mask_type": "4:2"}, 0.5, ValueError, "mask_type must be unstructured"),
    ({"mask_type": "2:4"}, 0.6, ValueError, "2:4 keeps 2 of 4 weights, so the final sparsity is at most 0.5, got 0.6"),
    ({"mask_type": "2:4"}, {0.5: ["out/kernel"], 0.7: ["hidden/kernel"]}, ValueError, "at most 0.5, got 0.7"),
    (
        {"mask_type": "2:4", "update": "independent"},
        0.5,
        ValueError,
        "update='independent' adds up .*Use update='joint'",
    ),
    ({"mask_type": "2:4", "fisher_block_size": 3}, 0.5, ValueError, "fisher_block_size=3 can't hold .*at least 4"),
    ({"mask_type": [9, 20]}, 0.5, ValueError, r"\[9, 20\] finds no whole group in any chosen variable"),
]


@pytest.mark.parametrize("fields, sparsity, error, message", REFUSED)
def test_what_is_refused_before_anything_happens(make_mlp, blobs, fields, sparsity, error, message):
    model = make_mlp()
    before = model.get_weights()
    with pytest.raises(error, match=message):
        kw.prune(model, blobs, sparsity, verbose=0, **fields)
    with pytest.raises(error, match=message):
        callback = kw.WoodFisherPruning(sparsity, end_epoch=1, data=blobs, verbose=0, **fields)
        model.fit(*blobs, epochs=1, verbose=0, callbacks=[callback])
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_plan_counts_weights_that_have_a_group():
    options = PruningOptions(mask_type="2:4")
    schedule = checked_schedule(0.0, 0.5, 0.0, 2.0, 1.0, "linear")
    ramps = Ramps(schedule, [0.5, 0.5], [30, 16], options, [24, 16])
    updates = ramps.plan([0, 0], 4, 2)
    assert [update.kept for update in updates] == [46, 46, 36]
    assert updates[-1].sparsity == 20 / 46


def test_memory_for_groups_is_part_of_the_plan(make_mlp, blobs):
    def plan(mask):
        pruner = Pruner(make_mlp(units=600), PruningOptions(mask_type=mask, verbose=0, memory_limit="1GiB"))
        uses = [(64, sum(t.size for t in pruner.targets))]
        from keras_woodfisher.gradients.footprint import buffered_footprint

        return pruner.workspace.plan(buffered_footprint(pruner.targets, 64), uses), pruner

    plain, _ = plan("unstructured")
    for mask in ("2:4", "filter"):
        structured, pruner = plan(mask)
        assert structured.vectors == plain.vectors + pruner.structure.bytes
        assert structured.total > plain.total
    wide, _ = plan("channel")
    assert wide.blocks > plain.blocks


def test_sparsities_are_fractions_of_what_fills_groups():
    """Of 10 inputs two fill no group of four: stages aim at fractions of the other eight."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(6, use_bias=False)])
    pruner = Pruner(model, PruningOptions(mask_type="1:4", method="magnitude", verbose=0))
    assert pruner.coverage == [48]
    StagedUpdates(pruner, None, 2).update([0.75], lambda _: 0)
    assert sum(pruner.zeros) == 36 and pruner.reached == [0.75]
    again = Pruner(model, PruningOptions(mask_type="1:4", method="magnitude", global_sparsity=False, verbose=0))
    again.find_zeros()
    assert again.reached == [0.75]
