"""The learning rate and the weight decay that each step really used, shown by what it did to a weight."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops
from keras_woodfisher_backends.keras_internals.training import several_steps_are_possible
from releases import MultiOptimizer, OptimizerMap

import keras_woodfisher as kw
from keras_woodfisher.callbacks import LearningRateFunction, LearningRateSchedule, SetLearningRate, SetWeightDecay
from keras_woodfisher.callbacks.learning_rate_functions import SCHEDULES

BACKEND = keras.backend.backend()
STEPS = 4
# Compiled on JAX only, where each operation by itself is slow.
QUICK = {"jit_compile": BACKEND == "jax"}


def linear_model(optimizer=None, start=0.0, **kwargs):
    """`mean(x @ w)` is its loss: with one-hot rows, step k changes only weight k, by exactly its rate."""
    model = keras.Sequential([keras.layers.Input((STEPS,)), keras.layers.Dense(1, use_bias=False, name="line")])
    model.layers[0].kernel.assign(np.full((STEPS, 1), start))
    model.compile(optimizer or keras.optimizers.SGD(7.0), loss=lambda y, out: ops.mean(out), **(QUICK | kwargs))
    return model


class Weights(keras.callbacks.Callback):
    """The weights after each epoch (so that nothing brings JAX's variables up to date amid one)."""

    def __init__(self, before):
        super().__init__()
        self.rows = [before]

    def on_epoch_end(self, epoch, logs=None):
        self.rows.append(ops.convert_to_numpy(self.model.layers[0].kernel)[:, 0].copy())

    @property
    def steps(self):
        """What each step took off its weight, (epochs, steps)."""
        return -np.diff(np.array(self.rows), axis=0)


class Reading(keras.callbacks.Callback):
    """Brings JAX's variables up to date at each step, as a callback of the user's own may."""

    def on_train_batch_begin(self, batch, logs=None):
        assert self.model is not None

    def on_train_batch_end(self, batch, logs=None):
        assert self.model is not None


def one_hot():
    return np.eye(STEPS, dtype="float32"), np.zeros((STEPS, 1), "float32")


def rates_used(callbacks, epochs, model=None, **kwargs):
    model = model or linear_model()
    watch = Weights(ops.convert_to_numpy(model.layers[0].kernel)[:, 0].copy())
    x, y = one_hot()
    settings = {"batch_size": 1, "shuffle": False, "verbose": 0} | kwargs
    model.fit(x, y, epochs=epochs, callbacks=[*callbacks, watch], **settings)
    return watch.steps


def rate_of(model):
    return float(ops.convert_to_numpy(model.optimizer.learning_rate))


def ramp(kind="linear", init=1.0, final=0.2, start=0.5, end=2.5, **kwargs):
    return LearningRateFunction(kind, init_lr=init, final_lr=final, start_epoch=start, end_epoch=end, **kwargs)


# Rates of 3 epochs of 4 steps; 7 is the compiled one.
LINEAR = [[7, 7, 1.0, 0.9], [0.8, 0.7, 0.6, 0.5], [0.4, 0.3, 0.2, 0.2]]
CYCLIC = [[7, 7, 1.0, 0.8], [0.6, 0.4, 1.0, 0.8], [0.6, 0.4, 0.2, 0.2]]
COSINE = [7, 7, *[0.6 + 0.4 * np.cos(np.pi * k / 8) for k in range(8)], 0.2, 0.2]


@pytest.mark.parametrize(
    ("kind", "expected"), [("linear", LINEAR), ("cyclic_linear", CYCLIC), ("cosine", COSINE)], ids=lambda v: str(v)[:6]
)
def test_each_step_uses_the_rate_of_its_position(kind, expected):
    used = rates_used([ramp(kind)], 3)
    np.testing.assert_allclose(used, np.reshape(expected, (3, STEPS)), atol=2e-6)


MODES = {
    "jit": {"jit_compile": True},
    "no_jit": {"jit_compile": False},
    "eager": {"run_eagerly": True},
    "executions": {"steps_per_execution": 2},
    "reading": {},
}
if BACKEND == "torch":
    del MODES["jit"]
if not several_steps_are_possible():
    del MODES["executions"]


@pytest.mark.parametrize("mode", MODES)
def test_rates_in_every_mode(mode):
    callbacks = [ramp(), *([Reading()] if mode == "reading" else [])]
    used = rates_used(callbacks, 3, linear_model(**MODES[mode]))
    expected = np.array(LINEAR, float)
    if mode == "executions":
        expected = expected[:, [0, 0, 2, 2]]
    np.testing.assert_allclose(used, expected, atol=2e-6)


# From torch.optim.lr_scheduler (PyTorch 2), SGD at 0.8, stepped once an epoch.
TORCH = [
    ("StepLR", {"step_size": 3, "gamma": 0.5}, [0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.2, 0.2]),
    ("StepLR", {"step_size": 2}, [0.8, 0.8, 0.08, 0.08, 0.008]),
    ("MultiStepLR", {"milestones": [2, 5, 5], "gamma": 0.5}, [0.8, 0.8, 0.4, 0.4, 0.4, 0.1, 0.1, 0.1]),
    ("MultiStepLR", {"milestones": [0, 3]}, [0.08, 0.08, 0.08, 0.008]),
    ("ExponentialLR", {"gamma": 0.9}, [0.8, 0.72, 0.648, 0.5832, 0.52488, 0.472392]),
    ("CosineAnnealingWarmRestarts", {"T_0": 3}, [0.8, 0.6, 0.2, 0.8, 0.6, 0.2, 0.8, 0.6, 0.2]),
    (
        "CosineAnnealingWarmRestarts",
        {"T_0": 2, "T_mult": 2, "eta_min": 0.1},
        [0.8, 0.45, 0.8, 0.697487373, 0.45, 0.202512627, 0.8, 0.773357836, 0.697487373, 0.583939201, 0.45, 0.316060799],
    ),
    ("CosineAnnealingWarmRestarts", {"T_0": 1, "T_mult": 3}, [0.8, 0.8, 0.6, 0.2]),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), TORCH)
