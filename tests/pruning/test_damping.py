"""`damp="auto"`: the ridge against its definition, and what held-out examples decide."""

import keras
import numpy as np
import pytest
from gathering import add_rows, stored

import keras_woodfisher as kw
import keras_woodfisher.gradients.sources
from keras_woodfisher.memory.disk import DiskStore
from keras_woodfisher.pruning.corrections import BlockCorrector
from keras_woodfisher.pruning.guard import MagnitudeGuard
from keras_woodfisher.pruning.shrinkage import LEAST, MOST, ridges, shrinkage_ridge

BLOCKS = [slice(0, 30), slice(30, 75), slice(75, 80)]


def samples(number, rank=2, seed=0):
    """Samples that are much alike, of other sizes in each block."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(number, rank)) @ rng.normal(size=(rank, 80)) + 0.3 * rng.normal(size=(number, 80))
    return (grads * np.repeat([1.0, 0.1, 5.0], [30, 45, 5])).astype(np.float32)


def by_definition(grads, blocks):
    """Ledoit and Wolf's shrinkage of a second moment towards a multiple of the identity, as a ridge."""
    error = spread = trace = 0.0
    for block in blocks:
        rows = grads[:, block].astype(np.float64)
        moment = rows.T @ rows / len(rows)
        target = np.trace(moment) / len(moment) * np.eye(len(moment))
        error += sum(np.square(np.outer(row, row) - moment).sum() for row in rows) / len(rows) ** 2
        spread += np.square(moment - target).sum()
        trace += np.trace(moment)
    rho = error / spread
    return rho / (1 - rho) * trace / sum(block.stop - block.start for block in blocks)


def ridge_of(grads, blocks=BLOCKS):
    return shrinkage_ridge(stored(grads), blocks, float(np.square(grads.astype(np.float64)).mean()))


def test_the_ridge_is_that_of_the_dense_matrices():
    grads = samples(40)
    np.testing.assert_allclose(ridge_of(grads), by_definition(grads, BLOCKS), rtol=1e-9)


def test_with_many_samples_it_is_estimated():
    grads = samples(300, rank=10)
    np.testing.assert_allclose(ridge_of(grads), by_definition(grads, BLOCKS), rtol=0.3)
    assert ridge_of(grads) < 0.2 * ridge_of(grads[:40])


def test_it_has_the_unit_of_a_squared_gradient():
    grads = samples(40)
    np.testing.assert_allclose(ridge_of(grads * np.float32(2**-20)), 2.0**-40 * ridge_of(grads), rtol=1e-9)


def test_it_stays_between_bounds():
    mean = 1.0
    same = np.ones((8, 80), np.float32)
    assert ridge_of(same) == LEAST * mean
    assert ridge_of(same[:1]) == MOST * mean


def test_it_doesnt_depend_on_where_samples_are():
    grads = samples(40)
    disk = DiskStore(grads.shape, 4, "float32", 7, BLOCKS)
    add_rows(disk, grads, np.ones(len(grads), bool))
    disk.finish()
    found = shrinkage_ridge(disk, BLOCKS, float(np.square(grads.astype(np.float64)).mean()))
    disk.close()
    np.testing.assert_allclose(found, ridge_of(grads), rtol=1e-12)


def test_which_ridges_are_tried():
    grads = samples(40)
    mean = 4.0
    shrunk = shrinkage_ridge(stored(grads), BLOCKS, mean)
    for damp, guarded, expected in (
        ("auto", True, [0.01 * mean, shrunk]),
        ("auto", False, [shrunk]),
        ("auto", None, [0.1 * mean]),
        (0.5, True, [0.5]),
        (0.5, None, [0.5]),
    ):
        assert list(ridges(damp, stored(grads), BLOCKS, mean, guarded)) == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def task(make_mlp, rng):
    """A model and 400 examples."""
    y = rng.integers(0, 3, 400)
    x = (rng.normal(size=(400, 12)) + 2.0 * np.eye(3, 12)[y]).astype("float32")
    model = make_mlp()
    model.fit(x, y, epochs=3, verbose=0)
    return model, (x, y)


def harm(monkeypatch):
    """Makes corrections that ruin any model."""
    monkeypatch.setattr(BlockCorrector, "__call__", lambda self, removal, meter: (50.0 - 100.0 * removal.prune, None))


def kernels(model):
    return [layer.kernel.numpy() for layer in model.layers]


