"""`prune` with presets: stages, Gauss-Newton samples and calibrated corrections, end to end."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_woodfisher as kw
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.pruning.corrections import CalibratedCorrector

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(scope="module")
def digits():
    """Three classes of points that a small net tells apart, but not perfectly."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 400).astype("int32")
    centres = rng.normal(size=(3, 10))
    return (centres[y] + rng.normal(size=(400, 10))).astype("float32"), y


@pytest.fixture(scope="module")
def trained(digits):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [layers.Input((10,)), layers.Dense(24, "relu"), layers.Dense(24, "relu"), layers.Dense(3, name="logits")]
    )
    model.compile(keras.optimizers.Adam(1e-2), LOGITS)
    # The same net on every backend.
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(scale=0.25, size=w.shape) * (w.ndim == 2) for w in model.get_weights()])
    model.fit(*digits, epochs=8, shuffle=False, verbose=0)
    return model, model.get_weights()


@pytest.fixture
def model(trained):
    model, weights = trained
    model.set_weights(weights)
    yield model
    model.set_weights(weights)


def loss_of(model, data):
    return float(model.evaluate(*data, verbose=0))


def test_balanced_beats_fast_and_magnitude(model, digits):
    weights, losses, reports = model.get_weights(), {}, {}
    for name, how in {
        "balanced": {"method": "woodfisher"},
        "fast": {"quality": "fast"},
        "magnitude": {"method": "magnitude"},
    }.items():
        model.set_weights(weights)
        reports[name] = kw.prune(model, digits, 0.85, verbose=0, **how)
        losses[name] = loss_of(model, digits)
        assert reports[name].sparsity == pytest.approx(0.85, abs=1e-3)
    assert losses["balanced"] < min(losses["fast"], losses["magnitude"])
    report = reports["balanced"]
    assert report.settings["quality"] == "balanced" and report.settings["fisher"] == "ggn"
    assert len(report.stages) == report.settings["stages"]
    assert report.samples == sum(stage.samples for stage in report.stages)
    assert [phase.name for phase in report.phases] == ["gradients", "inverse", "update", "calibration"]
    sparsities = [stage.sparsity for stage in report.stages]
    assert sparsities == sorted(sparsities) and sparsities[-1] == report.sparsity
    for stage in report.stages:
        assert stage.calibration.loss <= stage.calibration.loss_removed
        assert stage.damp > 0
    text = str(report)
    assert "compensation" in text and "quality='balanced'" in text
    assert len(report.as_dict()["stages"]) == len(report.stages)


def test_more_work_is_better(model, digits):
    weights, losses = model.get_weights(), []
    for stages in (1, 6):
        model.set_weights(weights)
        kw.prune(model, digits, 0.9, stages=stages, verbose=0)
        losses.append(loss_of(model, digits))
    assert losses[1] < losses[0]


def test_newton_steps_lower_the_held_out_loss(model, digits):
    weights, chosen = model.get_weights(), []
    for steps in (0, 1, 3):
        model.set_weights(weights)
        report = kw.prune(model, digits, 0.9, stages=1, newton_steps=steps, calibration=100, verbose=0)
        chosen.append(report.stages[0].calibration)
    assert [len(calibration.steps) for calibration in chosen] == [0, 1, 3]
    assert len({calibration.compensation for calibration in chosen}) == 1
    examples = [calibration.examples for calibration in chosen]
    assert 0 == examples[0] < examples[1] <= 300 and examples[2] == 3 * examples[1]
    assert chosen[2].loss < chosen[1].loss < chosen[0].loss <= chosen[0].loss_removed


@pytest.mark.parametrize("number", [150, 260])
def test_streams_that_hold_few_examples(model, digits, number):
    x, y = (part[:number] for part in digits)
    weights, reports = model.get_weights(), []
    for data in ((x, y), lambda: ((x[i : i + 32], y[i : i + 32]) for i in range(0, number, 32))):
        model.set_weights(weights)
        reports.append(kw.prune(model, data, 0.5, method="woodfisher", verbose=0))
    fields = ("stages", "num_grads", "grad_batch_size", "update", "calibration", "newton_steps")
    one, other = ({name: report.settings[name] for name in fields} for report in reports)
    assert one == other
    assert one["update"] == ("joint" if number < 200 else "calibrated")
    assert reports[0].samples == reports[1].samples
    for report in reports:
        assert any("fewer than 200 examples" in note for note in report.notes) == (number < 200)


def test_magnitude_says_which_options_have_no_effect(model, digits):
    report = kw.prune(model, digits, 0.5, method="magnitude", newton_steps=3, stages=2, verbose=0)
    assert report.notes == (
        "method='magnitude' takes no gradients and corrects nothing: stages, newton_steps had no effect.",
    )
    assert kw.prune(model, digits, 0.6, method="magnitude", verbose=0).notes == ()


