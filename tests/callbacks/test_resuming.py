"""Training that was interrupted goes on as if it hadn't been."""

import json
import re
import warnings
from pathlib import Path

import keras
import kills
import numpy as np
import pytest
from keras import ops
from kills import KINDS, MOMENTS, X, Y, amid_update, compared, network, outcome, train, woodfisher

import keras_woodfisher as kw
from keras_woodfisher.callbacks.pruning_run import Run
from keras_woodfisher.callbacks.saved_states import Moment, Part, SavedState, StateFolder
from keras_woodfisher.callbacks.update_plan import Ramps
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.schedule import Schedule

PAGE = Path(__file__).parents[2] / "docs" / "resuming.md"


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ("recipe", "last batch"),
        ("two pruners in turn", "between our file and the backup"),
    ],
)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_killed_run_is_the_unbroken_one_to_the_bit(kind, moment, tmp_path):
    script = KINDS[kind]
    assert compared(script, train(script, None), MOMENTS[moment](), tmp_path) == ""


def fit(model, callbacks, first=0, epochs=4, **more):
    """The sparsity after each batch."""
    log = []
    seen = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: log.append(logs["sparsity"]))
    settings = {"batch_size": 24, "shuffle": False, "verbose": 0, "initial_epoch": first, "epochs": epochs} | more
    model.fit(X, Y, callbacks=[*callbacks, seen], **settings)
    return log


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(outcome(one), outcome(other), strict=True))


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def run_block(number, folder, monkeypatch):
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    names = {"keras": keras, "kw": kw, "x": X, "y": Y, "build": network}
    exec(compile(blocks()[number], f"block {number} of {PAGE}", "exec"), names)
    return names["model"]


def test_the_page_on_preemptible_machines(tmp_path, monkeypatch):
    assert len(blocks()) == 3
    whole = run_block(0, tmp_path / "whole", monkeypatch)
    with pytest.raises(kills.Killed), amid_update(3):
        run_block(0, tmp_path / "killed", monkeypatch)
    assert same(run_block(0, tmp_path / "killed", monkeypatch), whole)
    assert not (tmp_path / "killed" / "run" / "backup").exists()


def test_the_page_on_parts_of_a_training_run(tmp_path, monkeypatch):
    whole = network()
    log = fit(whole, [kw.WoodFisherPruning(0.9, start_epoch=1, end_epoch=3, num_grads=4, verbose=0)])
    assert log[4] == 0.0 < log[8] < log[12] == pytest.approx(0.9, abs=1e-3)
    for _ in range(2):
        model = run_block(1, tmp_path / "parts", monkeypatch)
    assert same(model, whole)
    assert same(run_block(2, tmp_path / "loop", monkeypatch), whole)


