"""Sensitivity analysis against the formulas with dense float64 matrices, and losses of models changed by hand."""

import importlib
import json
import sys

import keras
import numpy as np
import pytest
from gathering import gathered
from keras import layers, ops
from sampling import cross_entropy, truth_of

import keras_woodfisher as kw
from keras_woodfisher.gradients.loss import MeanLoss
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.model.targets import find_targets
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.fisher import BlockFisher

sensitivity_module = importlib.import_module("keras_woodfisher.oneshot.sensitivity")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LEVELS = (0.3, 0.6, 0.9)
DAMP = 1e-3


def everything(model):
    variables = [*model.variables, *(model.optimizer.variables if model.compiled else []), *model.metrics_variables]
    return [ops.convert_to_numpy(v).copy() for v in variables]


def assert_same(found, right):
    for one, other in zip(found, right, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def trained(make_mlp, blobs):
    model = make_mlp(metrics=["accuracy"])
    model.fit(*blobs, epochs=2, batch_size=16, verbose=0)
    return model


def rows_of(model, data, count, b=1):
    targets = find_targets(model, "__ALL_PRUNABLE__")
    rows = truth_of(model, targets, cross_entropy, data, count, b)
    return targets, np.split(rows, np.cumsum([t.size for t in targets])[:-1], axis=1)


def truth(grads, weights, level, size, update, b=1):
    """One variable pruned alone: its new weights, and half of `delta^T F delta`; weights that are zero stay zero."""
    kept = np.flatnonzero(weights != 0)
    blocks = [kept[start : start + size] for start in range(0, len(kept), size)]
    fishers = [DAMP * np.eye(len(block)) + grads[:, block].T @ grads[:, block] / len(grads) for block in blocks]
    scores = np.full(weights.shape, -np.inf)
    for block, fisher in zip(blocks, fishers, strict=True):
        scores[block] = weights[block] ** 2 / (2 * np.diag(np.linalg.inv(fisher)))
    pruned = np.zeros(weights.shape, bool)
    pruned[np.argsort(scores, kind="stable")[: int(np.floor(level * weights.size + 0.5))]] = True
    pruned |= weights == 0
    new, cost = weights.copy(), 0.0
    for block, fisher in zip(blocks, fishers, strict=True):
        out = pruned[block]
        delta = np.zeros(len(block))
        if update == "joint":
            coupling = np.linalg.solve(fisher[np.ix_(~out, ~out)], fisher[np.ix_(~out, out)])
            delta[~out] = coupling @ weights[block][out]
        else:
            inverse = np.linalg.inv(fisher)
            delta = -(inverse[:, out] @ (weights[block][out] / np.diag(inverse)[out]))
        delta[out] = -weights[block][out]
        new[block] += delta
        scaled = fisher + (b - 1) * (fisher - DAMP * np.eye(len(block)))
        cost += delta @ scaled @ delta / 2
    return np.where(pruned, 0.0, new), pruned, cost


def loss_with(model, target, flat, data):
    """The loss once a variable was changed; it is put back."""
    before = ops.convert_to_numpy(target.variable).copy()
    target.write(flat.astype(before.dtype))
    logits = ops.convert_to_numpy(model(data[0], training=False)).astype(float)
    target.variable.assign(before)
    logits -= logits.max(1, keepdims=True)
    return -np.mean(logits[np.arange(len(logits)), data[1]] - np.log(np.exp(logits).sum(1)))


@pytest.mark.parametrize(
    "update, size, b", [("joint", 20, 1), ("joint", None, 1), ("independent", 20, 1), ("independent", 7, 2)]
)
def test_predictions_and_losses_are_those_of_the_definition(trained, blobs, update, size, b):
    targets = find_targets(trained, "__ALL_PRUNABLE__")
    first = targets[0].read()
    first[::5] = 0.0
    targets[0].write(first)
    targets, grads = rows_of(trained, blobs, 40, b)
    before = everything(trained)
    report = kw.sensitivity(
        trained,
        blobs,
        LEVELS,
        num_grads=40,
        grad_batch_size=b,
        damp=DAMP,
        fisher_block_size=size,
        update=update,
        verbose=0,
    )
    assert_same(everything(trained), before)
    assert (report.levels, report.examples, report.samples) == (LEVELS, 96, 40)
    dense = loss_with(trained, targets[0], targets[0].read(), blobs)
    assert report.dense_loss == pytest.approx(dense, rel=1e-5)
    assert len(report.entries) == 2 * len(LEVELS)
    for entries, target, rows in zip(report.variables(), targets, grads, strict=True):
        weights = target.read().astype(float)
        for entry, level in zip(entries, LEVELS, strict=True):
            new, pruned, cost = truth(rows, weights, level, size or weights.size, update, b)
            assert (entry.name, entry.weights, entry.level) == (target.name, weights.size, level)
            assert entry.pruned == pruned.sum()
            assert entry.predicted == pytest.approx(cost, rel=2e-4)
            assert entry.measured == pytest.approx(loss_with(trained, target, new, blobs) - dense, rel=1e-3, abs=2e-5)
            assert abs(entry.measured) > 1e-4


def test_predictions_with_gauss_newton_samples(trained, blobs, backend):
    options = PruningOptions(num_grads=40, grad_batch_size=2, fisher="ggn", damp=DAMP, verbose=0)
    targets = find_targets(trained, "__ALL_PRUNABLE__")
    source = SampledGradients(trained, targets, options, backend, open_examples(blobs))
    rows = gathered(source, [np.ones(t.size, bool) for t in targets], 40).astype(float)
    grads = np.split(rows, np.cumsum([t.size for t in targets])[:-1], axis=1)
    same = {"num_grads": 40, "grad_batch_size": 2, "fisher_block_size": 20, "fisher": "ggn", "verbose": 0}
    report = kw.sensitivity(trained, blobs, [0.6], damp=DAMP, **same)
    for (entry,), target, part in zip(report.variables(), targets, grads, strict=True):
        # Such a sample doesn't shrink with the examples in it: nothing is to be scaled.
        cost = truth(part, target.read().astype(float), 0.6, 20, "joint")[2]
        assert entry.predicted == pytest.approx(cost, rel=2e-4)
    automatic = kw.sensitivity(trained, blobs, [0.6], damp="auto", **same)
    chosen = kw.sensitivity(trained, blobs, [0.6], damp=0.1 * float(np.square(rows).mean()), **same)
    for one, other in zip(automatic.entries, chosen.entries, strict=True):
        assert one.predicted == pytest.approx(other.predicted, rel=1e-4)
    with pytest.raises(ValueError, match="update must be one of 'joint', 'independent', got 'calibrated'"):
        kw.sensitivity(trained, blobs, [0.6], update="calibrated", verbose=0)


def test_one_variable_alone_costs_as_much_as_pruning_it(trained, blobs):
    """The same masks and corrections as `prune` makes."""
    options = {"num_grads": 32, "damp": DAMP, "fisher_block_size": 13, "verbose": 0}
    report = kw.sensitivity(trained, blobs, [0.8], **options)
    for entry in report.entries:
        twin = keras.models.clone_model(trained)
        twin.set_weights(trained.get_weights())
        pruned = kw.prune(twin, blobs, 0.8, loss=LOSS, params=[entry.name], quality="fast", **options)
        assert pruned.pruned == entry.pruned
        after = float(LOSS(blobs[1], twin(blobs[0], training=False)))
        assert entry.measured == pytest.approx(after - report.dense_loss, rel=1e-3, abs=1e-5)


def test_magnitude_predicts_nothing(trained, blobs):
    before = everything(trained)
    report = kw.sensitivity(trained, None, LEVELS, eval_data=blobs, method="magnitude", verbose=0)
    assert_same(everything(trained), before)
    assert report.samples == 0 and not report.predicts
    for entries, target in zip(report.variables(), find_targets(trained, "__ALL_PRUNABLE__"), strict=True):
        weights = target.read()
        for entry in entries:
            new = weights.copy()
            new[np.argsort(np.abs(weights))[: int(np.floor(entry.level * new.size + 0.5))]] = 0.0
            assert entry.predicted is None
            increase = loss_with(trained, target, new, blobs) - report.dense_loss
            assert entry.measured == pytest.approx(increase, rel=1e-3, abs=1e-5)
    assert "predicted" not in str(report)


def test_reconstruction_of_one_variable_while_all_others_are_dense(trained, blobs, monkeypatch):
    seen = []
    measure = sensitivity_module._MeasuredLoss.loss_with

    def watched(self, place, flat, pruned):
        seen.append((place, flat, pruned))
        return measure(self, place, flat, pruned)

    monkeypatch.setattr(sensitivity_module._MeasuredLoss, "loss_with", watched)
    before = everything(trained)
    report = kw.sensitivity(trained, blobs[0], [0.5, 0.8], eval_data=blobs, method="reconstruct", verbose=0)
    assert_same(everything(trained), before)
    assert report.samples == 0 and not report.predicts and "relative error of the layer's output" in str(report)
    targets = find_targets(trained, "__ALL_PRUNABLE__")
    features = blobs[0].astype(float), ops.convert_to_numpy(trained.layers[0](blobs[0])).astype(float)
    entries = {(entry.name, entry.level): entry for entry in report.entries}
    for (place, flat, pruned), level in zip(seen, (0.5, 0.5, 0.8, 0.8), strict=True):
        target, x = targets[place], features[place]
        entry, dense = entries[target.name, level], target.unflatten(target.read())
        assert entry.pruned == pruned.sum() == int(np.floor(level * target.size + 0.5)) and entry.predicted is None
        assert not flat[pruned].any()

        def error(kernel, x=x, dense=dense):
            return np.square(x @ (kernel - dense)).sum() / np.square(x @ dense).sum()

        assert entry.output_error == pytest.approx(error(target.unflatten(flat)), rel=1e-3)
        smallest = np.argsort(np.abs(target.read()))[: entry.pruned]
        by_magnitude = target.read()
        by_magnitude[smallest] = 0.0
        assert entry.output_error < error(target.unflatten(by_magnitude))
        increase = loss_with(trained, target, flat, blobs) - report.dense_loss
        assert entry.measured == pytest.approx(increase, rel=1e-3, abs=1e-5)


def test_a_level_below_the_zeros_that_are_there_changes_nothing(trained, blobs):
    kernel = find_targets(trained, ["hidden/kernel"])[0]
    flat = kernel.read()
    flat[: int(0.7 * flat.size)] = 0.0
    kernel.write(flat)
    report = kw.sensitivity(trained, blobs, [0.5, 0.9], params=["hidden/kernel"], num_grads=16, verbose=0)
    low, high = report.entries
    assert (low.pruned, low.predicted, low.measured) == (int(0.7 * flat.size), 0.0, 0.0)
    assert high.pruned == int(np.floor(0.9 * flat.size + 0.5)) and high.predicted > 0


@pytest.mark.parametrize(
    "where", [{"grads_device": "disk"}, {"grads_dtype": "float16"}, {"available_gpus": ["cpu", "cpu:0"]}]
)
def test_the_place_of_gradients_makes_no_difference(trained, blobs, where):
    options = {"num_grads": 32, "fisher_block_size": 9, "damp": DAMP, "verbose": 0}
    here = kw.sensitivity(trained, blobs, LEVELS, **options)
    there = kw.sensitivity(trained, blobs, LEVELS, **options, **where)
    for one, other in zip(here.entries, there.entries, strict=True):
        assert other.predicted == pytest.approx(one.predicted, rel=5e-3)
        assert other.measured == pytest.approx(one.measured, rel=5e-2, abs=1e-4)


def test_gradients_are_sampled_once(trained, blobs, monkeypatch):
    fills, inverses = [], []
    fill, inverse = SampledGradients.fill, BlockFisher.inverse_diagonal
    monkeypatch.setattr(SampledGradients, "fill", lambda self, *a: (fills.append(1), fill(self, *a))[1])
    monkeypatch.setattr(BlockFisher, "inverse_diagonal", lambda self, *a: (inverses.append(1), inverse(self, *a))[1])
    kw.sensitivity(trained, blobs, LEVELS, num_grads=16, verbose=0)
    assert (len(fills), len(inverses)) == (1, 1)


def test_losses_are_measured_on_the_data_that_was_given(trained, blobs, rng):
    held_out = rng.normal(size=(40, 12)).astype("float32"), rng.integers(0, 3, 40).astype("int32")
    options = {"num_grads": 16, "verbose": 0}
    report = kw.sensitivity(trained, blobs, [0.5], eval_data=held_out, **options)
    assert report.examples == 40
    assert report.dense_loss == pytest.approx(trained.evaluate(*held_out, verbose=0)[0], rel=1e-4)
    few = kw.sensitivity(trained, blobs, [0.5], eval_data=held_out, num_examples=7, seed=5, **options)
    chosen = np.random.default_rng(5).permutation(40)[:7]
    assert few.examples == 7
    assert few.dense_loss == pytest.approx(trained.evaluate(*(a[chosen] for a in held_out), verbose=0)[0], rel=1e-4)
    # The prediction is of the gradients alone.
    assert kw.sensitivity(trained, blobs, [0.5], **options).entries[0].predicted == report.entries[0].predicted
    batches = kw.sensitivity(trained, blobs, [0.5], eval_data=held_out, batch_size=3, **options)
    assert batches.entries[0].measured == pytest.approx(report.entries[0].measured, rel=1e-3, abs=1e-6)


def test_a_constraint_of_a_variable_holds(blobs):
    model = keras.Sequential([layers.Input((12,)), layers.Dense(8, kernel_constraint="non_neg"), layers.Dense(3)])
    kernel = model.layers[0].kernel
    kernel.assign(np.abs(ops.convert_to_numpy(kernel)))
    options = {"loss": LOSS, "num_grads": 16, "damp": 1e-7, "verbose": 0}
    report = kw.sensitivity(model, blobs, [0.7], params=["dense/kernel", "re:.*dense.*/kernel"], **options)
    kw.prune(model, blobs, 0.7, params=[report.entries[0].name], quality="fast", **options)
    assert ops.convert_to_numpy(kernel).min() >= 0
    after = float(LOSS(blobs[1], model(blobs[0], training=False)))
    assert report.entries[0].measured == pytest.approx(after - report.dense_loss, rel=1e-3, abs=1e-5)


def test_a_model_with_batchnorm_and_dropout_that_is_not_compiled(blobs):
    inputs = layers.Input((12,))
    x = layers.Dropout(0.5)(layers.BatchNormalization()(layers.Dense(8, "relu")(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(x))
    before = everything(model)
    report = kw.sensitivity(model, blobs, [0.5], loss=LOSS, exclude=["re:.*dense_1"], num_grads=16, verbose=0)
    assert len(report.entries) == 1 and not model.compiled
    assert_same(everything(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_changes_nothing(trained, blobs, monkeypatch, error):
    before, measured = everything(trained), MeanLoss.__call__
    calls = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return measured(*args)

    monkeypatch.setattr(MeanLoss, "__call__", failing)
    with pytest.raises(error):
        kw.sensitivity(trained, blobs, LEVELS, num_grads=16, verbose=0)
    assert_same(everything(trained), before)
    monkeypatch.undo()
    trained.fit(*blobs, epochs=1, verbose=0)


def test_progress_is_shown(trained, blobs, capsys):
    report = kw.sensitivity(trained, blobs, [0.5, 0.9], num_grads=16, verbose=1)
    shown = capsys.readouterr().out
    names = ["gradients", "inverse", "update at 0.5", "loss at 0.5", "update at 0.9", "loss at 0.9"]
    assert [phase.name for phase in report.phases] == names
    assert all(f"WoodFisher pruning: {name}" in shown for name in names)
    kw.sensitivity(trained, blobs, [0.5], num_grads=16, verbose=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "error, message, kwargs",
    [
        (ValueError, "sensitivity needs data to take gradients of", {"data": None}),
        (ValueError, "needs data to take gradients of", {"data": None, "eval_data": "blobs"}),
        (ValueError, "needs examples to measure losses on", {"data": None, "method": "magnitude"}),
        (ValueError, r"a level must lie in \[0, 1\), got 80.*write 0.8 for 80 %", {"levels": [80]}),
        (ValueError, "levels must be sparsities that differ, at least one, got \\[\\]", {"levels": []}),
        (ValueError, "levels must be sparsities that differ", {"levels": [0.5, 0.5]}),
        (TypeError, r"levels must be a list of sparsities such as \[0.5, 0.7.*got 0.9", {"levels": 0.9}),
        (TypeError, "a level must be a fraction", {"levels": ["0.9"]}),
        (ValueError, "num_examples must be at least 1", {"num_examples": 0}),
        (ValueError, "num_grads=97 with .* needs 97 examples.*num_grads=96 would fit", {"num_grads": 97}),
        (ValueError, "update must be one of", {"update": "both"}),
        (KeyError, "params names 'nothing'", {"params": ["nothing"]}),
        (ValueError, "isn't compiled with a loss, so there is nothing to measure", {"compile": False}),
        (ValueError, "loss of the first examples in data can't be computed", {"eval_data": "no labels"}),
        (MemoryError, "num_grads", {"data": "endless", "num_grads": 10**10}),
    ],
)
def test_errors_come_before_any_work(make_mlp, blobs, error, message, kwargs):
    known = {
        "blobs": blobs,
        "no labels": blobs[0],
        "endless": lambda: iter([(np.ones((2, 12), "float32"), np.zeros(2, "int32"))]),
    }
    kwargs = {name: known.get(value, value) if isinstance(value, str) else value for name, value in kwargs.items()}
    model = make_mlp(compile=kwargs.pop("compile", True))
    before = everything(model)
    with pytest.raises(error, match=message):
        kw.sensitivity(model, **({"data": blobs, "verbose": 0} | kwargs))
    assert_same(everything(model), before)


def test_what_is_not_finite_is_told(make_mlp, blobs):
    model = make_mlp()
    with pytest.raises(FloatingPointError, match="loss of the model as it is is nan"):
        kw.sensitivity(model, blobs, eval_data=(np.full((4, 12), np.nan, "float32"), blobs[1][:4]), verbose=0)
    kernel = model.layers[0].kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(FloatingPointError, match="is nan"):
        kw.sensitivity(model, blobs, verbose=0)


# The report.


def report_of_two():
    entries = [
        kw.Sensitivity("net/a/kernel", 1000, 0.5, 500, 0.001, 0.002),
        kw.Sensitivity("net/a/kernel", 1000, 0.9, 900, 0.25, 1.5),
        # Two variables may have the same name.
        kw.Sensitivity("net/a/kernel", 20, 0.5, 10, 0.003, -0.0001),
        kw.Sensitivity("net/a/kernel", 20, 0.9, 18, 0.5, 0.75),
    ]
    return kw.SensitivityReport(tuple(entries), (0.5, 0.9), 0.1234, 2048, 64)


def test_tables():
    assert str(report_of_two()).split("\n") == [
        "loss without pruning: 0.1234, on 2,048 examples",
        "",
        "increase of the loss when one variable alone is pruned, measured",
        "variable      weights      0.5     0.9",
        "--------------------------------------",
        "net/a/kernel    1,000   0.0020  1.5000",
        "net/a/kernel       20  -0.0001  0.7500",
        "",
        "increase of the loss, predicted by the Fisher",
        "variable      weights      0.5      0.9",
        "---------------------------------------",
        "net/a/kernel    1,000  1.0e-03  2.5e-01",
        "net/a/kernel       20  3.0e-03  5.0e-01",
    ]


def test_plain_data():
    data = json.loads(json.dumps(report_of_two().as_dict()))
    assert data["levels"] == [0.5, 0.9]
    assert (data["dense_loss"], data["examples"], data["samples"], data["phases"]) == (0.1234, 2048, 64, [])
    assert data["entries"][1] == {
        "name": "net/a/kernel",
        "weights": 1000,
        "level": 0.9,
        "pruned": 900,
        "predicted": 0.25,
        "measured": 1.5,
        "output_error": None,
        "note": "",
    }


@pytest.fixture
def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Tests of programs that draw may have left some.
    pyplot.close("all")
    yield pyplot
    pyplot.close("all")


def test_plot_shows_a_measured_and_a_predicted_curve_a_variable(pyplot):
    axes = report_of_two().plot()
    curves = [list(line.get_ydata()) for line in axes.lines[:4]]
    assert curves == [[0.002, 1.5], [0.001, 0.25], [-0.0001, 0.75], [0.003, 0.5]]
    assert all(list(line.get_xdata()) == [0.5, 0.9] for line in axes.lines[:4])
    assert axes.lines[0].get_color() == axes.lines[1].get_color() != axes.lines[2].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["net/a/kernel"] * 2
    _, own = pyplot.subplots()
    assert report_of_two().plot(ax=own) is own
    assert len(pyplot.get_fignums()) == 2


def test_plot_without_predictions(pyplot):
    entry = kw.Sensitivity("a", 10, 0.5, 5, None, 0.5)
    axes = kw.SensitivityReport((entry,), (0.5,), 0.1, 10).plot()
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5], [0.0, 0.0]]
    assert "predicted" not in axes.get_ylabel()


@pytest.mark.parametrize("report", ["sensitivity", "sparsity"])
def test_plot_on_what_is_no_axes(make_mlp, report):
    drawn = report_of_two() if report == "sensitivity" else kw.sparsity_report(make_mlp())
    with pytest.raises(TypeError, match=r"got 'curves.png'. To write a file: plot\(\).figure.savefig"):
        drawn.plot("curves.png")


def test_plot_without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib.*pip install 'keras-woodfisher\[plot\]'"):
        report_of_two().plot()


@pytest.mark.parametrize("b", [1, 2])
def test_of_a_sum_over_examples_the_prediction_is_that_of_their_mean(b, make_mlp, blobs):
    # Fewer weights than samples, and no softmax, which a shift of all logits leaves as it is: no change is free, and
    # the ridge hardly counts.
    model, data = make_mlp(units=2), (blobs[0], np.eye(3, dtype="float32")[blobs[1]])
    found = {}
    for reduction in ("sum", "sum_over_batch_size"):
        # The ridge is of samples that are b times as large.
        damp = 1e-8 * (b**2 if reduction == "sum" else 1)
        loss = keras.losses.MeanSquaredError(reduction=reduction)
        found[reduction] = kw.sensitivity(
            model, data, levels=(0.5,), loss=loss, num_grads=48, grad_batch_size=b, damp=damp, verbose=0
        )
    pairs = zip(*(report.entries for report in found.values()), strict=True)
    for of_sum, of_mean in pairs:
        assert of_sum.predicted == pytest.approx(of_mean.predicted, rel=1e-2)
        assert of_sum.measured == pytest.approx(of_mean.measured, rel=1e-3, abs=1e-6)


def test_what_could_not_be_reconstructed_is_told(rng):
    class Mixing(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 5), name="w")

        def call(self, x):
            return x @ self.w

    model = keras.Sequential([keras.Input((4,)), Mixing(name="mix"), keras.layers.Dense(2, name="out")], name="m")
    model.compile(loss="mse")
    data = rng.normal(size=(32, 4)).astype("float32"), rng.normal(size=(32, 2)).astype("float32")
    report = kw.sensitivity(model, data, levels=[0.4], params="__ALL__", method="reconstruct", verbose=0)
    why = "its layer isn't a product of its input"
    assert {entry.name: entry.note for entry in report.entries} == {"m/mix/w": why, "m/out/kernel": ""}
    assert f"by magnitude: m/mix/w, since {why}" in str(report)
    assert [entry["note"] for entry in report.as_dict()["entries"]] == [why, ""]