def test_schedules_are_those_of_pytorch(kind, settings, expected):
    callback = LearningRateSchedule(kind, settings, init_lr=0.8, start_epoch=1.3)
    for epoch, rate in enumerate(expected):
        for part in (0.0, 0.5, 0.99):
            assert callback.value_at(1.3 + epoch + part) == pytest.approx(rate, abs=1e-8)
    assert callback.value_at(1.2) is None


@pytest.mark.once
def test_defaults_are_those_of_pytorch():
    scheduler = pytest.importorskip("torch.optim.lr_scheduler")
    for kind, function in SCHEDULES.items():
        theirs = inspect.signature(getattr(scheduler, kind)).parameters
        for name, own in inspect.signature(function).parameters.items():
            if own.kind is own.KEYWORD_ONLY:
                assert own.default == theirs[name].default, (kind, name)


def test_a_schedule_ends():
    settings = {"init_lr": 1.0, "start_epoch": 1, "end_epoch": 2.5}
    callback = LearningRateSchedule("ExponentialLR", {"gamma": 0.5}, **settings)
    used = rates_used([callback], 4)
    np.testing.assert_allclose(used[:, [0, 3]], [[7, 7], [1, 1], [0.5, 0.5], [0.5, 0.5]], atol=2e-6)
    # Where it ends as an epoch would begin, that epoch's rate is never reached.
    assert LearningRateSchedule("StepLR", {"step_size": 2}, init_lr=1.0, end_epoch=2).value_at(9.0) == 1.0


@pytest.mark.parametrize("start", [-1, 0, 0.5, 1.25, 2, 9])
def test_a_rate_is_set_once(start):
    used = rates_used([SetLearningRate(0.5, start_epoch=start)], 2)
    position = np.arange(8).reshape(2, 4) / 4
    np.testing.assert_allclose(used, np.where(position >= start, 0.5, 7), atol=2e-6)


