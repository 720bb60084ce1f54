"""Pruned weights are exactly zero after every optimizer step, whatever trains them."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops
from keras_woodfisher_backends.keras_internals.training import keep_edits, several_steps_are_possible
from releases import MultiOptimizer, Muon, OptimizerMap, ScheduleFreeAdamW

import keras_woodfisher as kw
from keras_woodfisher.model.constraints import MaskConstraint
from keras_woodfisher.model.optimizer_variables import inner_optimizer, parts_of, slots_of

BACKEND = keras.backend.backend()
KERNELS = ("hidden", "out")


class Watch(keras.callbacks.Callback):
    """Reads the kernels after every step: weights that were zero once must be zero ever after."""

    def __init__(self, names=KERNELS):
        super().__init__()
        self._names = names
        self.counts = []
        self.regrown = 0

    def on_train_begin(self, logs=None):
        self._zero = None

    def on_train_batch_end(self, batch, logs=None):
        kernels = [ops.convert_to_numpy(self.model.get_layer(name).kernel) for name in self._names]
        assert all(np.isfinite(kernel).all() for kernel in kernels)
        zero = [kernel == 0 for kernel in kernels]
        for before, now in zip(self._zero or zero, zero, strict=True):
            self.regrown += int((before & ~now).sum())
        self._zero = zero
        self.counts.append(sum(int(z.sum()) for z in zero))


def zeros_in(model, names=KERNELS):
    return sum(int((ops.convert_to_numpy(model.get_layer(name).kernel) == 0).sum()) for name in names)


def magnitude(final=0.5, end=1.5, **kwargs):
    """Two prunings, at 0.5 and 1.5 epochs, in mid-epoch at 4 steps an epoch."""
    settings = {"init_sparsity": 0.25, "start_epoch": 0.5, "inter_func": "linear", "verbose": 0} | kwargs
    return kw.WoodFisherPruning(final, end_epoch=end, method="magnitude", **settings)


def check_held(model, x, y, watch=None, callbacks=(), sparsity=0.5, first=True, **kwargs):
    """Trains 2 epochs of 4 steps and checks the counts after each step."""
    watch = watch or Watch()
    model.fit(x, y, epochs=2, batch_size=24, verbose=0, callbacks=[magnitude(), *callbacks, watch], **kwargs)
    total = sum(int(np.prod(model.get_layer(name).kernel.shape)) for name in KERNELS)
    assert watch.regrown == 0
    expected = [0, 0, *[round(0.25 * total)] * 4, *[round(0.5 * total)] * 2] if first else [round(0.5 * total)] * 8
    assert watch.counts == expected
    assert zeros_in(model) == round(sparsity * total)
    return watch


OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "muon": lambda: Muon(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "ftrl": lambda: keras.optimizers.Ftrl(0.05),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "schedule_free": lambda: ScheduleFreeAdamW(0.01),
    "multi": lambda: MultiOptimizer(
        OptimizerMap(keras.optimizers.SGD(0.05, momentum=0.9), {".*out/.*": keras.optimizers.Adam(0.01, use_ema=True)})
    ),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "ema": lambda: keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True, ema_momentum=0.5),
    "ema_overwrite": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=3), initial_scale=8.0
    ),
}


def averages_of(optimizer):
    return optimizer._model_variables_moving_average if optimizer.use_ema else []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_after_every_step(make_mlp, blobs, name):
    model = make_mlp(OPTIMIZERS[name]())
    check_held(model, *blobs)
    optimizer = inner_optimizer(model.optimizer)
    # Averages never see what a step does to a weight before it is masked.
    for part in parts_of(optimizer):
        for variable, average in zip(part._trainable_variables, averages_of(part), strict=False):
            if variable.path.split("/")[-1] == "kernel":
                zero = ops.convert_to_numpy(variable) == 0
                assert not ops.convert_to_numpy(average)[zero].any()
    # Afterwards the optimizer is a stock optimizer again, and a fit without the callback lets weights grow.
    assert not any("woodfisher" in v.name for v in model.optimizer.variables)
    for part in (model.optimizer, optimizer, *parts_of(optimizer)):
        assert not {"apply", "save_own_variables", "load_own_variables", "_keras_woodfisher_hidden"} & set(vars(part))
        assert "_update_model_variables_moving_average" not in vars(part)
    assert "fit" not in vars(model)
    assert all(model.get_layer(n).kernel.constraint is None for n in KERNELS)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_zeros_in_mixed_precision(make_mlp, blobs, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = make_mlp(keras.optimizers.Adam(0.01))
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
        check_held(model, *blobs)
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_swapped_averages_are_as_sparse(make_mlp, blobs, swap_on_epoch):
    model = make_mlp(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9))
    seen = []
    spy = keras.callbacks.LambdaCallback(on_test_end=lambda logs: seen.append(zeros_in(model)))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    # Before validation the averages are swapped in; this spy sees them on its turn.
    spy.on_test_batch_end = lambda batch, logs=None: seen.append(zeros_in(spy.model))
    check_held(model, *blobs, callbacks=[swap, spy], validation_data=blobs)
    assert seen[-1] == 120


# torch.compile takes half a minute for one model; JAX without compilation is JAX run eagerly.
MODES = {
    "torch": [{"run_eagerly": True}, {"jit_compile": False}],
    "tensorflow": [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}],
    "jax": [{"run_eagerly": True}, {"jit_compile": True}],
}


@pytest.mark.parametrize("mode", MODES[BACKEND], ids=str)
def test_zeros_in_every_execution_mode(make_mlp, blobs, mode):
    check_held(make_mlp(keras.optimizers.Adam(0.01), **mode), *blobs)


def test_several_steps_in_one_execution(make_mlp, blobs):
    watch = Watch()
    # Keras allows only 1 on torch before 3.16: its own error is the reason.
    possible = several_steps_are_possible()
    model = make_mlp(keras.optimizers.Adam(0.01), steps_per_execution=4 if possible else 1)
    model.fit(*blobs, epochs=2, batch_size=8, verbose=0, callbacks=[magnitude(), watch])
    assert watch.regrown == 0
    assert watch.counts[-1] == zeros_in(model) == 120
    if not possible:
        with pytest.raises(ValueError, match="steps_per_execution"):
            make_mlp(steps_per_execution=4).fit(*blobs, verbose=0, callbacks=[magnitude()])


class EagerStep(keras.Model):
    """A train_step of one's own, in the style of each backend."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(16, activation="relu", name="hidden")
        self.out = keras.layers.Dense(3, name="out")

    def call(self, x):
        return self.out(self.hidden(x))

    def train_step(self, *args):
        return {"torch": self._torch, "tensorflow": self._tensorflow, "jax": self._jax}[BACKEND](*args)

    def _torch(self, data):
        x, y = data
        loss = self.compute_loss(y=y, y_pred=self(x))
        self.zero_grad()
        loss.backward()
        weights = self.trainable_weights
        import torch

        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in weights], weights)
        return {"loss": loss}

    def _tensorflow(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}

    def _jax(self, state, data):
        import jax

        x, y = data
        trainable, fixed, optimizer, metrics = state

        def loss_of(values):
            prediction, _ = self.stateless_call(values, fixed, x)
            return self.compute_loss(y=y, y_pred=prediction)

        loss, grads = jax.value_and_grad(loss_of)(trainable)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, grads, trainable)
        return {"loss": loss}, (trainable, fixed, optimizer, metrics)