@pytest.mark.parametrize("total", [None, 3])
def test_one_epoch_a_fit(total):
    def pruner():
        return woodfisher(0.8, end_epoch=2, method="magnitude", total_epochs=total)

    if total is None:
        with pytest.raises(ValueError, match=r"end_epoch=2 lies after the last epoch \(1\).* total_epochs=2 or more"):
            fit(network(), [pruner()], epochs=1)
        return
    whole, parts = network(), network()
    log = fit(whole, [pruner()], epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # A new callback each time will do where nothing is buffered.
        assert [s for e in range(3) for s in fit(parts, [pruner()], e, e + 1)] == log
    assert same(whole, parts)
    with pytest.raises(ValueError, match=r"trains to epoch 4, beyond total_epochs=3"):
        fit(parts, [pruner()], 3, 4)


def test_zeros_are_held_in_parts():
    model = network(sparsity=0.5)
    with pytest.raises(ValueError, match=r"start_epoch=1 lies after the last epoch \(1\).* total_epochs=2 or more"):
        model.fit(X, Y, epochs=1, verbose=0, callbacks=[kw.KeepZeros(start_epoch=1)])
    keep, counts = kw.KeepZeros(start_epoch=1, total_epochs=3), []
    kernel = model.get_layer("hidden").kernel
    for epoch in range(3):
        if epoch == 1:
            kernel.assign(np.where(np.arange(16) < 4, 0.0, ops.convert_to_numpy(kernel)))
        model.fit(X, Y, initial_epoch=epoch, epochs=epoch + 1, verbose=0, callbacks=[keep])
        counts.append(int((ops.convert_to_numpy(kernel) == 0).sum()))
    assert counts == [0, 48, 48]


def test_what_was_let_go_isnt_pruned_again(tmp_path):
    def pruner():
        return woodfisher(0.9, end_epoch=1.5, leave_enabled=False, method="magnitude")

    whole = network()
    files = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    fit(whole, [pruner(), files])
    model = keras.models.load_model(tmp_path / "2.keras")
    before = kw.sparsity_report(model).pruned
    log = fit(model, [pruner()], 2)
    assert log[0] == before / kw.sparsity_report(model).weights < 0.5
    assert same(model, whole)
    # At the update itself nothing was let go yet.
    assert fit(network(), [woodfisher(0.5, end_epoch=1, leave_enabled=False, method="magnitude")], 1, 2)[0] == 0.5


def test_zeros_that_were_let_go_arent_held_again():
    model = network(sparsity=0.5)
    model.fit(X, Y, initial_epoch=3, epochs=4, verbose=0, callbacks=[kw.KeepZeros(end_epoch=2)])
    assert kw.sparsity_report(model).sparsity < 0.1


def test_where_a_ramp_began_is_inferred(tmp_path):
    def pruner():
        return woodfisher(0.8, end_epoch=4, init_sparsity="__FROM_PARAM__", method="magnitude")

    whole = network(sparsity=0.3)
    log = fit(whole, [pruner(), keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))])
    model = keras.models.load_model(tmp_path / "2.keras")
    np.testing.assert_allclose(fit(model, [pruner()], 2), log[8:], atol=1 / 496)


