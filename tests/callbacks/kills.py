"""Training that is killed at a chosen moment and started again by the same script, beside the unbroken run.

As a program it prints the table of all kinds of run and all moments (the tests take a part of it):

    KERAS_BACKEND=jax python tests/callbacks/kills.py
    KERAS_BACKEND=jax python tests/callbacks/kills.py --real 10    # processes, killed at random times
"""

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import keras
import numpy as np
from keras import layers

import keras_woodfisher as kw

STEPS, EPOCHS, BATCH = 4, 5, 24


class Killed(BaseException):
    """What comes after it in the process doesn't count."""


def points():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, STEPS * BATCH)
    return (rng.normal(size=(len(y), 12)) + 2.0 * np.eye(3, 12)[y]).astype("float32"), y.astype("int32")


X, Y = points()


def network(optimizer=None, sparsity=0.0, frozen=False, dead=False):
    """A residual net with BatchNorm, with the same weights each time."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12,))
    hidden = layers.Dense(16, activation="relu", name="hidden")(inputs)
    hidden = layers.BatchNormalization(name="norm")(hidden)
    branch = layers.Dense(16, name="branch", trainable=not frozen)
    model = keras.Model(inputs, layers.Dense(3, name="out")(layers.Add()([hidden, branch(hidden)])))
    if sparsity:
        kw.prune(model, sparsity=sparsity, method="magnitude", verbose=0)
    if dead:
        branch.kernel.assign(np.zeros((16, 16)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(0.01), loss)
    if frozen:
        model.optimizer.build(model.trainable_variables)
        branch.trainable = True
        branch.kernel.trainable = branch.bias.trainable = False
    return model


def arrays():
    return {"x": X, "y": Y, "batch_size": BATCH, "shuffle": False}


def stream():
    """Batches of which nobody knows how many there are."""
    if keras.backend.backend() == "torch":
        from torch.utils.data import DataLoader, IterableDataset

        class Batches(IterableDataset):
            def __iter__(self):
                return zip(np.split(X, STEPS), np.split(Y, STEPS), strict=True)

        return {"x": DataLoader(Batches(), batch_size=None), "shuffle": False}
    import tensorflow as tf

    return {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH).filter(lambda x, y: True)}


def woodfisher(final, **more):
    return kw.WoodFisherPruning(final, **{"num_grads": 6, "verbose": 0, "update_frequency": 0.5} | more)


class Script(NamedTuple):
    """What a user runs, and runs again."""

    callbacks: Callable[[keras.Model], list[Any]]
    model: Callable[[], keras.Model] = network
    data: Callable[[], dict[str, Any]] = arrays


def recipe(model):
    modifiers = [
        {
            "MFACPruningModifier": PRUNING
            | {"num_grads": 6, "params": ["hidden/kernel"], "end_epoch": 2.5, "use_gradient_buffering": True}
        },
        {"GMPruningModifier": PRUNING | {"params": ["out/kernel"], "end_epoch": 4.0, "leave_enabled": False}},
        {
            "TrainableParamsModifier": {
                "params": ["norm/gamma"],
                "trainable": False,
                "start_epoch": 1.0,
                "end_epoch": 3.0,
            }
        },
        {
            "TrainableParamsModifier": {
                "params": ["branch/kernel"],
                "trainable": True,
                "start_epoch": 1.0,
                "end_epoch": 4.0,
            }
        },
        {"LearningRateFunctionModifier": RATE | {"start_epoch": 0.0, "end_epoch": 3.0}},
        {"SetLearningRateModifier": {"learning_rate": 0.02, "start_epoch": 3.25}},
        {"SetWeightDecayModifier": {"weight_decay": 0.01, "start_epoch": 1.0}},
    ]
    return kw.load_recipe({"modifiers": modifiers}).callbacks(model, (X, Y), verbose=0)


PRUNING = {"init_sparsity": 0.1, "final_sparsity": 0.7, "start_epoch": 1.5, "update_frequency": 0.5}
RATE = {"lr_func": "cosine", "init_lr": 0.01, "final_lr": 0.001}


def reconstruction(model):
    modifiers = [
        {"ReconstructionModifier": {"final_sparsity": 0.6}},
        {"ConstantPruningModifier": {"params": "__ALL_PRUNABLE__", "start_epoch": 0.0}},
    ]
    return kw.load_recipe({"modifiers": modifiers}).callbacks(model, X, verbose=0)


KINDS = {
    "plain Keras": Script(lambda model: []),
    "data=": Script(lambda model: [woodfisher(0.8, end_epoch=4, data=(X, Y))]),
    "buffered": Script(lambda model: [woodfisher(0.8, end_epoch=4, start_epoch=2)]),
    "buffered, at start_epoch": Script(
        lambda model: [woodfisher(0.8, end_epoch=3, start_epoch=1, init_sparsity=0.3, num_grads=4)]
    ),
    "from the zeros": Script(
        lambda model: [woodfisher(0.8, end_epoch=4, init_sparsity="__FROM_PARAM__", data=(X, Y))],
        lambda: network(sparsity=0.3),
    ),
    "from the zeros, each variable": Script(
        lambda model: [
            woodfisher(0.8, end_epoch=4, init_sparsity="__FROM_PARAM__", method="magnitude", global_sparsity=False)
        ],
        lambda: network(sparsity=0.3),
    ),
    "released": Script(lambda model: [woodfisher(0.8, end_epoch=1.5, leave_enabled=False, data=(X, Y))]),
    "dead variable": Script(
        lambda model: [woodfisher(0.9, end_epoch=4, data=(X, Y))], lambda: network(sparsity=0.5, dead=True)
    ),
    "KeepZeros": Script(lambda model: [kw.KeepZeros(start_epoch=1, end_epoch=3)], lambda: network(sparsity=0.5)),
    "two pruners in turn": Script(
        lambda model: [
            woodfisher(0.5, end_epoch=1, data=(X, Y), params=["hidden/kernel", "out/kernel"]),
            woodfisher(0.8, start_epoch=1, end_epoch=4, init_sparsity=0.55, num_grads=4),
        ]
    ),
    "2:4": Script(lambda model: [woodfisher(0.5, end_epoch=4, data=(X, Y), mask_type="2:4", exclude=["out/kernel"])]),
    "unknown length": Script(lambda model: [woodfisher(0.8, end_epoch=3.75, data=(X, Y))], data=stream),
    "TrainableParams": Script(
        lambda model: [
            woodfisher(0.8, start_epoch=1.5, end_epoch=4, params=["hidden/kernel", "out/kernel"]),
            kw.TrainableParams(["branch/kernel"], start_epoch=0.5),
            kw.TrainableParams(["norm/beta"], False, start_epoch=1, end_epoch=2.5),
        ],
        lambda: network(keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=None), frozen=True),
    ),
    "recipe": Script(recipe, lambda: network(keras.optimizers.AdamW(0.01, weight_decay=0.004), frozen=True), stream),
    "reconstruction": Script(reconstruction),
    "Muon": Script(
        lambda model: [woodfisher(0.8, start_epoch=1.5, end_epoch=2, leave_enabled=False)],
        lambda: network(keras.optimizers.Muon(0.01)),
    ),
    "SGD, sums of two gradients": Script(
        lambda model: [woodfisher(0.8, start_epoch=2, end_epoch=4)],
        lambda: network(keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2)),
    ),
}
"""Kinds of run: what a script gives to `fit`."""


class At(keras.callbacks.Callback):
    """Kills before a batch."""

    may_come_before_pruning = True

    def __init__(self, epoch, batch):
        super().__init__()
        self._place = epoch, batch
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self._epoch, batch) == self._place:
            raise Killed


def nth(number, function, after=False):
    """Kills at the n-th call of a function, before or after it; the calls before do what they should."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            raise Killed
        value = function(*args, **kwargs)
        if len(calls) == number:
            raise Killed
        return value

    return counted


