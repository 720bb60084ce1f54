"""TrainableParams: frozen variables are exactly unchanged, unfrozen ones are trained, and all is put back."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops
from keras_woodfisher_backends.keras_internals.training import several_steps_are_possible
from releases import MultiOptimizer, OptimizerMap, ScheduleFreeAdamW

import keras_woodfisher as kw
from keras_woodfisher.callbacks import SetLearningRate, SetWeightDecay, TrainableParams
from keras_woodfisher.model.optimizer_variables import inner_optimizer, parts_of

BACKEND = keras.backend.backend()
STEPS = 4
# Compiled on JAX only, where each operation by itself is slow.
QUICK = {"jit_compile": BACKEND == "jax"}


def numpy(value):
    return np.array(ops.convert_to_numpy(value))


class Watch(keras.callbacks.Callback):
    """The values of variables before training and after each step, (1 + steps, ...)."""

    def __init__(self, *variables, each_step=True):
        super().__init__()
        self._variables = variables
        self._each_step = each_step
        self.values = [[numpy(v)] for v in variables]

    def _read(self):
        assert self.model is not None
        for variable, rows in zip(self._variables, self.values, strict=True):
            rows.append(numpy(variable))

    def on_train_batch_end(self, batch, logs=None):
        if self._each_step:
            self._read()

    def on_epoch_end(self, epoch, logs=None):
        if not self._each_step:
            self._read()

    def moved(self, index=0):
        """Whether the variable changed in each step."""
        rows = np.array(self.values[index])
        return [bool((a != b).any()) for a, b in itertools.pairwise(rows)]


def line(trainable=True, **kwargs):
    """Its loss is `mean(x @ w) + b`: with one-hot rows, step k takes the rate off weight k, and off the bias."""
    model = keras.Sequential([keras.layers.Input((STEPS,)), keras.layers.Dense(1, name="line")])
    model.layers[0].trainable = trainable
    model.compile(keras.optimizers.SGD(1.0), loss=lambda y, out: ops.mean(out), **(QUICK | kwargs))
    model.layers[0].kernel.assign(np.zeros((STEPS, 1)))
    return model


def fit_line(model, callbacks, epochs=2, **kwargs):
    x, y = np.eye(STEPS, dtype="float32"), np.zeros((STEPS, 1), "float32")
    model.fit(x, y, batch_size=1, shuffle=False, verbose=0, epochs=epochs, callbacks=callbacks, **kwargs)
    return numpy(model.layers[0].kernel)[:, 0].tolist(), float(numpy(model.layers[0].bias)[0])


MODES = {
    "jit": {"jit_compile": True},
    "no_jit": {"jit_compile": False},
    "eager": {"run_eagerly": True},
    "executions": {"steps_per_execution": 2},
}
if BACKEND == "torch":
    del MODES["jit"]
if not several_steps_are_possible():
    del MODES["executions"]


@pytest.mark.parametrize("mode", MODES)
def test_freezes_and_unfreezes_amid_epochs(mode):
    model = line(**MODES[mode])
    callback = TrainableParams(["line/kernel"], trainable=False, start_epoch=0.5, end_epoch=1.5)
    # Steps 0 and 1 of the first epoch and 2 and 3 of the second train the kernel; all train the bias.
    assert fit_line(model, [callback]) == ([-1, -1, -1, -1], -8)
    assert fit_line(model, [callback], epochs=3, initial_epoch=1) == ([-2, -2, -3, -3], -16)


@pytest.mark.parametrize("mode", MODES)
def test_unfreezes_what_the_optimizer_never_saw(mode):
    model = line(trainable=False, **MODES[mode])
    callback = TrainableParams("line/kernel", start_epoch=0.5, end_epoch=1.5)
    assert fit_line(model, [callback]) == ([-1, -1, -1, -1], 0)
    assert model.trainable_variables == []
    assert not any("woodfisher" in v.name for v in model.optimizer.variables)


def test_everything_frozen_and_part_of_it_unfrozen():
    model = line()
    callbacks = [TrainableParams(trainable=False), TrainableParams("line/bias", start_epoch=1, end_epoch=1.75)]
    assert fit_line(model, callbacks, epochs=3) == ([0, 0, 0, 0], -3)
    assert len(model.trainable_variables) == 2


@pytest.mark.parametrize("turned", [False, True])
def test_the_plan_that_began_last_holds(turned):
    model = line()
    callbacks = [
        TrainableParams("__ALL__", trainable=False, end_epoch=1.25),
        TrainableParams("line.bias", trainable=False, start_epoch=0.5, end_epoch=2),
        TrainableParams("line.weight", start_epoch=0.5, end_epoch=1),
    ]
    kernel, bias = fit_line(model, callbacks[:: -1 if turned else 1], epochs=3)
    assert (kernel, bias) == ([-1, -2, -3, -3], -4)


OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "schedule_free": lambda: ScheduleFreeAdamW(0.01),
    "multi": lambda: MultiOptimizer(
        OptimizerMap(keras.optimizers.SGD(0.05, momentum=0.9), {".*out/.*": keras.optimizers.Adam(0.01, use_ema=True)})
    ),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
        initial_scale=8.0,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_variables_change_places(make_mlp, blobs, name):
    model = make_mlp(compile=False)
    hidden, out = model.get_layer("hidden"), model.get_layer("out")
    callbacks = [TrainableParams("re:out", trainable=False, start_epoch=0.5, end_epoch=1.5)]
    if name == "multi":
        callbacks.append(TrainableParams("re:hidden", trainable=False, end_epoch=0.5))
    else:
        # The optimizer knows nothing of it.
        hidden.trainable = False
        callbacks.append(TrainableParams("re:hidden", start_epoch=0.5))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[name](), loss, **QUICK)
    model.optimizer.build(model.trainable_variables)
    holders = [model.optimizer, inner_optimizer(model.optimizer), *parts_of(inner_optimizer(model.optimizer))]
    stock, trainable = [dict(vars(o)) for o in holders], [v.path for v in model.trainable_variables]

    watch = Watch(hidden.kernel, out.kernel, out.bias)
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[*callbacks, watch])
    steps = [(step, name != "accumulation" or step % 2 == 1) for step in range(8)]
    assert watch.moved(0) == [works and step >= 2 for step, works in steps]
    for index in (1, 2):
        assert watch.moved(index) == [works and not 2 <= step < 6 for step, works in steps]
    # No average that began at zero was put in the place of a weight.
    assert np.abs(watch.values[0][-1]).mean() > 0.9 * np.abs(watch.values[0][0]).mean()

    assert [v.path for v in model.trainable_variables] == trainable
    for before, holder in zip(stock, holders, strict=True):
        lists = {key: value for key, value in before.items() if isinstance(value, list)}
        assert all(vars(holder)[key] is value for key, value in lists.items())
        assert vars(holder).keys() - before.keys() <= {"_exclude_from_weight_decay_cache"}
    if name == "adamw":
        again = Watch(hidden.kernel, out.kernel)
        model.fit(*blobs, batch_size=24, epochs=1, verbose=0, callbacks=[again])
        assert (again.moved(0), again.moved(1)) == ([False] * 4, [True] * 4)


def test_gradients_from_before_freezing_are_forgotten():
    model = line()
    model.compile(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2), loss=model.loss, **QUICK)
    frozen = TrainableParams("line/bias", trainable=False, start_epoch=0.25, end_epoch=1)
    # The bias's gradient is 1 throughout; the step pairs (4, 5) and (6, 7) take 1 off.
    assert fit_line(model, [frozen])[1] == -2


def test_a_stream_of_unknown_length():
    x, y = np.eye(STEPS, dtype="float32"), np.zeros((STEPS, 1), "float32")
    if BACKEND == "torch":
        import torch

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter([(x[k], y[0]) for k in range(STEPS)])

        data = torch.utils.data.DataLoader(Stream(), batch_size=1)
    else:
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(1).filter(lambda *row: tf.constant(True))
    model = line()
    # Due after the last step, where Keras tells of one more that finds no data (torch: at the next epoch's start).
    freezing = TrainableParams("line/kernel", trainable=False, start_epoch=1.9, end_epoch=3.5)
    model.fit(data, epochs=4, verbose=0, shuffle=False, callbacks=[freezing])
    assert numpy(model.layers[0].kernel)[:, 0].tolist() == [-2, -2, -3, -3]
    assert numpy(model.layers[0].bias)[0] == -16


def pruning(final=0.5, start=1.0, end=2.0, **kwargs):
    settings = {"start_epoch": start, "end_epoch": end, "init_sparsity": 0.25, "method": "magnitude", "verbose": 0}
    return kw.WoodFisherPruning(final, **(settings | kwargs))


def zeros(values):
    return int((values == 0).sum())


def test_zeros_are_kept_through_freezing_and_unfreezing(make_mlp, blobs):
    model = make_mlp(keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True, ema_overwrite_frequency=3), **QUICK)
    kernel, bias = model.get_layer("hidden").kernel, model.get_layer("hidden").bias
    watch = Watch(kernel, bias)
    callbacks = [
        pruning(params="hidden/kernel"),
        SetLearningRate(0.02, start_epoch=1.5),
        SetWeightDecay(0.1, start_epoch=1.5),
        TrainableParams("hidden/kernel", trainable=False, end_epoch=1),
        TrainableParams("hidden/kernel", trainable=False, start_epoch=2.5, end_epoch=3.5),
        TrainableParams("hidden/bias", trainable=False, start_epoch=1.25, end_epoch=2.25),
        watch,
    ]
    model.fit(*blobs, batch_size=24, epochs=4, verbose=0, callbacks=callbacks)
    assert watch.moved(0) == [False] * 4 + [True] * 6 + [False] * 4 + [True] * 2
    assert watch.moved(1) == [True] * 5 + [False] * 4 + [True] * 7
    counts = [zeros(values) for values in watch.values[0]]
    size = kernel.shape[0] * kernel.shape[1]
    assert counts == [0] * 5 + [size // 4] * 4 + [size // 2] * 8
    pruned = watch.values[0][9] == 0
    assert all((values[pruned] == 0).all() for values in watch.values[0][9:])


def test_keep_zeros_beside(make_mlp, blobs):
    model = make_mlp(keras.optimizers.AdamW(0.01, weight_decay=0.1), **QUICK)
    kernel = model.get_layer("hidden").kernel
    kw.prune(model, 0.5, method="magnitude", verbose=0)
    watch = Watch(kernel)
    callbacks = [kw.KeepZeros(), TrainableParams(trainable=False, start_epoch=0.5, end_epoch=1.25), watch]
    before = zeros(numpy(kernel))
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=callbacks)
    assert watch.moved() == [True] * 2 + [False] * 3 + [True] * 3
    assert [zeros(values) for values in watch.values[0]] == [before] * 9


def test_gradients_are_sampled_and_buffered_while_others_are_frozen(make_mlp, blobs):
    for data in (blobs, None):
        model = make_mlp(**QUICK)
        start = numpy(model.get_layer("out").kernel)
        callbacks = [
            pruning(params="hidden/kernel", method="woodfisher", num_grads=4, data=data, update_frequency=0.5),
            TrainableParams("re:out", trainable=False),
        ]
        model.fit(*blobs, batch_size=24, epochs=3, verbose=0, callbacks=callbacks)
        assert zeros(numpy(model.get_layer("hidden").kernel)) == 96
        assert (numpy(model.get_layer("out").kernel) == start).all()


@pytest.mark.parametrize("data", ["magnitude", "buffered"])
def test_pruning_of_a_frozen_variable_is_refused(make_mlp, blobs, data):
    model = make_mlp(**QUICK)
    watch = Watch(model.get_layer("hidden").kernel)
    if data == "magnitude":
        pruner, start, message = (
            pruning(),
            1.5,
            r"hidden/kernel' is frozen at epoch 1.5 .* prunes it from epoch 1 to 2",
        )
    else:
        pruner, start = pruning(method="woodfisher", num_grads=2), 0.0
        message = "hidden/kernel' is frozen at epoch 0 .* collects its gradients or prunes it from epoch 0 to 2"
    freezing = TrainableParams("re:hidden", trainable=False, start_epoch=start, end_epoch=start + 0.25)
    with pytest.raises(ValueError, match=message):
        model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[pruner, freezing, watch])
    assert len(watch.values[0]) == 1
    # Another one that says otherwise decides.
    callbacks = [pruner, freezing, TrainableParams("hidden/kernel", start_epoch=start), watch]
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=callbacks)
    assert watch.moved() == [True] * 8


class Fail(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise RuntimeError("broken off")


def test_a_broken_off_fit_is_tidied_by_the_next(make_mlp, blobs):
    model = make_mlp(keras.optimizers.Adam(0.01), **QUICK)
    with pytest.raises(RuntimeError, match="broken off"):
        model.fit(*blobs, verbose=0, callbacks=[TrainableParams(["re:hidden"], trainable=False), Fail()])
    assert len(model.trainable_variables) == 2
    watch = Watch(model.get_layer("hidden").kernel)
    model.fit(*blobs, batch_size=24, verbose=0, callbacks=[watch])
    assert watch.moved() == [True] * 4
    assert not any("keras_woodfisher" in name for name in vars(model))


def test_validation_sees_variables_in_their_places(blobs):
    # Equal shapes change sides at once, which a compiled test step of before would mix up.
    x, _ = blobs
    model = keras.Sequential(
        [keras.layers.Input((12,)), *(keras.layers.Dense(12, name=name) for name in ("one", "two"))]
    )
    model.compile("sgd", "mse", **QUICK)
    callbacks = [
        TrainableParams("re:one", trainable=False, end_epoch=1),
        TrainableParams("re:two", trainable=False, start_epoch=1, end_epoch=2),
    ]
    seen = []

    class Check(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            values = [numpy(v) for v in self.model.weights]
            out = (x @ values[0] + values[1]) @ values[2] + values[3]
            seen.append((logs["val_loss"], float(((out - x) ** 2).mean())))

    model.fit(
        x, x, batch_size=24, epochs=3, verbose=0, validation_data=(x, x), validation_batch_size=96,
        callbacks=[*callbacks, Check()],
    )  # fmt: skip
    assert len(seen) == 3
    np.testing.assert_allclose(*zip(*seen, strict=True), rtol=1e-4)


def test_a_file_saved_meanwhile_holds_all_state(make_mlp, blobs, tmp_path):
    path = str(tmp_path / "frozen.keras")
    model = make_mlp(keras.optimizers.Adam(0.01), **QUICK)

    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                self.model.save(path)

    freezing = TrainableParams("re:hidden", trainable=False, start_epoch=0.5)
    model.fit(*blobs, batch_size=24, verbose=0, callbacks=[freezing, Save()])
    loaded = keras.models.load_model(path)
    by_name = {v.path: v for v in loaded.optimizer.variables}
    momentum = next(numpy(v) for name, v in by_name.items() if "hidden_kernel_momentum" in name)
    assert momentum.any()
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)
    loaded.fit(*blobs, verbose=0)


def test_a_hand_written_loop_without_epochs(make_mlp, blobs):
    x, y = blobs
    model = make_mlp(**QUICK)
    freezing = TrainableParams("re:hidden", trainable=False, start_epoch=0.5, end_epoch=0.75)
    watch = Watch(model.get_layer("hidden").kernel)
    callbacks = keras.callbacks.CallbackList([freezing, watch], model=model, epochs=1, steps=4)
    callbacks.on_train_begin()
    for batch in range(4):
        callbacks.on_train_batch_begin(batch)
        model.train_on_batch(x[batch::4], y[batch::4])
        callbacks.on_train_batch_end(batch)
    callbacks.on_train_end()
    assert watch.moved() == [True, True, False, True]


def test_what_cannot_be_trained_is_refused_before_the_first_batch(make_mlp, blobs):
    def refuses(error, message, model, callback):
        watch = Watch()
        with pytest.raises(error, match=message):
            model.fit(*blobs, verbose=0, callbacks=[callback, watch])

    unknown = "params names 'hiden/kernel', which no variable has. The nearest: hidden/kernel"
    refuses(KeyError, unknown, make_mlp(**QUICK), TrainableParams(["hiden/kernel"]))
    refuses(ValueError, "names no variable. Write '__ALL__'", make_mlp(**QUICK), TrainableParams([]))
    frozen = make_mlp(compile=False)
    frozen.trainable = False
    frozen.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    refuses(ValueError, "the model as a whole is frozen", frozen, TrainableParams())


def test_what_a_multi_optimizer_does_not_know_is_refused(make_mlp, blobs):
    half = make_mlp(compile=False)
    half.get_layer("hidden").trainable = False
    half.compile(OPTIMIZERS["multi"](), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="hidden/kernel' was frozen when the MultiOptimizer was built"):
        half.fit(*blobs, verbose=0, callbacks=[TrainableParams()])


def test_arguments_are_checked_and_written():
    for arguments, error, message in [
        ({"params": 3}, TypeError, "params must be a name or a list of names, got 3"),
        ({"trainable": 1}, TypeError, "trainable must be True or False, got 1"),
        ({"start_epoch": -2}, ValueError, "start_epoch must be at least 0, or -1 for at once, got -2"),
        ({"start_epoch": 2, "end_epoch": 2}, ValueError, "end_epoch must lie after start_epoch=2, or be -1"),
    ]:
        with pytest.raises(error, match=message):
            TrainableParams(**arguments)
    config = {"params": ["re:out"], "trainable": False, "start_epoch": -1.0, "end_epoch": 2.5}
    assert TrainableParams(**config).get_config() == config
    assert TrainableParams.from_config(config).get_config() == config