@pytest.mark.parametrize("together", [True, False])
def test_every_beginning_of_a_ramp_is_inferred_to_a_weight(together):
    schedule = Schedule(0.0, 0.9, start=0.5, end=4.0, frequency=0.5, interpolation="linear")
    sizes, options = [500, 61], PruningOptions(global_sparsity=together)

    def ramps():
        return Ramps(schedule, [0.9, 0.9 if together else 0.7], sizes, options)

    for found in ([0, 0], [100, 7], [431, 42]):
        whole = ramps()
        whole.start_from(found)
        for epoch, last in ((1, 0.5), (2, 1.5), (3, 2.5)):
            counts = whole.counts_at(last, found)
            zeros = [counts[0] - counts[0] // 9, counts[0] // 9] if together else counts
            resumed = ramps()
            resumed.start_from(zeros, None, epoch)
            for position in (epoch, epoch + 0.5, 4.0):
                later = resumed.counts_at(position, zeros)
                np.testing.assert_allclose(later, whole.counts_at(position, counts), atol=1)
    # Fewer zeros than such a ramp can have left: it begins with them, as it does before the first update.
    for zeros, epoch in (([30, 3], 3), ([30, 3], 0)):
        begun = ramps()
        begun.start_from(zeros, None, epoch)
        assert begun.beginnings == ([33 / 561] * 2 if together else [30 / 500, 3 / 61])


def test_dead_variables_stay_dead():
    model = network(sparsity=0.5, dead=True)
    weights = model.get_weights()
    constant = kw.load_recipe({"modifiers": [{"ConstantPruningModifier": {"params": ["branch/kernel"]}}]})
    for callbacks in (
        [kw.KeepZeros()],
        constant.callbacks(model),
        [woodfisher(0.9, end_epoch=4, init_sparsity="__FROM_PARAM__", data=(X, Y))],
    ):
        model.set_weights(weights)
        with pytest.warns(
            UserWarning, match="All weights of branch/kernel are zero, and others of the model are sparse"
        ):
            model.fit(X, Y, initial_epoch=2, epochs=4, verbose=0, callbacks=callbacks)
        assert not ops.convert_to_numpy(model.get_layer("branch").kernel).any()
    # In a dense model it isn't trained yet.
    model = network(dead=True)
    model.fit(X, Y, verbose=0, callbacks=[kw.KeepZeros()])
    assert ops.convert_to_numpy(model.get_layer("branch").kernel).any()


def saved(tmp_path, **more):
    """A model that was trained for two epochs, and its states."""
    folder = tmp_path / "states"
    model = network()
    pruner = woodfisher(0.8, end_epoch=4, start_epoch=2, total_epochs=6)
    fit(model, [pruner, kw.BackupPruning(folder)], epochs=2)
    return model, folder


def test_states_of_others_are_refused(tmp_path):
    trained, folder = saved(tmp_path)

    def go_on(*callbacks, model=None):
        fit(model or copied(trained), [*callbacks, kw.BackupPruning(folder)], 2)

    with pytest.raises(ValueError, match=r"WoodFisherPruning 1 had end_epoch=4.0, and has 3.0; .* had start_epoch=2"):
        go_on(woodfisher(0.8, end_epoch=3, start_epoch=1))
    with pytest.raises(ValueError, match=r"KeepZeros 1 is only here; WoodFisherPruning 1 is only there"):
        go_on(kw.KeepZeros())
    with pytest.raises(
        ValueError, match=r"had variables=\[\[12, 16\], \[16, 16\], \[16, 3\]\], and has \[\[12, 16\]\]"
    ):
        go_on(woodfisher(0.8, end_epoch=4, start_epoch=2, params=["hidden/kernel"]))
    pruner = woodfisher(0.8, end_epoch=4, start_epoch=2)
    with pytest.raises(ValueError, match=r"states of a training run after 4, 8 steps, but none of this model, whose"):
        go_on(pruner, model=network())
    restored = copied(trained)
    restored.set_weights(network().get_weights())
    with pytest.raises(ValueError, match=r"has done \(8\), but of other weights\. .* Put BackupPruning behind such a"):
        go_on(pruner, model=restored)
    # The optimizer wasn't restored.
    weights = network()
    weights.set_weights(trained.get_weights())
    with pytest.raises(ValueError, match=r"optimizer has done 0 and which is to go on at epoch 2"):
        go_on(pruner, model=weights)
    for file in folder.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state of training in .*-00000008-.* can't be read"):
        go_on(pruner)
    # A new training run begins in a folder with old states.
    fit(network(), [pruner, kw.BackupPruning(folder)])


def test_a_return_to_an_epoch_that_is_done_is_refused_by_the_folder(tmp_path):
    def part(model, first, epochs, *others, end_epoch=4, **more):
        pruner = woodfisher(0.8, end_epoch=end_epoch, method="magnitude", **more)
        return fit(model, [*others, pruner, kw.BackupPruning(tmp_path)], first, epochs)

    model = network()
    model.run_eagerly = True
    part(model, 0, 2, total_epochs=5)
    expected = "The fit whose state is in .* ended after epoch 2 of a longer training, and this one begins at epoch"
    with pytest.raises(ValueError, match=rf"{expected} 0 .* Give initial_epoch=2, .* name another folder"):
        part(copied(model), 0, 2, total_epochs=5)
    # As after a kill, where the state is of the end of an epoch.
    with pytest.raises(kills.Killed):
        part(model, 2, 5, kills.At(3, 0))
    with pytest.raises(ValueError, match="ended after epoch 3 of a longer training"):
        part(model, 1, 5)
    part(model, 3, 5)
    with pytest.raises(ValueError, match=r"ended after epoch 5, and this one begins at epoch 4 .* initial_epoch=5"):
        part(model, 4, 6)
    # What is over may begin anew.
    twin = copied(model)
    twin.run_eagerly = True
    assert part(model, 0, 2, end_epoch=1) == fit(twin, [woodfisher(0.8, end_epoch=1, method="magnitude")], epochs=2)


def test_the_same_callbacks_in_two_trainings(tmp_path):
    model, counts = network(sparsity=0.5), []
    model.run_eagerly = True
    callbacks = [kw.KeepZeros(), kw.BackupPruning(tmp_path)]
    pruner = [woodfisher(0.75, end_epoch=2, leave_enabled=False, method="magnitude"), kw.BackupPruning(tmp_path / "b")]
    for _ in range(2):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=callbacks)
        counts.append(kw.sparsity_report(model).pruned)
    assert counts[0] == counts[1] > 0
    logs = [fit(model, pruner, epochs=3) for _ in range(2)]
    assert max(logs[0]) == max(logs[1]) == 0.75


