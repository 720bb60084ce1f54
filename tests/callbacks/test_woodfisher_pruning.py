"""When WoodFisherPruning prunes, what it promises, and what it refuses before the first batch."""

import csv
import json
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_woodfisher as kw
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.pruning.pruner import Pruner

BACKEND = keras.backend.backend()


def of(final=0.5, end_epoch=1, **kwargs):
    return kw.WoodFisherPruning(final, end_epoch=end_epoch, **{"method": "magnitude", "verbose": 0} | kwargs)


class Trace(keras.callbacks.Callback):
    """The sparsity after each batch, as the logs have it and as the weights have it, and at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.batches, self.epochs, self.validated = [], [], []

    def _zeros(self):
        report = kw.sparsity_report(self.model)
        return round(report.sparsity, 3)

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(self._zeros())
        assert abs(logs["sparsity"] - self.batches[-1]) < 1e-3

    def on_test_begin(self, logs=None):
        self.validated.append(self._zeros())

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(self._zeros())
        assert abs(logs["sparsity"] - self.epochs[-1]) < 1e-3


def trace(model, data, pruner, steps=3, others=(), **kwargs):
    x, y = (part[: steps * 16] for part in data)
    watch = Trace()
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[pruner, watch, *others], **kwargs)
    return watch


@pytest.fixture
def model(make_mlp):
    """192 + 48 = 240 weights in all."""
    return make_mlp(keras.optimizers.SGD(0.01), units=16, run_eagerly=BACKEND != "jax")


def steps_of(pattern):
    return [float(part) for part in pattern.split()]


def test_each_variable_has_a_final_sparsity_of_its_own(model, blobs):
    pruner = kw.WoodFisherPruning(
        {0.5: ["hidden/kernel"], 0.75: ["re:.*kernel"]}, init_sparsity=0.25, end_epoch=1, data=blobs, verbose=0
    )
    plan = pruner.plan(model, steps_per_epoch=4, epochs=2)
    trace(model, blobs, pruner, epochs=2)
    report = {v.name.split("/")[-2]: v for v in kw.sparsity_report(model).variables}
    # The first name that matches counts.
    assert (report["hidden"].sparsity, report["out"].sparsity) == (0.5, 0.75)
    assert [(u.epoch, u.step, u.sparsity) for u in plan] == [(0, 0, 0.25), (1, 0, pytest.approx(0.55))]


def test_the_plan_is_what_the_run_does(model, blobs, monkeypatch):
    pruner = of(
        0.6,
        2.5,
        start_epoch=0.3,
        update_frequency=0.1,
        init_sparsity=0.1,
        num_grads={0.0: 3, 0.3: 5, 0.5: 7},
        method="woodfisher",
        data=blobs,
    )
    planned = pruner.plan(model, steps_per_epoch=3, epochs=3)
    done = []
    update = Pruner.update

    def seen(self, sparsity, source, rows, *others):
        kept = sum(int((~p).sum()) for p in self.pruned)
        outcome = update(self, sparsity, source, rows, *others)
        done.append((pruner._progress.epoch, self.sparsity, rows if source else 0, kept))
        return outcome

    monkeypatch.setattr(Pruner, "update", seen)
    trace(model, blobs, pruner, epochs=3)
    real = [u for u in planned if u.num_grads or u.sparsity > 1 - u.kept / 240]
    assert len(real) > 6
    assert [(u.epoch, pytest.approx(u.sparsity), u.num_grads, u.kept) for u in real] == done


@pytest.mark.parametrize(
    ("settings", "epochs", "expected"),
    [
        # At 3 steps an epoch 0.5 lies between two batches: the update waits for the next one, and the grid stays.
        ({"update_frequency": 0.5, "end_epoch": 2}, 3, "0 0 .125 .25 .25 .375 .5 .5 .5"),
        ({"update_frequency": 0.5, "end_epoch": 1.5, "start_epoch": 0.5}, 2, "0 0 0 .25 .25 .5"),
        # Trained for exactly end_epoch epochs, the last update comes after the last batch.
        ({"end_epoch": 2}, 2, "0 0 0 .25 .25 .5"),
        ({"end_epoch": 1.7}, 2, "0 0 0 .294 .294 .5"),
        ({"end_epoch": 1, "start_epoch": 1}, 2, "0 0 0 .5 .5 .5"),
        ({"end_epoch": 0}, 1, ".5 .5 .5"),
        ({"end_epoch": 1, "start_epoch": 1}, 1, "0 0 .5"),
        ({"end_epoch": 1, "start_epoch": -1, "init_sparsity": 0.25}, 1, ".25 .25 .5"),
        ({"end_epoch": 1, "update_frequency": 0}, 2, "0 .167 .333 .5 .5 .5"),
        ({"end_epoch": 1, "update_frequency": -1, "start_epoch": 0.3}, 1, "0 .024 .5"),
    ],
)
def test_fixed_grid(model, blobs, settings, epochs, expected):
    pruner = of(**{"inter_func": "linear"} | settings)
    watch = trace(model, blobs, pruner, epochs=epochs, validation_data=blobs)
    np.testing.assert_allclose(watch.batches, steps_of(expected), atol=3e-3)
    assert watch.validated == watch.epochs == watch.batches[2::3]
    assert pruner.sparsity == 0.5


@pytest.mark.parametrize(("name", "middle"), [("linear", 0.3), ("cubic", 0.525), ("inverse_cubic", 0.124)])
def test_interpolations(model, blobs, name, middle):
    watch = trace(model, blobs, of(0.6, 2, inter_func=name), epochs=2, steps=1)
    # One step an epoch works, too.
    np.testing.assert_allclose(watch.batches, [0.0, 0.6], atol=3e-3)
    assert watch.epochs[-1] == 0.6
    watch = trace(model, blobs, of(0.9, 2, init_sparsity=0.6, inter_func=name), epochs=3, steps=1)
    np.testing.assert_allclose(watch.batches, [0.6, 0.6 + middle / 2, 0.9], atol=3e-3)


def test_everything_sees_the_last_update(model, blobs, tmp_path, capsys):
    log, path = tmp_path / "log.csv", tmp_path / "{epoch}.keras"
    pruner = of(end_epoch=2, verbose=1, method="woodfisher", data=blobs, num_grads=8)
    others = [keras.callbacks.CSVLogger(log), keras.callbacks.ModelCheckpoint(path)]
    history = model.fit(*blobs, epochs=2, verbose=0, callbacks=[pruner, *others])
    assert history.history["sparsity"][-1] == pruner.sparsity == 0.5
    rows = list(csv.DictReader(log.open()))
    assert [round(float(row["sparsity"]), 3) for row in rows] == [round(s, 3) for s in history.history["sparsity"]]
    assert kw.sparsity_report(keras.saving.load_model(tmp_path / "2.keras")).sparsity == 0.5
    text = capsys.readouterr().out
    assert "WoodFisher pruning: gradients" in text
    assert "8/8" in text
    assert "WoodFisher pruning: epoch 2, sparsity 0.5000" in text
    # Silent unless asked.
    model.fit(*blobs, epochs=1, verbose=0, callbacks=[of(0.6)])
    assert capsys.readouterr().out == ""


def test_the_report_of_a_run(model, blobs):
    settings = {"method": "woodfisher", "num_grads": {0.0: 8, 0.4: 12}, "damp": "auto", "num_recomputations": 2}
    pruner = of(0.6, 2, data=blobs, init_sparsity=0.3, seed=5, **settings)
    with pytest.raises(RuntimeError, match="once training has begun"):
        pruner.report()
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[pruner])
    report = pruner.report()
    assert report.sparsity == 0.6 and report.weights == 240
    # Two stages at each of epoch 0, 1 and the end; 8 samples before 0.4 is reached.
    assert [stage.epoch for stage in report.stages] == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    assert [stage.samples for stage in report.stages] == [8, 8, 8, 8, 12, 12]
    sparsities = [stage.sparsity for stage in report.stages]
    np.testing.assert_allclose(sparsities[1::2], [0.3, 0.3 + 0.3 * 7 / 8, 0.6], atol=0.5 / 240)
    assert sparsities == sorted(sparsities)
    assert len({stage.damp for stage in report.stages}) == 6  # chosen anew each time
    assert report.samples == 56
    assert [phase.name for phase in report.phases] == ["gradients", "inverse", "update"]
    parts = [phase.seconds for stage in report.stages for phase in stage.phases]
    np.testing.assert_allclose(sum(phase.seconds for phase in report.phases), sum(parts))
    assert report.settings == {
        "num_grads": {0.0: 8, 0.4: 12},
        "grad_batch_size": 1,
        "fisher": "empirical",
        "damp": "auto",
        "update": "joint",
        "num_recomputations": 2,
        "fisher_block_size": 2000,
        "seed": 5,
    }
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert "stage  epoch  sparsity  samples" in str(report)
    # Another run begins a report of its own.
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[pruner])
    assert pruner.report().stages == ()


def test_the_report_of_magnitude_pruning(model, blobs):
    pruner = of(0.5, 2, init_sparsity=0.25)
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[pruner])
    report = pruner.report()
    assert [(stage.epoch, stage.samples, stage.damp) for stage in report.stages] == [(e, 0, None) for e in (0, 1, 2)]
    assert (report.samples, report.phases, report.settings) == (0, (), {})
    assert "stage  epoch  sparsity\n" in str(report)


def stream(data, number):
    for index in range(number):
        yield data[0][index * 8 : index * 8 + 8], data[1][index * 8 : index * 8 + 8]


def dataset(blobs):
    """A data set of 4 batches that doesn't tell its length, the same on every backend."""
    if BACKEND == "torch":
        import torch

        class Iterable(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter([(x, y) for x, y in zip(*(part[:32] for part in blobs), strict=True)])

        return torch.utils.data.DataLoader(Iterable(), batch_size=8)
    import tensorflow as tf

    return tf.data.Dataset.from_generator(
        lambda: stream(blobs, 4),
        output_signature=(tf.TensorSpec((8, 12), tf.float32), tf.TensorSpec((8,), tf.int32)),
    )


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_unknown_number_of_steps(make_mlp, blobs, validated):
    # The first epoch tells how long epochs are. An update between the last batch and the epoch's end isn't lost.
    for settings, epochs, expected in [
        ({"end_epoch": 1}, 1, ".0 .0 .0 .0"),
        ({"end_epoch": 2.8, "start_epoch": 0.5, "update_frequency": 0.5}, 4, None),
        ({"end_epoch": 1.9, "start_epoch": 1.9}, 3, ".0 .0 .0 .0 .0 .0 .0 .0 .5 .5 .5 .5"),
    ]:
        model, watch = make_mlp(keras.optimizers.SGD(0.01)), Trace()
        pruner = of(**{"inter_func": "linear"} | settings)
        validation = {"validation_data": blobs} if validated else {}
        model.fit(dataset(blobs), epochs=epochs, verbose=0, callbacks=[pruner, watch], **validation)
        if expected:
            np.testing.assert_allclose(watch.batches, steps_of(expected))
        assert watch.epochs[-1] == 0.5
        assert watch.validated == (watch.epochs if validated else [])
        assert kw.sparsity_report(model).sparsity == 0.5


def test_initial_epoch_goes_on(make_mlp, blobs):
    settings = {"end_epoch": 3, "method": "woodfisher", "data": blobs, "num_grads": 8, "inter_func": "linear"}
    whole = make_mlp(keras.optimizers.SGD(0.01))
    start = whole.get_weights()
    watch = trace(whole, blobs, of(0.6, **settings), epochs=4, shuffle=False)
    part = make_mlp(keras.optimizers.SGD(0.01))
    part.set_weights(start)
    with pytest.warns(UserWarning, match=r"ended before end_epoch=3: .* at sparsity 0.200, not at 0.6"):
        trace(part, blobs, of(0.6, **settings), epochs=4, shuffle=False, others=[Halt(1)])
    second = trace(part, blobs, of(0.6, **settings), epochs=4, initial_epoch=2, shuffle=False)
    assert second.batches == watch.batches[6:]
    for now, then in zip(part.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(now, then, atol=1e-5)
        np.testing.assert_array_equal(now == 0, then == 0)
    # Zeros that are there are kept, even where the ramp asks for fewer.
    dense = trace(part, blobs, of(0.7, 2, inter_func="linear"), epochs=2)
    assert dense.batches == [0.6] * 5 + [0.7]


class Halt(keras.callbacks.Callback):
    """Stops training after a batch of an epoch, or at the epoch's end."""

    def __init__(self, epoch, batch=None):
        super().__init__()
        self._place = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self._place == (self._epoch, batch):
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if self._place == (epoch, None):
            self.model.stop_training = True


def test_stopped_early(make_mlp, blobs):
    def fit(pruner, halt, epochs=3):
        model = make_mlp(keras.optimizers.SGD(0.01))
        x, y = (part[:48] for part in blobs)
        model.fit(x, y, batch_size=16, epochs=epochs, verbose=0, callbacks=[pruner, halt])
        return kw.sparsity_report(model).sparsity

    # Stopped where the last update is due: it is made.
    assert fit(of(end_epoch=2), Halt(1)) == 0.5
    with pytest.warns(UserWarning, match=r"(?s)ended before end_epoch=2: .*0\.\d+, not at 0.5.*start_from_epoch=2"):
        assert fit(of(end_epoch=2), Halt(1, 1)) < 0.5
    # Stopped amid the last epoch, too.
    with pytest.warns(UserWarning, match=r"ended before end_epoch=2"):
        assert fit(of(end_epoch=2), Halt(1, 1), epochs=2) < 0.5


def test_found_zeros_as_the_beginning(model, blobs):
    kernel = model.get_layer("hidden").kernel
    values = ops.convert_to_numpy(kernel).copy()
    values[:, :4] = 0
    kernel.assign(values)
    pruner = of(0.6, 2, init_sparsity="__FROM_PARAM__", inter_func="linear", global_sparsity=False)
    trace(model, blobs, pruner, epochs=3)
    report = {v.name.split("/")[-2]: v for v in kw.sparsity_report(model).variables}
    assert (report["hidden"].pruned, report["out"].pruned) == (115, 29)
    # Half way, each variable is half way from its own beginning.
    kernel.assign(values)
    model.get_layer("out").kernel.assign(np.ones((16, 3)))
    with pytest.warns(UserWarning, match="ended before"):
        pruner = of(0.6, 2, init_sparsity="__FROM_PARAM__", inter_func="linear", global_sparsity=False)
        trace(model, blobs, pruner, epochs=3, others=[Halt(1, 1)])
    report = {v.name.split("/")[-2]: v for v in kw.sparsity_report(model).variables}
    assert (report["hidden"].pruned, report["out"].pruned) == (round(0.425 * 192), round(0.3 * 48))


def test_layer_wise_and_excluded(model, blobs):
    trace(model, blobs, of(0.5, global_sparsity=False), epochs=1)
    assert [v.pruned for v in kw.sparsity_report(model).variables] == [96, 24]
    model.fit(*blobs, verbose=0, callbacks=[of(0.75, exclude=["out/kernel"])])
    assert [v.pruned for v in kw.sparsity_report(model).variables][:1] == [144]


def test_number_of_gradients_follows_the_sparsity(make_mlp, blobs, monkeypatch):
    rows = []
    fill = SampledGradients.fill

    def spy(source, store, kept, count, draw, advance):
        rows.append((count, draw))
        return fill(source, store, kept, count, draw, advance)

    monkeypatch.setattr(SampledGradients, "fill", spy)
    # 0.267 is reached but for a fraction of a weight: it counts as reached.
    counts = {0.0: 4, 0.267: 6, 0.5: 8}
    pruner = of(0.601, 3, method="woodfisher", data=blobs, num_grads=counts, inter_func="linear", init_sparsity=0.1)
    make_mlp().fit(*blobs, epochs=4, verbose=0, callbacks=[pruner])
    assert rows == [(4, 0), (4, 1), (6, 2), (6, 3)]


def test_config_round_trip(blobs):
    settings = {
        "final_sparsity": 0.8,
        "end_epoch": 7.5,
        "init_sparsity": "__FROM_PARAM__",
        "start_epoch": -1,
        "update_frequency": -1,
        "inter_func": "linear",
        "leave_enabled": False,
        "log_variables": True,
        "params": ["a", "re:b"],
        "exclude": ["c"],
        "global_sparsity": False,
        "num_grads": {0.0: 3, 0.5: 4},
        "grad_batch_size": 2,
        "fisher": "ggn",
        "damp": "auto",
        "num_recomputations": 2,
        "fisher_block_size": None,
        "update": "independent",
        "method": "magnitude",
        "mask_type": [2, 4],
        "available_gpus": ["cpu:0"],
        "memory_limit": "2GiB",
        "grads_device": "disk",
        "grads_dtype": "float16",
        "num_pages": 3,
        "seed": None,
        "verbose": 2,
        "total_epochs": 9,
    }
    config = kw.WoodFisherPruning(**settings, data=blobs).get_config()
    assert config == settings
    again = kw.WoodFisherPruning.from_config(json.loads(json.dumps(config)), data=blobs)
    assert again.get_config() == settings
    with pytest.raises(RuntimeError, match="known once training has begun"):
        again.sparsity  # noqa: B018
    levels = kw.WoodFisherPruning({0.9: ["a"], 0.8: "re:b"}, end_epoch=1, data=blobs).get_config()
    assert (levels["final_sparsity"], levels["global_sparsity"]) == ({0.9: ["a"], 0.8: ["re:b"]}, False)
    again = kw.WoodFisherPruning.from_config(json.loads(json.dumps(levels)), data=blobs)
    assert again.get_config() == levels
    keep = {"params": ["a"], "exclude": ["b"], "start_epoch": 0.5, "end_epoch": 2.0, "total_epochs": 3}
    keep["log_variables"] = True
    assert kw.KeepZeros.from_config(kw.KeepZeros(**keep).get_config()).get_config() == keep


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"final": 90}, ValueError, r"final_sparsity must lie in \[0, 1\), got 90.*write 0.9"),
        ({"final": 1.0}, ValueError, r"final_sparsity must lie in \[0, 1\)"),
        ({"final": "a"}, TypeError, "final_sparsity must be a fraction"),
        ({"init_sparsity": 0.6}, ValueError, "init_sparsity=0.6 is above final_sparsity=0.5"),
        ({"init_sparsity": "x"}, TypeError, "init_sparsity"),
        ({"start_epoch": -2}, ValueError, "start_epoch must be at least 0, or -1"),
        ({"start_epoch": 2}, ValueError, "end_epoch=1 lies before start_epoch=2"),
        ({"end_epoch": -1}, ValueError, "end_epoch must be at least 0"),
        ({"end_epoch": float("nan")}, ValueError, "end_epoch"),
        ({"update_frequency": -0.5}, ValueError, "update_frequency must be a positive number"),
        ({"inter_func": "square"}, ValueError, "inter_func must be one of 'linear', 'cubic', 'inverse_cubic'"),
        ({"leave_enabled": 1}, TypeError, "leave_enabled must be True or False"),
        ({"num_grads": 0}, ValueError, "num_grads must be at least 1"),
        ({"method": "random"}, ValueError, "method must be one of"),
        ({"damp": 0}, ValueError, "damp must be above 0"),
    ],
)
def test_arguments_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        of(**settings)