def test_nothing_was_left_to_prune(model, digits):
    before = kw.prune(model, digits, 0.9, method="magnitude", verbose=0)
    report = kw.prune(model, digits, 0.5, quality="fast", verbose=0)
    assert report.sparsity == before.sparsity
    assert report.notes == (
        f"nothing was left to prune: the chosen weights were at sparsity {before.sparsity:.4f} before.",
    )
    assert report.notes[0] in str(report)


@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
def test_a_sum_over_examples_is_corrected_like_their_mean(model, digits, fisher):
    weights, after, chosen = model.get_weights(), [], []
    for reduction in ("sum_over_batch_size", "sum"):
        model.set_weights(weights)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        options = {"stages": 1, "newton_steps": 2, "num_grads": 40, "grad_batch_size": 4, "calibration": 100}
        report = kw.prune(model, digits, 0.85, loss=loss, fisher=fisher, verbose=0, **options)
        after.append(model.get_weights())
        chosen.append(report.stages[0].calibration)
    assert len(chosen[0].steps) == 2
    assert chosen[1].loss == pytest.approx(chosen[0].loss, rel=1e-3)
    for one, other in zip(*after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)


def test_what_is_given_wins_over_the_preset(model, digits):
    given = {"stages": 2, "num_grads": 30, "grad_batch_size": 3, "damp": 0.01, "fisher": "empirical", "calibration": 20}
    report = kw.prune(model, digits, 0.5, quality="best", verbose=0, **given)
    assert {name: report.settings[name] for name in given} == given
    assert [(stage.samples, stage.damp) for stage in report.stages] == [(30, 0.01)] * 2
    chosen = {stage.calibration.compensation for stage in report.stages}
    assert chosen <= {0.01, None}


def test_blocks_in_stages(model, digits):
    report = kw.prune(model, digits, 0.5, stages=3, update="joint", damp=1e-3, verbose=0)
    assert [stage.calibration for stage in report.stages] == [None] * 3
    assert [phase.name for phase in report.phases] == ["gradients", "inverse", "update"]


def test_held_out_examples_are_not_sampled(model, digits, monkeypatch):
    x, y = digits
    marked = np.concatenate([np.arange(len(x), dtype="float32")[:, None], x[:, 1:]], axis=1)
    held, sampled = [], []
    hold_out, fill = SampledGradients.hold_out, SampledGradients.fill

    def watch_held(self, count):
        held.append(hold_out(self, count))
        return held[0]

    def watch_fill(self, *args):
        groups = self._examples.groups(10**6, 1, 0)
        sampled.extend(np.concatenate([batch[0][:, 0, 0] for batch in groups]).tolist())
        return fill(self, *args)

    monkeypatch.setattr(SampledGradients, "hold_out", watch_held)
    monkeypatch.setattr(SampledGradients, "fill", watch_fill)
    kw.prune(model, (marked, y), 0.5, stages=1, calibration=50, num_grads=20, verbose=0)
    aside = np.concatenate([batch[0][:, 0] for batch in held[0]])
    assert len(set(aside)) == 50
    assert not set(aside) & set(sampled)
    assert set(aside) | set(sampled) == set(range(400))


@pytest.mark.parametrize("kind", ["arrays", "stream"])
def test_other_examples_to_calibrate_on(model, digits, kind):
    x, y = digits
    other = (x[:64], y[:64])
    given = other if kind == "arrays" else lambda: iter([(x[:40], y[:40]), (x[40:64], y[40:64])])
    report = kw.prune(model, (x[64:], y[64:]), 0.6, stages=2, calibration=given, num_grads=40, verbose=0)
    assert report.settings["calibration"] == "given"
    assert report.stages[-1].calibration.loss == pytest.approx(loss_of(model, other), rel=1e-4)


def test_calibrated_where_gradients_are_not_in_memory(model, digits):
    weights, found = model.get_weights(), []
    for how in ({}, {"grads_device": "disk"}):
        model.set_weights(weights)
        kw.prune(model, digits, 0.6, stages=2, num_grads=40, verbose=0, **how)
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_loss_without_a_known_curvature_falls_back_and_says_so(model, digits):
    huber = lambda y, z: ops.mean(ops.abs(ops.one_hot(y, 3) - z))  # noqa: E731
    report = kw.prune(model, digits, 0.5, loss=huber, num_grads=40, stages=1, verbose=0)
    assert report.settings["fisher"] == "empirical"
    assert any("fisher='empirical' instead of 'ggn'" in note for note in report.notes)
    with pytest.raises(ValueError, match="fisher='ggn' needs a loss whose curvature is known"):
        kw.prune(model, digits, 0.5, loss=huber, fisher="ggn", verbose=0)