def test_custom_train_step(blobs):
    model = EagerStep()
    model(blobs[0][:1])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    check_held(model, *blobs)


@pytest.mark.parametrize("make", [magnitude, kw.KeepZeros])
def test_what_something_else_writes_is_told_and_put_right(make_mlp, blobs, make):
    model, found = make_mlp(), []
    kw.prune(model, sparsity=0.5, method="magnitude", verbose=0)
    callback = make()

    class Writing(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                kernel = self.model.get_layer("hidden").kernel
                kernel.assign(ops.ones(kernel.shape))
                keep_edits(self.model)

        def on_epoch_end(self, epoch, logs=None):
            found.append(zeros_in(self.model, ["hidden"]))

    with pytest.warns(
        UserWarning, match=r"hidden/kernel were changed during this epoch by something other .* where another model or"
    ) as told:
        model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[callback, Writing()])
    assert len([w for w in told if "something other" in str(w.message)]) == 1
    # What is held differs from method to method, but not nothing.
    assert all(number > 0.2 * model.get_layer("hidden").kernel.shape[0] for number in found)
    assert len(found) == 2


def test_class_weight_and_batch_norm(blobs):
    model = keras.Sequential(
        [
            keras.layers.Input((12,)),
            keras.layers.Dense(16, name="hidden", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(3, name="out"),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    check_held(model, *blobs, class_weight={0: 1.0, 1: 2.0, 2: 0.5})


def test_loop_of_ones_own(make_mlp, blobs):
    x, y = blobs
    model, watch = make_mlp("adam"), Watch()
    callbacks = keras.callbacks.CallbackList([magnitude(), watch], model=model, epochs=2, steps=4)
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        for batch in range(4):
            callbacks.on_train_batch_begin(batch)
            model.train_on_batch(x[batch::4], y[batch::4])
            callbacks.on_train_batch_end(batch)
        callbacks.on_epoch_end(epoch, {})
    callbacks.on_train_end()
    assert watch.counts == [0, 0, 60, 60, 60, 60, 120, 120]
    assert watch.regrown == 0
    # Without epochs, KeepZeros still begins before the first step.
    keep = keras.callbacks.CallbackList([kw.KeepZeros()], model=model)
    keep.on_train_begin()
    keep.on_train_batch_begin(0)
    model.train_on_batch(x, y)
    assert zeros_in(model) == 120
    keep.on_train_end()
    model.train_on_batch(x, y)
    assert zeros_in(model) < 120


def test_second_fit_with_a_traced_optimizer(make_mlp, blobs):
    model = make_mlp(keras.optimizers.Adam(0.01))
    model.fit(*blobs, batch_size=24, verbose=0)
    check_held(model, *blobs)
    # The zeros that are there count from the first batch on.
    check_held(model, *blobs, first=False)
    watch = Watch()
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[kw.KeepZeros(), watch])
    assert watch.counts == [120] * 8
    assert watch.regrown == 0
    model.compile(keras.optimizers.SGD(0.05), model.loss)
    model.fit(*blobs, batch_size=24, verbose=0, callbacks=[kw.KeepZeros(exclude=["out/kernel"])])
    assert 0 < zeros_in(model) < 120
    model.fit(*blobs, batch_size=24, verbose=0)
    assert zeros_in(model) < 30


def test_users_constraint_holds_too_and_is_put_back(blobs):
    unit = keras.constraints.UnitNorm(axis=0)
    model = keras.Sequential(
        [
            keras.layers.Input((12,)),
            keras.layers.Dense(16, kernel_constraint=unit, activation="relu", name="hidden"),
            keras.layers.Dense(3, kernel_constraint="non_neg", name="out"),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    watch = Watch(["hidden"])
    seen = []

    def norms(batch, logs):
        kernel = ops.convert_to_numpy(model.get_layer("hidden").kernel)
        seen.append(np.linalg.norm(kernel, axis=0))

    spy = keras.callbacks.LambdaCallback(on_train_batch_end=norms)
    spy.on_train_batch_end = lambda batch, logs=None: (spy.model, norms(batch, logs))
    # The last update comes after the last step: its corrections respect the constraint, too.
    pruner = kw.WoodFisherPruning(
        0.5, end_epoch=1, data=blobs, num_grads=32, init_sparsity=0.2, verbose=0, global_sparsity=False
    )
    model.fit(*blobs, batch_size=24, verbose=0, callbacks=[pruner, watch, spy])
    assert watch.counts == [38, 38, 38, 96]
    np.testing.assert_allclose(seen, 1.0, rtol=1e-5)
    out = ops.convert_to_numpy(model.get_layer("out").kernel)
    assert out.min() == 0.0
    assert model.get_layer("hidden").kernel.constraint is unit
    assert isinstance(model.get_layer("out").kernel.constraint, keras.constraints.NonNeg)
    assert model.get_layer("hidden").kernel_constraint is unit


@pytest.mark.parametrize("name", ["adam", "multi", "accumulation", "scaled", "ftrl", "adagrad"])
def test_optimizer_state_of_pruned_weights_begins_anew(make_mlp, blobs, name):
    model = make_mlp(OPTIMIZERS[name]())
    checked = []

    class Slots(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch != 2:
                return
            model = self.model
            for layer in KERNELS:
                kernel = model.get_layer(layer).kernel
                zero = ops.convert_to_numpy(kernel) == 0
                slots = [(ops.convert_to_numpy(s), b) for s, b in slots_of(inner_optimizer(model.optimizer), kernel)]
                assert all((slot[zero] == np.float32(begin)).all() for slot, begin in slots)
                assert any((slot[~zero] != begin).any() for slot, begin in slots)
                # Ftrl's and Adagrad's accumulators begin with 0.1.
                assert {begin for _, begin in slots} == {"ftrl": {0.0, 0.1}, "adagrad": {0.1}}.get(name, {0.0})
                checked.append(len(slots))

    model.fit(*blobs, epochs=1, batch_size=24, verbose=0, callbacks=[magnitude(end=0.5), Slots()])
    # Adam: two moments; with AMSGrad, an average, or an accumulator one more.
    counts = {"multi": [1, 3], "ftrl": [2, 2], "adagrad": [1, 1]}
    assert checked == counts.get(name, [3, 3])


def test_ftrl_goes_on_where_an_input_is_always_zero(make_mlp, blobs):
    x, y = blobs
    x = x.copy()
    x[:, 0] = 0.0
    model = make_mlp(OPTIMIZERS["ftrl"]())
    pruner = magnitude(end=0.75, leave_enabled=False)
    model.fit(x, y, epochs=1, batch_size=24, verbose=0, callbacks=[pruner])
    assert all(np.isfinite(weights).all() for weights in model.get_weights())


def test_masks_of_other_variables_are_no_slots(blobs):
    # Rate, iterations and two masks: as many optimizer variables as weights, of the same shape.
    model = keras.Sequential(
        [keras.layers.Input((12,)), *[keras.layers.Dense(12, name=name) for name in KERNELS], keras.layers.Softmax()]
    )
    model.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy")
    model.get_layer("hidden").kernel.assign(np.full((12, 12), 0.1) - np.eye(12))
    watch = Watch()
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[magnitude(), watch])
    assert watch.counts == [0, 0, 72, 72, 72, 72, 144, 144]


class Stop(RuntimeError):
    pass


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            raise Stop


# On JAX, Keras itself can't train again with averages after an exception in `fit`.
@pytest.mark.parametrize("optimizer", ["adam", "momentum" if BACKEND == "jax" else "scaled"])
def test_broken_off_fit_leaves_nothing_wrong(make_mlp, blobs, optimizer):
    model = make_mlp(OPTIMIZERS[optimizer]())
    pruner = magnitude()
    with pytest.raises(Stop):
        model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[pruner, Interrupt()])
    assert zeros_in(model) == 60
    # A fit without the callback is a stock fit: nothing is held, and nothing is left in the optimizer.
    model.fit(*blobs, epochs=1, batch_size=24, verbose=0)
    assert not any("woodfisher" in v.name for v in model.optimizer.variables)
    assert zeros_in(model) < 20
    assert "fit" not in vars(model)
    # Broken off again, then with the same callback and with another one, and a new optimizer.
    with pytest.raises(Stop):
        model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[pruner, Interrupt()])
    model.compile(keras.optimizers.SGD(0.05), model.loss)
    watch = Watch()
    model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[pruner, watch])
    assert watch.counts[-1] == 120
    assert watch.regrown == 0
    assert all(not isinstance(v.constraint, MaskConstraint) for v in model.trainable_variables)


def test_failed_update_changes_nothing(make_mlp, blobs, monkeypatch):
    model = make_mlp("adam")
    pruner = kw.WoodFisherPruning(0.5, end_epoch=1.5, start_epoch=0.5, init_sparsity=0.25, num_grads=4, verbose=0)
    before = []

    def fail(*args, **kwargs):
        before.append(model.get_weights())
        raise Stop

    monkeypatch.setattr("keras_woodfisher.gradients.buffer.BufferedGradients.fill", fail)
    with pytest.raises(ValueError, match="num_grads=2 would fit"):
        model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[pruner])
    pruner = kw.WoodFisherPruning(0.5, end_epoch=1.5, start_epoch=0.5, init_sparsity=0.25, num_grads=2, verbose=0)
    with pytest.raises(Stop):
        model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[pruner])
    for now, then in zip(model.get_weights(), before[0], strict=True):
        np.testing.assert_array_equal(now, then)
    monkeypatch.undo()
    watch = Watch()
    model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[pruner, watch])
    assert watch.counts == [0, 0, 60, 60, 60, 60, 120, 120]
    assert not any("woodfisher" in v.name for v in model.optimizer.variables)
    assert "apply" not in vars(model.optimizer)