def refusals(blobs):
    x, y = blobs
    wood = {"method": "woodfisher", "data": blobs, "num_grads": 8}
    return [
        (of(end_epoch=3), ValueError, r"end_epoch=3 lies after the last epoch \(2\).*epochs=3"),
        (of(params=["hiden/kernel"]), KeyError, "hiden/kernel.*hidden/kernel"),
        (of(**wood | {"num_grads": 97}), ValueError, "num_grads=97 .* needs 97 examples.*num_grads=96 would fit"),
        (of(**wood | {"grad_batch_size": 13}), ValueError, "num_grads=7 or grad_batch_size=12 would fit"),
        (of(**wood | {"available_gpus": ["cuda:9"]}), ValueError, "no device 'cuda:9' here"),
        (of(**wood | {"data": (pair for pair in [(x, y)])}), TypeError, "callable that returns a fresh one"),
        (of(**wood | {"data": None, "grad_batch_size": 4}), ValueError, "grad_batch_size=4 needs data"),
        (of(**wood | {"data": (x, y[:5])}), ValueError, "same, positive number of rows"),
        (of(**wood | {"data": (x[:, :3], y)}), ValueError, "can't be computed"),
        (of(**wood | {"data": None, "start_epoch": 1, "num_grads": 9}), ValueError, "num_grads=3 would fit"),
        (of(**wood | {"data": None, "start_epoch": 1, "num_grads": 10**12}), MemoryError, "would fit"),
        (of(**wood | {"num_grads": 10**12, "data": lambda: iter([blobs])}), MemoryError, "would fit"),
    ]