def amid_update(number):
    """Kills when the first variable of an update is written."""
    from keras_woodfisher.model.targets import Target

    return mock.patch.object(Target, "write", nth(number, Target.write))


def amid_our_file(number):
    from keras_woodfisher.callbacks import saved_states

    return mock.patch.object(saved_states.os, "replace", nth(number, saved_states.os.replace))


def after_our_file(number):
    return mock.patch.object(keras.Model, "save_weights", nth(number, keras.Model.save_weights))


def after_weights(number):
    """Between the two files that a backup has, of which the second one tells the epoch."""
    own = keras.Model.save_weights
    return mock.patch.object(keras.Model, "save_weights", nth(number, own, after=True))


MOMENTS = {
    "first epoch": lambda: At(0, 2),
    "begin of an epoch": lambda: At(2, 0),
    "amid an epoch": lambda: At(1, 2),
    "last batch": lambda: At(3, 3),
    "last epoch": lambda: At(4, 1),
    "amid an update": lambda: amid_update(5),
    "amid our file": lambda: amid_our_file(3),
    "between our file and the backup": lambda: after_our_file(3),
    "between the backup's two files": lambda: after_weights(3),
}
"""When it is killed."""


def train(script, backup, moment=None, **more):
    """One process: the script from its beginning, until it is done or killed."""
    keras.utils.set_random_seed(0)
    model = script.model()
    before = []
    with ExitStack() as stack:
        if isinstance(moment, keras.callbacks.Callback):
            before.append(moment)
        elif moment is not None:
            stack.enter_context(moment)
        log = Log()
        callbacks = [*before, *script.callbacks(model), *([] if backup is None else [backup]), log]
        try:
            model.fit(**script.data(), epochs=EPOCHS, verbose=0, callbacks=callbacks, **more)
        except Killed:
            return None
    return outcome(model), log.seen