def test_two_callbacks(make_mlp, blobs):
    model = make_mlp(OPTIMIZERS["ema"]())
    with pytest.raises(ValueError, match=r"Two pruning callbacks of one `fit` prune '.*hidden/kernel' at the same"):
        late = kw.KeepZeros(["hidden/kernel"], start_epoch=1)
        model.fit(*blobs, verbose=0, epochs=2, callbacks=[late, magnitude()])
    # Disjoint ones share the optimizer: averages and buffers serve both.
    options = {"end_epoch": 1, "num_grads": 4, "verbose": 0, "init_sparsity": 0.2, "start_epoch": 1}
    watch = Watch()
    pruners = [kw.WoodFisherPruning(0.5, params=[f"{name}/kernel"], **options) for name in KERNELS]
    history = model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[*pruners, watch]).history
    assert watch.counts == [0] * 4 + [120] * 4
    assert history["sparsity"] == [0.0, 0.5]
    assert watch.regrown == 0
    assert [pruner.sparsity for pruner in pruners] == [0.5, 0.5]
    # Averages replaced the weights at the end, and were as sparse.
    assert zeros_in(model) == 120


@pytest.mark.parametrize(("method", "turned"), [("magnitude", True), ("woodfisher", False)])
def test_one_callback_goes_on_where_another_ends(make_mlp, blobs, method, turned):
    model = make_mlp(OPTIMIZERS["ema"]())
    data = None if method == "magnitude" else blobs
    settings = {"method": method, "data": data, "num_grads": 8, "verbose": 0}
    first = kw.WoodFisherPruning(0.25, init_sparsity=0.1, end_epoch=1, **settings)
    second = kw.WoodFisherPruning(0.5, init_sparsity="__FROM_PARAM__", start_epoch=1.5, end_epoch=2, **settings)
    third = kw.KeepZeros(start_epoch=2.5)
    pruners = [third, second, first] if turned else [first, second, third]
    watch = Watch()
    own, averages = [], []

    def look(epoch, logs):
        own.append(second.sparsity)
        for name in KERNELS:
            kernel = model.get_layer(name).kernel
            average = dict(
                zip(map(id, model.optimizer._trainable_variables), averages_of(model.optimizer), strict=True)
            )
            zero = ops.convert_to_numpy(kernel) == 0
            averages.append(np.abs(ops.convert_to_numpy(average[id(kernel)])[zero]).max(initial=0.0))

    watching = [watch, keras.callbacks.LambdaCallback(on_epoch_end=look)]
    history = model.fit(*blobs, batch_size=24, epochs=3, verbose=0, callbacks=[*pruners, *watching]).history
    assert history["sparsity"] == [0.1, 0.25, 0.5]
    # From its turn on, what the first one pruned counts as pruned by the second one too.
    assert own == [0.0, 0.25, 0.5]
    assert averages == [0.0] * 6
    assert watch.counts == [24] * 4 + [60] * 4 + [120] * 4
    assert watch.regrown == 0
    assert zeros_in(model) == 120
    assert all(getattr(layer, "kernel", None) is None or layer.kernel.constraint is None for layer in model.layers)
    assert not any("woodfisher" in v.name for v in model.optimizer.variables)