def copied(model):
    """As another process would load it."""
    again = network()
    again.optimizer.build(again.trainable_variables)
    for new, old in zip([*again.weights, *again.optimizer.variables], outcome(model), strict=True):
        new.assign(old)
    return again


def test_gradients_that_werent_saved_are_told_of(tmp_path):
    model, _ = saved(tmp_path)
    with pytest.warns(
        UserWarning, match="goes on at epoch 2, and nothing was saved of the gradients that were buffered"
    ):
        log = fit(model, [woodfisher(0.8, end_epoch=4, start_epoch=2)], 2)
    # Updates wait for six of them.
    assert log[:6] == [0.0] * 6
    assert log[6] > 0.4
    model, pruner = network(), woodfisher(0.8, end_epoch=3, start_epoch=2, num_grads=4, total_epochs=4)
    fit(model, [pruner], epochs=2)
    model.get_layer("out").bias.assign([1.0, 0.0, 0.0])
    with pytest.warns(UserWarning, match=r"nothing that fits was saved of .* Something changed the weights after it"):
        fit(model, [pruner], 2)


def test_at_the_last_batch_no_update_waits_for_gradients(monkeypatch):
    """A run that began amid an epoch may have fewer than it wants."""
    monkeypatch.setattr(Run, "waits", lambda self, rows, steps: True)
    log = fit(network(), [woodfisher(0.8, end_epoch=2, start_epoch=1)], epochs=2)
    assert log[:7] == [0.0] * 7
    assert log[7] == pytest.approx(0.8, abs=1e-2)


def test_the_place_in_the_list_is_checked(tmp_path):
    pruner, backup = woodfisher(0.8, end_epoch=1, method="magnitude"), kw.BackupPruning(tmp_path)
    with pytest.raises(ValueError, match=r"BackupPruning and WoodFisherPruning stand in the wrong order"):
        fit(network(), [backup, pruner])
    with pytest.raises(ValueError, match=r"BackupPruning and ModelCheckpoint stand in the wrong order"):
        fit(network(), [pruner, keras.callbacks.ModelCheckpoint(str(tmp_path / "m.keras")), backup])
    with pytest.raises(ValueError, match=r"folder must be a folder of this machine, got 'gs://bucket/run'"):
        kw.BackupPruning("gs://bucket/run")
    again = kw.BackupPruning.from_config(kw.BackupPruning(tmp_path, keep=2).get_config())
    assert again.get_config() == {"folder": str(tmp_path), "keep": 2}