def test_what_fails_fails_before_the_first_batch(make_mlp, blobs):
    begun = []
    spy = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: begun.append(batch))
    model = make_mlp()
    before = model.get_weights()
    for pruner, error, message in refusals(blobs):
        with pytest.raises(error, match=f"(?s){message}"):
            model.fit(*blobs, epochs=2, verbose=0, callbacks=[pruner, spy])
        # Nothing of it stays.
        assert all(v.constraint is None for v in model.trainable_variables)
        assert not any("woodfisher" in v.name for v in model.optimizer.variables)
        assert "fit" not in vars(model)
    no_loss = make_mlp(compile=False)
    no_loss.compile("sgd")
    with pytest.raises(ValueError, match="isn't compiled with a loss"):
        no_loss.fit(*blobs, verbose=0, callbacks=[of(method="woodfisher", data=blobs, num_grads=4), spy])
    uncompiled = keras.callbacks.CallbackList([of()], model=make_mlp(compile=False))
    with pytest.raises(ValueError, match="must be compiled with an optimizer"):
        uncompiled.on_train_begin()
    with pytest.raises(ValueError, match="must be compiled"):
        keras.callbacks.CallbackList([kw.KeepZeros()], model=make_mlp(compile=False)).on_train_begin()
    assert begun == []
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_warnings_about_other_callbacks(make_mlp, blobs, tmp_path):
    class Mute(keras.callbacks.Callback):
        """Ends the run at once: only the warnings matter."""

        def on_epoch_begin(self, epoch, logs=None):
            raise InterruptedError

    stop, save = keras.callbacks.EarlyStopping, keras.callbacks.ModelCheckpoint
    pruner = of(end_epoch=2.5)
    cases = [
        ([pruner, stop(monitor="loss", restore_best_weights=True, start_from_epoch=1)], "Set start_from_epoch=2"),
        ([pruner, save(tmp_path / "a.keras", save_best_only=True)], r"ModelCheckpoint\(save_best_only=True\)"),
        ([keras.callbacks.TerminateOnNaN(), pruner], "TerminateOnNaN comes before WoodFisherPruning"),
    ]
    model = make_mlp()
    for callbacks, message in cases:
        with pytest.warns(UserWarning, match=message) as record, pytest.raises(InterruptedError):
            model.fit(*blobs, epochs=4, verbose=0, callbacks=[*callbacks, Mute()])
        # It points here, not into Keras or this package.
        mine = [w for w in record if "WoodFisher" in str(w.message) or "end_epoch" in str(w.message)]
        assert [w.filename for w in mine] == [__file__]
    quiet = [
        [pruner, stop(monitor="loss", restore_best_weights=True, start_from_epoch=2)],
        [pruner, stop(monitor="loss"), save(tmp_path / "a.keras")],
        [
            kw.KeepZeros(["out/kernel"]),
            of(end_epoch=0.5, params=["hidden/kernel"]),
            save(tmp_path / "a.keras", save_best_only=True),
        ],
    ]
    for callbacks in quiet:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with pytest.raises(InterruptedError):
                model.fit(*blobs, epochs=4, verbose=0, callbacks=[*callbacks, Mute()])


def test_early_stopping_that_restores_stays_sparse(make_mlp, blobs):
    model = make_mlp(keras.optimizers.SGD(0.1))
    stop = keras.callbacks.EarlyStopping(monitor="loss", restore_best_weights=True, start_from_epoch=2, patience=1)
    model.fit(*blobs, epochs=5, verbose=0, callbacks=[of(end_epoch=2), stop])
    assert kw.sparsity_report(model).sparsity == 0.5


def test_a_plan_is_checked_without_training(make_mlp):
    model = make_mlp()
    pruner = kw.WoodFisherPruning(0.5, start_epoch=1, end_epoch=2, num_grads=8, verbose=0)
    updates = pruner.plan(model, steps_per_epoch=8, epochs=2)
    pruner.check_plan(updates, 8, 2)
    with pytest.raises(ValueError, match=r"end_epoch=2 lies after the last epoch \(1\)"):
        pruner.check_plan(updates, 8, 1)
    with pytest.raises(ValueError, match="num_grads"):
        pruner.check_plan(pruner.plan(model, 3, 2), 3, 2)