def test_what_is_set_elsewhere_meanwhile_stays():
    other = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 3.0 if epoch == 1 else rate)
    used = rates_used([SetLearningRate(0.5), other], 2)
    np.testing.assert_allclose(used, [[0.5] * 4, [3] * 4], atol=2e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_of_several_the_one_that_began_last_wins(turned):
    callbacks = [
        ramp(start=0, end=2),
        SetLearningRate(5.0, start_epoch=2),
        ramp("cyclic_linear", 4, 2, 0.5, 1, cycle_epochs=0.5),
    ]
    used = rates_used(callbacks[:: -1 if turned else 1], 3)
    np.testing.assert_allclose(used, [[1.0, 0.9, 4, 3], [0.6, 0.5, 0.4, 0.3], [5] * 4], atol=3e-6)
    # A resumed run goes on as the unbroken one.
    used = rates_used(callbacks[:: -1 if turned else 1], 2, initial_epoch=1)
    np.testing.assert_allclose(used, [[0.6, 0.5, 0.4, 0.3]], atol=3e-6)


def test_the_rate_after_training_is_the_one_due_then():
    model = linear_model()
    history = model.fit(*one_hot(), batch_size=1, epochs=2, verbose=0, callbacks=[ramp(end=2)])
    assert rate_of(model) == pytest.approx(0.2)
    np.testing.assert_allclose(history.history["learning_rate"], [0.8666667, 0.3333333], atol=1e-6)
    model.fit(*one_hot(), epochs=3, initial_epoch=2, verbose=0)
    assert rate_of(model) == pytest.approx(0.2)


class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == 2


def test_a_stopped_epoch_does_not_turn_the_rate_back():
    model = linear_model()
    model.fit(*one_hot(), batch_size=1, epochs=2, verbose=0, callbacks=[ramp(start=0, end=1), Stop()])
    assert rate_of(model) == pytest.approx(0.6)


def test_an_unknown_number_of_steps_counts_whole_epochs_first():
    model = linear_model()
    watch = Weights(np.zeros(STEPS))
    # 4 steps, but the first epoch can't know.
    x, y = one_hot()

    def batches():
        while True:
            yield from ((x[k][None], y[:1]) for k in range(STEPS))

    model.fit(batches(), steps_per_epoch=STEPS, epochs=2, verbose=0, shuffle=False, callbacks=[ramp(end=1.5), watch])
    np.testing.assert_allclose(watch.steps, [[7, 7, 1, 0.8], [0.6, 0.4, 0.2, 0.2]], atol=3e-6)


def test_a_generator_of_unknown_length():
    x, y = one_hot()

    model = linear_model()
    if BACKEND == "torch":
        import torch

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter([(x[k], y[0]) for k in range(STEPS)])

        data = torch.utils.data.DataLoader(Stream(), batch_size=1)
    else:
        import tensorflow as tf

        rows = tf.data.Dataset.from_tensor_slices((x, y)).batch(1)
        data = rows.filter(lambda *row: tf.constant(True))
    watch = Weights(np.zeros(STEPS))
    callbacks = [
        ramp(start=0.5, end=2.5),
        SetWeightDecay(0.0, start_epoch=0.5),
        SetLearningRate(9.0, start_epoch=2.9),
        watch,
    ]
    model.fit(data, epochs=4, verbose=0, shuffle=False, callbacks=callbacks)
    expected = [[7] * 4, LINEAR[1], LINEAR[2], [9] * 4]
    np.testing.assert_allclose(watch.steps, expected, atol=5e-6)


def test_a_hand_written_loop_without_epochs():
    model = linear_model()
    x, y = one_hot()
    callbacks = keras.callbacks.CallbackList([ramp(start=0, end=1)], model=model, epochs=1, steps=STEPS)
    callbacks.on_train_begin()
    for batch in range(STEPS):
        callbacks.on_train_batch_begin(batch)
        model.train_on_batch(x[batch][None], y[:1])
        callbacks.on_train_batch_end(batch)
    callbacks.on_train_end()
    np.testing.assert_allclose(ops.convert_to_numpy(model.layers[0].kernel)[:, 0], [-1, -0.8, -0.6, -0.4], atol=2e-6)


def test_a_wrapped_optimizer():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(7.0), initial_scale=4.0)
    model = linear_model(scaled)
    np.testing.assert_allclose(rates_used([ramp()], 3, model), LINEAR, atol=2e-6)