def test_zeros_are_held_for_a_while(make_mlp, blobs):
    model = make_mlp(OPTIMIZERS["adam"]())
    pruner = kw.WoodFisherPruning(
        0.5, start_epoch=0.5, end_epoch=0.5, method="magnitude", leave_enabled=False, verbose=0
    )
    hold, watch = kw.KeepZeros(start_epoch=0.5, end_epoch=1.5), Watch()
    model.fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[pruner, hold, watch])
    assert watch.counts[:6] == [0, 0, 120, 120, 120, 120]
    assert watch.counts[6] < 60
    with pytest.raises(ValueError, match="start_epoch=3 lies after the last epoch"):
        model.fit(*blobs, epochs=2, verbose=0, callbacks=[kw.KeepZeros(start_epoch=3)])


def test_weights_grow_again_where_the_masks_are_lifted(make_mlp, blobs):
    model, watch = make_mlp(keras.optimizers.Adam(0.01)), Watch()
    pruner = magnitude(leave_enabled=False, end=1.0)
    history = model.fit(*blobs, epochs=3, batch_size=24, verbose=0, callbacks=[pruner, watch]).history
    assert watch.counts[2:4] == [60, 60]
    assert max(watch.counts[4:]) < 20
    # The log tells what is there, not what once was.
    np.testing.assert_allclose(history["sparsity"], [0.25, zeros_in(model) / 240, zeros_in(model) / 240], atol=0.05)
    assert model.get_layer("hidden").kernel.constraint is None
    # Lifted at the very end, the zeros of the last update are still there.
    model = make_mlp(keras.optimizers.Adam(0.01))
    model.fit(*blobs, epochs=1, batch_size=24, verbose=0, callbacks=[magnitude(leave_enabled=False, end=1.0)])
    assert zeros_in(model) == 120