def test_a_failure_amid_the_stages_leaves_everything_as_it_was(model, digits, monkeypatch):
    before = model.get_weights()
    correct, calls = CalibratedCorrector.__call__, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return correct(self, *args)

    monkeypatch.setattr(CalibratedCorrector, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        kw.prune(model, digits, 0.8, method="woodfisher", verbose=0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_too_many_examples_held_out(model, digits):
    with pytest.raises(ValueError, match=r"calibration=400 sets aside 400 examples, but data holds 400"):
        kw.prune(model, digits, 0.5, calibration=400, verbose=0)


def test_gauss_newton_samples_and_stages_in_training(model, digits):
    pruner = kw.WoodFisherPruning(
        0.7, end_epoch=1, data=digits, fisher="ggn", damp="auto", num_grads=32, num_recomputations=2, verbose=0
    )
    assert kw.WoodFisherPruning.from_config(pruner.get_config()).get_config() == pruner.get_config()
    model.fit(*digits, epochs=2, verbose=0, callbacks=[pruner])
    assert pruner.sparsity == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"fisher": "ggn"}, "fisher='ggn' needs data to sample from"),
        ({"num_recomputations": 2}, "num_recomputations=2 needs data to sample from"),
    ],
)
def test_buffered_gradients_are_all_there_is(model, digits, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.fit(*digits, epochs=1, verbose=0, callbacks=[kw.WoodFisherPruning(0.5, end_epoch=1, **kwargs)])
    with pytest.raises(ValueError, match="update='calibrated' is for prune"):
        kw.WoodFisherPruning(0.5, end_epoch=1, update="calibrated")


def test_each_stage_takes_as_many_samples_as_its_sparsity_asks_for(model, digits):
    counts = {0.0: 20, 0.5: 40, 0.95: 10**6}
    report = kw.prune(model, digits, 0.9, stages=4, num_grads=counts, calibration=50, grad_batch_size=2, verbose=0)
    before = [0.0, *(stage.sparsity for stage in report.stages)]
    assert [stage.samples for stage in report.stages] == [40 if sparsity >= 0.5 else 20 for sparsity in before[:-1]]
    assert {stage.samples for stage in report.stages} == {20, 40}


def test_nothing_is_left_to_correct(model, digits):
    last = model.layers[-1]
    report = kw.prune(model, digits, 0.995, params=[last.kernel.path], stages=2, num_grads=20, verbose=0)
    assert report.sparsity == 1.0
    assert not keras.ops.convert_to_numpy(last.kernel).any()
    calibration = report.stages[-1].calibration
    assert calibration.steps == () and calibration.compensation is None and calibration.examples == 0
    assert np.isfinite(calibration.loss) and calibration.loss == calibration.loss_removed


@pytest.mark.parametrize("given", [True, False])
def test_a_loss_that_is_not_finite_can_not_choose(model, digits, given):
    x, y = digits
    spoilt = x.copy()
    spoilt[::2] = np.nan
    data, calibration = ((x, y), (spoilt, y)) if given else ((spoilt, y), 200)
    before = model.get_weights()
    with pytest.raises(ValueError, match="loss on the examples that are held out to calibrate by isn't finite"):
        kw.prune(model, data, 0.5, num_grads=20, grad_batch_size=1, calibration=calibration, verbose=0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_examples_to_calibrate_on_have_to_fit_the_model(model, digits):
    with pytest.raises(ValueError, match=r"The examples in calibration don't fit the model\. data holds no labels"):
        kw.prune(model, digits, 0.5, calibration=digits[0][:40], verbose=0)
    with pytest.raises(ValueError, match="a key of sparsity must lie in"):
        kw.prune(model, digits, {1.5: ["re:.*"]}, verbose=0)


def test_the_report_names_the_pattern(model, digits):
    report = kw.prune(model, digits, 0.5, mask_type="2:4", quality="fast", num_grads=20, verbose=0)
    assert report.settings["mask_type"] == "2:4"
    assert "mask_type" not in kw.prune(model, digits, 0.6, quality="fast", num_grads=20, verbose=0).settings


def test_where_curvature_vanishes_gradients_are_taken(model, digits):
    """Outputs as sure as can be: the curvature of each is zero, but wrong ones still have a gradient."""
    last = model.layers[-1]
    last.kernel.assign(1e5 * last.kernel)
    before = model.get_weights()
    with pytest.warns(UserWarning, match="gradient samples are zero or not finite and were dropped"):
        report = kw.prune(model, digits, 0.5, method="woodfisher", stages=1, newton_steps=0, verbose=0)
    assert report.sparsity == 0.5 and report.settings["fisher"] == "empirical"
    assert any("instead of 'ggn': in the first stage 360 of 360 gradient samples" in note for note in report.notes)
    model.set_weights(before)
    with pytest.raises(ValueError, match="No usable gradient sample: 360 of 360"):
        kw.prune(model, digits, 0.5, fisher="ggn", stages=1, verbose=0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
