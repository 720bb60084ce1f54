"""Files saved while the pruner is at work look as if it weren't there."""

import contextlib
import json
import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_woodfisher as kw

LOADER = """
import json, sys, warnings
sys.modules["keras_woodfisher"] = sys.modules["keras_woodfisher_backends"] = None
import keras, numpy as np

def state(optimizer):
    return [np.asarray(keras.ops.convert_to_numpy(v)) for v in optimizer.variables]

def same(model, truth):
    found = [*model.get_weights(), *state(model.optimizer)]
    names = [f"arr_{i}" for i in range(len(truth.files))]
    return len(found) == len(names) and all(np.array_equal(a, truth[n]) for a, n in zip(found, names))

def fresh(path):
    model = keras.Sequential.from_config(json.loads(json.dumps(config["model"])))
    kind = next(kind for kind in config["optimizers"] if f"/{kind}/" in path)
    model.compile(keras.optimizers.deserialize(json.loads(json.dumps(config["optimizers"][kind]))), "mse")
    model.optimizer.build(model.trainable_variables)
    return model

out, config = {}, json.load(open(sys.argv[1]))
for path, truth in config["files"].items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if path.endswith(".keras"):
            model = keras.saving.load_model(path)
        else:
            model = fresh(path)
            model.load_weights(path)
    texts = [str(w.message) for w in caught if w.category is UserWarning]
    out[path] = [same(model, np.load(truth)), *(text.split("'")[0] for text in texts)]
print("RESULT" + json.dumps(out))
"""


class Record(keras.callbacks.Callback):
    """Writes down the live state (without what is hidden) at each step, and saves the model in all formats."""

    def __init__(self, folder, save=()):
        super().__init__()
        self._folder, self._save, self._epoch = folder, save, 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._at("begin")

    def on_train_batch_end(self, batch, logs=None):
        self._at(f"{batch}")

    def on_epoch_end(self, epoch, logs=None):
        self._at("end")

    def _at(self, moment):
        name = f"{self._epoch}-{moment}"
        np.savez(self._folder / f"{name}.npz", *self.model.get_weights(), *stock_state(self.model.optimizer))
        if name in self._save:
            self.model.save(self._folder / f"own@{name}.keras")
            self.model.save_weights(self._folder / f"own@{name}.weights.h5")
            kw.save(self.model, self._folder / f"own@{name}.deflated.keras")


def stock_state(optimizer):
    return [ops.convert_to_numpy(v) for v in optimizer.variables if "woodfisher" not in v.name]


def pruner_of(blobs, **kwargs):
    settings = {"init_sparsity": 0.2, "start_epoch": 0.5, "end_epoch": 1.5, "num_grads": 2, "verbose": 0} | kwargs
    return kw.WoodFisherPruning(0.5, **settings)


def train_and_save(model, blobs, folder, pruned=True):
    """Checkpoints of each batch and each epoch, from before and after the pruner in the list."""
    folder.mkdir()
    checkpoint = keras.callbacks.ModelCheckpoint
    before = [checkpoint(folder / "before@{epoch}-{batch}.keras", save_freq=3)]
    after = [
        checkpoint(folder / "after@{epoch}-{batch}.weights.h5", save_freq=3, save_weights_only=True),
        checkpoint(folder / "after@{epoch}-end.keras"),
        Record(folder, save=("0-begin", "0-1", "1-end")),
    ]
    # TensorFlow's trainer would build it only at the first step, after the first file.
    model.optimizer.build(model.trainable_variables)
    pruner = [pruner_of(blobs)] if pruned else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ModelCheckpoint comes before WoodFisherPruning")
        model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[*before, *pruner, *after])
    return {str(path): str(truth_of(path)) for path in sorted(folder.iterdir()) if path.suffix != ".npz"}


def truth_of(path):
    """The record of the moment at which a file was written (checkpoints count epochs and batches from 1)."""
    kind, moment = path.name.split(".")[0].split("@")
    epoch, when = moment.split("-")
    if kind != "own":
        epoch, when = int(epoch) - 1, when if when == "end" else int(when) - 1
    return path.parent / f"{epoch}-{when}.npz"