class Log(keras.callbacks.Callback):
    """The sparsity after each batch of each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = {}
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen[self._epoch, batch] = (logs or {}).get("sparsity")


def outcome(model):
    """All that a file holds: weights and the optimizer's state."""
    return [keras.ops.convert_to_numpy(v) for v in [*model.weights, *model.optimizer.variables]]


def compared(script, unbroken, moment, folder):
    """What a killed run that is started again has otherwise than the unbroken one: "" if nothing, to the bit."""
    whole, seen = unbroken
    backup = str(Path(folder) / "backup")
    if train(script, keras.callbacks.BackupAndRestore(backup), moment) is not None:
        return "not killed"
    again, seen_again = train(script, keras.callbacks.BackupAndRestore(backup))
    differing = sum(not np.array_equal(one, other) for one, other in zip(whole, again, strict=True))
    wrong = [place for place, sparsity in seen_again.items() if sparsity != seen[place]]
    texts = [f"{differing} of {len(whole)} variables differ"] if differing else []
    if wrong:
        texts.append(f"sparsity from {wrong[0]} on: {seen_again[wrong[0]]} for {seen[wrong[0]]}")
    if Path(backup).exists():
        texts.append("files are left")
    return "; ".join(texts)


class Slow(keras.callbacks.Callback):
    """Gives the killer time to hit."""

    may_come_before_pruning = True

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            print("epoch", flush=True)
        time.sleep(0.05)


def child(kind, folder):
    """The script, in a process of its own; what comes out is written at its end."""
    script = KINDS[kind]
    slow = script._replace(callbacks=lambda model: [Slow(), *script.callbacks(model)])
    values, _ = train(slow, keras.callbacks.BackupAndRestore(str(folder / "backup")))
    np.savez(folder / "out.npz", *values)


def killed_for_real(kind, unbroken, rng, folder):
    """Starts it again and again; each process but the last is killed (SIGKILL) at a random time of its training."""
    command = [sys.executable, __file__, "--child", folder, "--kinds", kind]
    kills = 0
    while not (folder / "out.npz").exists():
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.readline()
            if kills < 3:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(0.0, 2.0))
                process.kill()
                kills += 1
            if kills == 3 and process.wait() > 0:
                return f"failed: {process.stderr.read().decode()[-300:]}"
    with np.load(folder / "out.npz") as file:
        return "" if all(np.array_equal(a, b) for a, b in zip(unbroken[0], file.values(), strict=True)) else "differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--moments", nargs="*", default=list(MOMENTS), choices=list(MOMENTS), metavar="MOMENT")
    parser.add_argument("--real", type=int, default=0, metavar="N", help="runs of each kind that are killed thrice")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.child:
        child(args.kinds[0], args.child)
        return
    for kind in args.kinds:
        unbroken = train(KINDS[kind], None)
        for number in range(args.real):
            with tempfile.TemporaryDirectory() as folder:
                text = killed_for_real(kind, unbroken, np.random.default_rng(number), Path(folder))
            print(f"{keras.backend.backend()} | {kind} | killed thrice | {text or 'bit-identical'}", flush=True)
        if args.real:
            continue
        for moment in args.moments:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    text = compared(KINDS[kind], unbroken, MOMENTS[moment](), folder)
                except Exception as error:  # noqa: BLE001
                    text = f"{type(error).__name__}: {error}"
            print(f"{keras.backend.backend()} | {kind} | {moment} | {text or 'bit-identical'}", flush=True)


if __name__ == "__main__":
    main()