def test_model_can_be_copied_and_exported_amid_training(make_mlp, blobs, tmp_path):
    import copy
    import pickle

    model = make_mlp("adam")
    states = []

    class Copy(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            for twin in (copy.deepcopy(self.model), pickle.loads(pickle.dumps(self.model))):
                assert not any("woodfisher" in v.name for v in twin.optimizer.variables)
                assert len(twin.optimizer.variables) == 10
                assert zeros_in(twin) == zeros_in(self.model)
            states.append(self.model.get_state_tree())

    check_held(model, *blobs, callbacks=[Copy()])
    model.set_state_tree(states[0])
    if BACKEND == "tensorflow":
        model.export(tmp_path / "exported", verbose=False)


def thawing(start):
    return kw.TrainableParams(["hidden/kernel"], trainable=True, start_epoch=start)


def by_recipe(params):
    thaw = {"params": ["hidden/kernel"], "trainable": True, "start_epoch": 1.0}
    held = {"params": params, "start_epoch": 0.0}
    return kw.load_recipe({"modifiers": [{"ConstantPruningModifier": held}, {"TrainableParamsModifier": thaw}]})


@pytest.mark.parametrize(
    ("entry", "params"), [("callback", "__ALL_PRUNABLE__"), ("recipe", ["hidden/kernel", "out/kernel"])]
)
def test_zeros_of_what_is_thawed_amid_training_are_held(make_mlp, blobs, params, entry):
    model = make_mlp()
    kw.prune(model, sparsity=0.7, method="magnitude", global_sparsity=False, verbose=0)
    model.get_layer("hidden").trainable = False
    model.compile("adam", model.loss)
    before, zeros = ops.convert_to_numpy(model.get_layer("hidden").kernel), zeros_in(model)
    recipe = by_recipe(params)
    assert not kw.check_recipe(recipe, model, 8, 3, data=blobs, verbose=0).problems
    callbacks = [kw.KeepZeros(params), thawing(1)] if entry == "callback" else recipe.callbacks(model, blobs, verbose=0)
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(*blobs, epochs=3, callbacks=[*callbacks, watch], verbose=0)
    assert watch.regrown == 0 and zeros_in(model) == zeros
    assert (ops.convert_to_numpy(model.get_layer("hidden").kernel) != before).any()


def with_a_dead_branch(**sparse):
    """`sparse`: fractions of zeros of the other weights."""
    inputs = keras.Input((6,), dtype="int32")
    embedded = keras.layers.Embedding(50, 8, name="embed")(inputs)
    branch = keras.layers.Dense(8, name="branch", kernel_initializer="zeros")(embedded)
    flat = keras.layers.Flatten()(keras.layers.Add()([embedded, branch]))
    model = keras.Model(inputs, keras.layers.Dense(3, name="out")(flat))
    model.compile("adam", "sparse_categorical_crossentropy")
    for name, fraction in sparse.items():
        weight = model.get_layer(name).weights[0]
        values = ops.convert_to_numpy(weight)
        weight.assign(np.where(np.abs(values) < np.quantile(np.abs(values), fraction), 0.0, values))
    return model


@pytest.mark.parametrize(
    ("sparse", "params", "held", "message"),
    [
        ({"out": 0.5}, "__ALL_PRUNABLE__", True, "count as pruned, and stay zero"),
        ({"embed": 0.5}, "__ALL_PRUNABLE__", True, "count as pruned, and stay zero"),
        ({"embed": 0.02}, "__ALL_PRUNABLE__", False, "as not trained yet, and KeepZeros doesn't hold them"),
        ({}, "__ALL_PRUNABLE__", False, "All weights of branch/kernel are zero, and no other .* name them in `params`"),
        ({}, ["re:branch/.*"], False, "as not trained yet, and KeepZeros doesn't hold them"),
        ({}, ["branch/kernel"], True, "count as pruned, and stay zero"),
        ({}, "branch/kernel", True, "count as pruned, and stay zero"),
    ],
)
@pytest.mark.filterwarnings("ignore:KeepZeros doesn't hold the zeros of embed")
def test_a_variable_that_is_zero_as_a_whole_is_held_or_told_of(rng, sparse, params, held, message):
    model = with_a_dead_branch(**sparse)
    x, y = rng.integers(0, 50, (32, 6)), rng.integers(0, 3, 32)
    with pytest.warns(UserWarning, match=message):
        model.fit(x, y, callbacks=[kw.KeepZeros(params)], verbose=0)
    assert (not ops.convert_to_numpy(model.get_layer("branch").kernel).any()) == held