def load_elsewhere(config, folder):
    """For each file whether weights and optimizer are the live model's of that moment, and every warning."""
    (folder / "config.json").write_text(json.dumps(config))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", LOADER, "config.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.split("RESULT")[1])


def test_files_load_anywhere_as_if_saved_without_this_package(make_mlp, blobs, tmp_path):
    def scaled():
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=8.0)

    optimizers = {"adam": keras.optimizers.Adam(0.01), "scaled": scaled(), "stock": scaled()}
    config = {"optimizers": {kind: keras.optimizers.serialize(o) for kind, o in optimizers.items()}, "files": {}}
    for kind, optimizer in optimizers.items():
        model = make_mlp(optimizer)
        config["files"] |= train_and_save(model, blobs, tmp_path / kind, pruned=kind != "stock")
    config["model"] = model.get_config()
    loaded = load_elsewhere(config, tmp_path)
    of = {kind: {p.rpartition("/")[2]: r for p, r in loaded.items() if f"/{kind}/" in p} for kind in optimizers}
    # 2 per batch and place, 2 per epoch, 3 moments in 3 formats: the same state, no warning.
    assert list(of["adam"].values()) == [[True]] * 15
    # With a scaled loss Keras itself warns and loses the state in places: neither more nor less here.
    assert len(of["stock"]) == 15
    assert of["scaled"] == of["stock"]


@pytest.mark.parametrize("scaled", [False, True])
def test_loading_into_the_live_model_keeps_the_optimizers_state(make_mlp, blobs, tmp_path, scaled):
    inner = keras.optimizers.Adam(0.01)
    model = make_mlp(keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0) if scaled else inner)
    path = tmp_path / "live.weights.h5"
    states, zeros = [], []

    class Load(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch in (0, 3):
                model = self.model
                if batch == 0:
                    model.save_weights(path)
                else:
                    model.load_weights(path)
                states.append(stock_state(model.optimizer))

        def on_train_batch_end(self, batch, logs=None):
            zeros.append(int((ops.convert_to_numpy(self.model.layers[0].kernel) == 0).sum()))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pruner = pruner_of(blobs, method="magnitude", end_epoch=0.5, global_sparsity=False)
        model.fit(*blobs, batch_size=24, epochs=1, verbose=0, callbacks=[pruner, Load()])
    for saved, loaded in zip(*states, strict=True):
        np.testing.assert_array_equal(saved, loaded)
    # The weights that came back are dense: the next step masks them.
    assert zeros == [0, 0, 96, 96]


class Break(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 11:
            raise KeyboardInterrupt


def test_backup_and_restore_goes_on_where_it_stopped(make_mlp, blobs, tmp_path):
    def train(*others):
        keras.utils.set_random_seed(1)
        model = make_mlp(keras.optimizers.Adam(0.01))
        pruner = kw.WoodFisherPruning(0.8, end_epoch=4, update_frequency=0.5, num_grads=16, data=blobs, verbose=0)
        log = []
        log_callback = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: log.append(logs["sparsity"])
        )
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(
                *blobs,
                batch_size=24,
                epochs=5,
                shuffle=False,
                verbose=0,
                callbacks=[pruner, *others, log_callback],
            )
        return model, log

    whole, whole_log = train()
    backup = str(tmp_path / "backup")
    _, first = train(keras.callbacks.BackupAndRestore(backup), Break())
    assert first == whole_log[:10]
    again, second = train(keras.callbacks.BackupAndRestore(backup))
    # Epoch 2 is done over, from its beginning.
    assert second == whole_log[8:]
    for now, then in zip(again.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(now, then, atol=1e-5)
        np.testing.assert_array_equal(now == 0, then == 0)
    for now, then in zip(stock_state(again.optimizer), stock_state(whole.optimizer), strict=True):
        np.testing.assert_allclose(now, then, atol=1e-5)