def test_several_optimizers():
    parts = {".*kernel": keras.optimizers.SGD(7.0, name="kernels")}
    many = MultiOptimizer(OptimizerMap(keras.optimizers.Adam(3.0), parts))
    model = linear_model(many)
    history = []
    log = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: history.append(dict(logs)))
    np.testing.assert_allclose(rates_used([ramp(), log], 3, model), LINEAR, atol=2e-6)
    assert history[-1]["learning_rate_kernels"] == history[-1]["learning_rate_adam"] == pytest.approx(0.2)


def test_a_rate_that_cannot_be_set_is_refused_before_the_first_batch():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    for rate, kind in ((schedule, "ExponentialDecay"), (lambda: 0.1, "function")):
        model = linear_model(keras.optimizers.SGD(rate))
        watch = Weights(np.zeros(STEPS))
        with pytest.raises(ValueError, match=rf"can't be set by SetLearningRate, since it is {kind}. Compile .*SGD\("):
            model.fit(*one_hot(), verbose=0, callbacks=[SetLearningRate(0.1), watch])
        assert not watch.steps.size
    bare = keras.callbacks.CallbackList([ramp()], model=keras.Sequential([keras.layers.Input((2,))]))
    with pytest.raises(ValueError, match=r"compiled with an optimizer before training with LearningRateFunction"):
        bare.on_train_begin()


@pytest.mark.parametrize(("mode", "compiled"), [*((mode, None) for mode in MODES), ("reading", 0.25)])
def test_weight_decay_from_a_step_on(mode, compiled):
    optimizer = keras.optimizers.SGD(0.5, weight_decay=compiled)
    model = linear_model(optimizer, start=8.0, **MODES[mode])
    callbacks = [SetWeightDecay(0.5, start_epoch=1.5), *([Reading()] if mode == "reading" else [])]
    x, y = one_hot()
    watch = Weights(np.full(STEPS, 8.0))
    model.fit(0 * x, y, batch_size=1, epochs=2, shuffle=False, verbose=0, callbacks=[*callbacks, watch])
    # Without gradients, each step multiplies by 1 - decay * rate.
    before = 1 - 0.5 * (compiled or 0.0)
    np.testing.assert_allclose(watch.rows[1], 8 * np.full(STEPS, before**4), rtol=1e-5)
    np.testing.assert_allclose(watch.rows[2], 8 * np.full(STEPS, before**6 * 0.75**2), rtol=1e-5)
    assert optimizer.weight_decay == 0.5


def test_weight_decay_of_parts_and_of_muon():
    muon = keras.optimizers.Muon(0.1, name="muon")
    many = MultiOptimizer(OptimizerMap(keras.optimizers.SGD(0.1), {".*": muon}))
    model = linear_model(many)
    model.fit(*one_hot(), verbose=0, callbacks=[SetWeightDecay(0.25)])
    assert [part.weight_decay for part in many.optimizers] == [0.25, 0.25]
    assert muon.adam_weight_decay == 0.25


def test_a_step_is_made_anew_only_where_the_decay_changes():
    made = []
    model = linear_model(keras.optimizers.SGD(0.1, weight_decay=0.5))
    model.make_train_function()
    make = model.make_train_function
    vars(model)["make_train_function"] = lambda force=False: (made.append(force), make(force=force))
    model.fit(*one_hot(), epochs=2, verbose=0, callbacks=[SetWeightDecay(0.5), SetWeightDecay(0.2, start_epoch=1)])
    assert made.count(True) == 1