def test_a_backup_that_isnt_local_is_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backup = keras.callbacks.BackupAndRestore("memory://run")
    monkeypatch.setattr(backup, "on_train_begin", lambda logs=None: None)
    monkeypatch.setattr(backup, "on_epoch_end", lambda epoch, logs=None: None)
    monkeypatch.setattr(backup, "on_train_end", lambda logs=None: None)
    with pytest.warns(
        UserWarning, match="can't be kept beside the backup in 'memory://run', which isn't a local folder"
    ):
        fit(network(), [woodfisher(0.8, end_epoch=1, method="magnitude"), backup], epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_in_the_backup_callback(tmp_path):
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    stock = set(vars(backup))
    model = network()
    pruner = woodfisher(0.8, end_epoch=1, method="magnitude")
    with pytest.raises(kills.Killed):
        fit(model, [kills.At(0, 1), pruner, backup])
    model.fit(X, Y, verbose=0)
    assert not set(vars(backup)) - stock - {"_params", "_model"}
    fit(model, [pruner, backup])
    assert not set(vars(backup)) - stock - {"_params", "_model"}


def test_amid_an_epoch_no_update_is_made_twice(tmp_path):
    # Keras begins the epoch again, with weights that have seen some of its batches.
    def callbacks():
        pruner = woodfisher(0.8, end_epoch=4, method="magnitude", inter_func="linear")
        return [pruner, keras.callbacks.BackupAndRestore(str(tmp_path / "backup"), save_freq=3)]

    with pytest.raises(kills.Killed):
        fit(network(), [kills.At(1, 3), *callbacks()])
    log = fit(network(), callbacks())
    # It was killed at 1.75, and the backup is of 1.5, after the update of 1.0.
    np.testing.assert_allclose(log[:9], [0.2] * 2 + [0.3] * 2 + [0.4] * 2 + [0.5] * 2 + [0.6], atol=1e-3)


def test_steps_that_only_add_up_gradients_tell_moments_apart():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=16), "mse")
    moments = []
    for _ in range(2):
        moments.append(Moment.of(model))
        model.train_on_batch(X, Y)
    assert [moment.steps for moment in moments] == [0, 1]
    assert moments[0].weights == moments[1].weights


def state_at(steps, **arrays):
    return SavedState(Moment(f"{steps:032x}", steps), steps, 4, 7, True, (Part("KeepZeros 1", {"a": [1]}, arrays),))


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path):
    folder = StateFolder(tmp_path / "states", 2)
    assert folder.latest() is None
    for steps in (4, 8):
        folder.write(state_at(steps, rows=np.arange(float(steps))))
    with pytest.raises(kills.Killed), kills.amid_our_file(1):
        folder.write(state_at(12))
    (folder.path / "killed.part").write_bytes(b"half")
    found = folder.find(Moment(f"{8:032x}", 8))
    assert (found.total, found.steps_per_epoch, found.parts[0].identity) == (8, 4, {"a": [1]})
    assert (found.epochs, found.over) == (7, True)
    np.testing.assert_array_equal(found.parts[0].arrays["rows"], np.arange(8.0))
    assert folder.find(Moment(f"{12:032x}", 12)) is None
    # Of states that are written again, and of those that are older, the last two are kept.
    folder.write(state_at(4))
    folder.write(state_at(2))
    assert folder.steps() == [2, 4]
    assert {file.suffix for file in folder.path.iterdir()} == {".npz"}


def test_a_file_of_the_format_before_is_read(tmp_path):
    folder = StateFolder(tmp_path, None)
    folder.write(state_at(9, rows=np.arange(3.0)))
    (path,) = tmp_path.iterdir()
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(bytes(arrays["about"])) | {"format": 1}
    for number, texts in ((1, ("epochs", "over")), (3, ())):
        kept = {name: value for name, value in about.items() if name not in texts} | {"format": number}
        np.savez(path, **arrays | {"about": np.frombuffer(json.dumps(kept).encode(), np.uint8)})
        if number == 1:
            found = folder.latest()
            assert (found.total, found.epochs, found.over, len(found.parts[0].arrays["rows"])) == (9, 2, False, 3)
    with pytest.raises(ValueError, match=r"can't be read \(its format is 3, not 2\). Delete that file"):
        folder.latest()