def test_a_harmful_correction_gives_way_to_magnitude(task, monkeypatch):
    model, data = task
    dense = model.get_weights()
    kw.prune(model, sparsity=0.6, method="magnitude", verbose=0)
    plain = kernels(model)
    harm(monkeypatch)
    model.set_weights(dense)
    report = kw.prune(model, data, 0.6, quality="fast", num_grads=32, verbose=0)
    assert report.stages[0].by_magnitude and "by magnitude" in str(report)
    for kernel, expected in zip(kernels(model), plain, strict=True):
        np.testing.assert_array_equal(kernel, expected)
    model.set_weights(dense)
    report = kw.prune(model, data, 0.6, quality="fast", num_grads=32, damp=1e-3, verbose=0)
    assert not report.stages[0].by_magnitude and np.abs(kernels(model)[0]).max() > 40


def test_the_callback_is_guarded_as_well(task, monkeypatch):
    model, data = task
    harm(monkeypatch)
    pruner = kw.WoodFisherPruning(0.6, end_epoch=1, start_epoch=1, data=data, num_grads=32, verbose=0)
    model.fit(*data, epochs=2, verbose=0, callbacks=[pruner])
    assert all(stage.by_magnitude for stage in pruner.report().stages)
    assert np.abs(kernels(model)[0]).max() < 5


@pytest.mark.parametrize(
    ("before", "magnitude", "corrected", "prefers"),
    [
        (1.0, 2.0, 1.79, False),
        (1.0, 2.0, 1.81, True),
        (1.0, 2.0, 3.0, True),
        (-5.0, -4.0, -4.21, False),
        (-5.0, -4.0, -4.19, True),
        (1.0, 0.9, 0.85, False),
        (1.0, np.inf, 5.0, False),
        (1.0, 2.0, np.inf, True),
    ],
)
def test_a_correction_must_pay_for_itself(before, magnitude, corrected, prefers):
    losses = iter([before, magnitude, corrected])
    guard = MagnitudeGuard(lambda weights, size: next(losses))
    with np.errstate(invalid="ignore"):
        assert guard.prefers_magnitude(np.zeros(3), np.zeros(3), np.zeros(3), 8) == prefers


def test_held_out_examples_are_never_sampled(task, monkeypatch):
    model, (x, y) = task
    seen = []
    original = kw.gradients.sources.SampledGradients.hold_out

    def watch(self, count):
        seen.extend(original(self, count))
        return seen

    monkeypatch.setattr(kw.gradients.sources.SampledGradients, "hold_out", watch)
    kw.prune(model, (x, y), 0.6, quality="fast", num_grads=380, verbose=0)
    assert len(seen[0][0]) == 20  # what is left beside the samples
    seen.clear()
    kw.prune(model, (x, y), 0.6, quality="fast", num_grads=390, verbose=0)
    assert not seen  # too few
    kw.prune(model, (x, y), 0.6, quality="fast", num_grads=30, damp=1e-4, verbose=0)
    assert not seen


def test_the_second_ridge_is_tried_where_the_first_is_too_small(task, monkeypatch):
    model, data = task
    asked: list[np.ndarray] = []

    def prefers(self, before, magnitude, corrected, size):
        asked.append(corrected)
        return len(asked) == 1

    monkeypatch.setattr(MagnitudeGuard, "prefers_magnitude", prefers)
    (stage,) = kw.prune(model, data, 0.6, quality="fast", num_grads=32, verbose=0).stages
    assert len(asked) == 2 and not stage.by_magnitude
    found = np.concatenate([kernel.ravel() for kernel in kernels(model)])
    np.testing.assert_array_equal(np.sort(np.abs(asked[1])), np.sort(np.abs(found)))
    assert (asked[0] != asked[1]).any()


def test_scores_of_calibrated_corrections_have_a_tenth(task):
    model, data = task
    options = {"update": "calibrated", "calibration": 40, "stages": 1, "num_grads": 32, "verbose": 0}
    (stage,) = kw.prune(model, data, 0.5, damp="auto", **options).stages
    model_ridge = stage.damp
    assert list(ridges("auto", None, [], 10 * model_ridge, None)) == pytest.approx([model_ridge])


def test_the_guard_keeps_what_helps(task):
    model, data = task
    model.compile(keras.optimizers.Adam(1e-2), model.loss)
    model.fit(*data, epochs=5, verbose=0)
    report = kw.prune(model, data, 0.8, quality="fast", num_grads=128, verbose=0)
    assert not report.stages[0].by_magnitude and 0 < report.stages[0].damp < 100