def test_beside_callbacks_that_hold_zeros(make_mlp, blobs):
    model = make_mlp(keras.optimizers.AdamW(0.01, weight_decay=0.1), **QUICK)
    kernels = [model.get_layer(name).kernel for name in ("hidden", "out")]
    kernels[1].assign(np.where(np.arange(48).reshape(16, 3) % 4 == 0, 0, ops.convert_to_numpy(kernels[1])))
    zeros = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            assert self.model is not None
            zeros.append([int((ops.convert_to_numpy(kernel) == 0).sum()) for kernel in kernels])

    callbacks = [
        kw.WoodFisherPruning(
            0.5,
            init_sparsity=0.25,
            start_epoch=0.5,
            end_epoch=1.5,
            method="magnitude",
            params="hidden/kernel",
            verbose=0,
        ),
        kw.KeepZeros("out/kernel"),
        LearningRateFunction("cosine", init_lr=0.02, final_lr=0.001, start_epoch=0, end_epoch=2),
        SetWeightDecay(0.0, start_epoch=0.75),
        SetWeightDecay(0.3, start_epoch=1.5),
        Count(),
    ]
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=callbacks)
    assert zeros == [[0, 12]] * 2 + [[48, 12]] * 4 + [[96, 12]] * 2


BAD = [
    (lambda: SetLearningRate("fast"), TypeError, "learning_rate must be a number, got 'fast'"),
    (lambda: SetLearningRate(-1), ValueError, "learning_rate must be at least 0, got -1"),
    (
        lambda: SetLearningRate(1, start_epoch=-2),
        ValueError,
        "start_epoch must be at least 0, or -1 for at once, got -2",
    ),
    (lambda: ramp("sine"), ValueError, "lr_func must be one of 'linear', 'cosine', 'cyclic_linear', got 'sine'"),
    (lambda: ramp(start=3), ValueError, "end_epoch=2.5 lies before start_epoch=3"),
    (lambda: ramp(cycle_epochs=0), ValueError, "cycle_epochs must be at least 1e-06, got 0"),
    (lambda: LearningRateSchedule("PolyLR", {}, init_lr=1), ValueError, "lr_class must be one of 'StepLR'.*'PolyLR'"),
    (lambda: LearningRateSchedule("StepLR", {}, init_lr=1), ValueError, "StepLR must have 'step_size', got {}"),
    (lambda: LearningRateSchedule("StepLR", {"step": 1}, init_lr=1), ValueError, "'step', but .* mean 'step_size'"),
    (
        lambda: LearningRateSchedule("StepLR", [2], init_lr=1),
        TypeError,
        r"dictionary of the arguments of StepLR, got \[2\]",
    ),
    (
        lambda: LearningRateSchedule("StepLR", {"step_size": 1.5}, init_lr=1),
        TypeError,
        "step_size must be a whole number",
    ),
    (
        lambda: LearningRateSchedule("MultiStepLR", {"milestones": 3}, init_lr=1),
        TypeError,
        "milestones must be a list of whole numbers of epochs, got 3",
    ),
    (
        lambda: LearningRateSchedule("ExponentialLR", {"gamma": 0.5}, init_lr=1, start_epoch=2, end_epoch=1),
        ValueError,
        "end_epoch must lie after start_epoch=2, or be -1 for the end of training, got 1",
    ),
    (lambda: SetWeightDecay(-0.1), ValueError, "weight_decay must be at least 0, got -0.1"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


MADE = [
    SetLearningRate(0.1, start_epoch=-1),
    ramp("cyclic_linear", cycle_epochs=0.5),
    LearningRateSchedule("MultiStepLR", {"milestones": [1, 2]}, init_lr=1, start_epoch=0.5),
    SetWeightDecay(0.1, start_epoch=2),
]


@pytest.mark.parametrize("callback", MADE, ids=lambda c: type(c).__name__)
def test_configurations_come_back(callback):
    config = json.loads(json.dumps(callback.get_config()))
    again = type(callback).from_config(config)
    assert type(again) is type(callback)
    assert again.get_config() == callback.get_config() == config
