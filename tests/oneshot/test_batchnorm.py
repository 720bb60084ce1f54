"""BatchNorm re-estimation against statistics that are worked out by hand in float64."""

import json
import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_woodfisher_backends.keras_internals import RELEASE

import keras_woodfisher as kw
from keras_woodfisher.oneshot import batchnorm
from keras_woodfisher.oneshot.batchnorm_statistics import Moments

EPSILON = 1e-3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


def statistics(model):
    return [ops.convert_to_numpy(v).copy() for n in norms(model) for v in (n.moving_mean, n.moving_variance)]


def everything(model):
    variables = [*model.variables, *(model.optimizer.variables if model.compiled else [])]
    return [ops.convert_to_numpy(v).copy() for v in variables]


def weights(model):
    return [ops.convert_to_numpy(v).copy() for v in model.weights]


def assert_same(found, right):
    for one, other in zip(found, right, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_statistics(layer, seen):
    """That a layer has the statistics of what it gets, (positions, channels) float64."""
    np.testing.assert_allclose(ops.convert_to_numpy(layer.moving_mean), seen.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(layer.moving_variance), seen.var(0), rtol=2e-5, atol=1e-6)


def scramble(model, rng):
    """Trained-looking values for all variables: no statistic is right by chance."""
    for variable in model.variables:
        if "float" in variable.dtype:
            values = rng.normal(size=variable.shape)
            variable.assign(np.abs(values) + 0.5 if "variance" in variable.name else values)


def normalised(layer, seen):
    gamma, beta = (ops.convert_to_numpy(v).astype(float) for v in (layer.gamma, layer.beta))
    return gamma * (seen - seen.mean(0)) / np.sqrt(seen.var(0) + EPSILON) + beta


def dense(layer, x):
    return x @ ops.convert_to_numpy(layer.kernel).astype(float) + ops.convert_to_numpy(layer.bias).astype(float)


# Four ways to write one net: Dense, BatchNorm, ReLU, Dense, BatchNorm, Dense.


def parts():
    return [
        layers.Dense(6, name="one"),
        layers.BatchNormalization(name="norm_one"),
        layers.ReLU(),
        layers.Dense(5, name="two"),
        layers.BatchNormalization(name="norm_two"),
        layers.Dense(3, name="out"),
    ]


def sequential():
    return keras.Sequential([layers.Input((12,)), *parts()])


def functional():
    inputs = x = layers.Input((12,))
    for part in parts():
        x = part(x)
    return keras.Model(inputs, x)


def nested():
    inner = keras.Sequential([layers.Input((12,)), *parts()[:3]])
    inputs = layers.Input((12,))
    return keras.Model(inputs, keras.Sequential(parts()[3:])(inner(inputs)))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        # Not in the order of the calls.
        self.late = parts()[3:]
        self.early = parts()[:3]

    def call(self, x):
        for part in [*self.early, *self.late]:
            x = part(x)
        return x


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 12), "float32"))
    return model


def named(model, name):
    return next(layer for layer in model._flatten_layers() if layer.name == name)


def assert_all_statistics(model, x):
    first = dense(named(model, "one"), x.astype(float))
    assert_statistics(named(model, "norm_one"), first)
    # The second layer gets what the first one makes with its new statistics.
    second = dense(named(model, "two"), np.maximum(normalised(named(model, "norm_one"), first), 0.0))
    assert_statistics(named(model, "norm_two"), second)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("make", [sequential, functional, nested, subclassed])
def test_statistics_are_those_of_the_definition(blobs, rng, make, compiled):
    model = make()
    scramble(model, rng)
    if compiled:
        model.compile("adam", LOSS)
    others = [v for v in model.variables if "moving" not in v.name]
    before = [ops.convert_to_numpy(v).copy() for v in others]
    report = kw.reestimate_batchnorm(model, blobs, verbose=0)
    assert_all_statistics(model, blobs[0])
    assert_same([ops.convert_to_numpy(v) for v in others], before)
    assert report.layers == tuple(named(model, name).path for name in ("norm_one", "norm_two"))
    assert (report.examples, report.left_alone, report.dense_loss, report.dense_keeps_accuracy) == (96, (), None, None)
    assert model.compiled == compiled


@pytest.mark.parametrize("axis", [-1, 1])
def test_statistics_of_images(rng, axis):
    inputs = layers.Input((6, 5, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.BatchNormalization(axis, name="norm")(x))))
    scramble(model, rng)
    images = rng.normal(2.0, 3.0, (7, 6, 5, 3)).astype("float32")
    kw.reestimate_batchnorm(model, images, verbose=0)
    windows = np.lib.stride_tricks.sliding_window_view(images.astype(float), (3, 3), axis=(1, 2))
    kernel, bias = (ops.convert_to_numpy(v).astype(float) for v in model.get_layer("conv").weights)
    seen = np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias
    assert_statistics(model.get_layer("norm"), np.moveaxis(seen, axis, -1).reshape(-1, seen.shape[axis]))


def test_the_size_of_batches_has_no_influence(blobs, rng):
    model = sequential()
    scramble(model, rng)
    before, found = statistics(model), []
    for size in (96, 64, 7, 1):
        for variable, values in zip([v for n in norms(model) for v in n.non_trainable_variables], before, strict=True):
            variable.assign(values)
        kw.reestimate_batchnorm(model, blobs, batch_size=size, verbose=0)
        found.append(statistics(model))
    for other in found[1:]:
        for one, right in zip(other, found[0], strict=True):
            np.testing.assert_allclose(one, right, rtol=1e-5, atol=1e-6)


def test_moments_do_not_cancel(rng):
    values = 1e6 + rng.normal(size=(50, 8, 3))
    moments = Moments(3)
    for part in np.split(values, [1, 20]):
        moments.add(np.full((len(part), 3), 8.0), part.mean(1), part.var(1))
    flat = values.reshape(-1, 3)
    np.testing.assert_allclose(moments.mean, flat.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.variance, flat.var(0), rtol=1e-8)


@pytest.mark.parametrize("how", ["masking", "argument"])
def test_masked_positions_do_not_count(rng, how):
    series = rng.normal(1.0, 2.0, (9, 5, 4)).astype("float32")
    mask = rng.random((9, 5)) < 0.6
    mask[0], mask[1] = True, False
    series[~mask] = 0.0 if how == "masking" else 1e30
    x = inputs = layers.Input((5, 4))
    masks = layers.Input((5,), dtype="bool")
    norm = layers.BatchNormalization(name="norm")
    x = norm(layers.Masking()(inputs)) if how == "masking" else norm(inputs, mask=masks)
    outputs = layers.Dense(2)(layers.GlobalAveragePooling1D()(x, mask=None))
    model = keras.Model(inputs if how == "masking" else [inputs, masks], outputs)
    data = series if how == "masking" else ([series, mask],)
    for size in (9, 2):
        scramble(model, rng)
        kw.reestimate_batchnorm(model, data, batch_size=size, verbose=0)
        assert_statistics(norm, series[mask].astype(float))


def test_a_mask_without_positions_is_an_error(rng):
    model = keras.Sequential([layers.Input((5, 4)), layers.Masking(), layers.BatchNormalization()])
    scramble(model, rng)
    before = statistics(model)
    with pytest.raises(ValueError, match=r"What the BatchNorm layer '.*' gets on this data is masked everywhere"):
        kw.reestimate_batchnorm(model, np.zeros((3, 5, 4), "float32"), verbose=0)
    assert_same(statistics(model), before)


def test_a_layer_that_is_called_twice_gets_the_statistics_of_both_calls(rng):
    inputs = [layers.Input((4,)), layers.Input((4,))]
    shared, last = layers.BatchNormalization(), layers.BatchNormalization()
    outputs = last(layers.concatenate([shared(inputs[0]), shared(inputs[1])]))
    model = keras.Model(inputs, outputs)
    scramble(model, rng)
    x = [rng.normal(size=(20, 4)).astype("float32"), rng.normal(5.0, 2.0, (20, 4)).astype("float32")]
    report = kw.reestimate_batchnorm(model, (x,), batch_size=8, verbose=0)
    assert len(report.layers) == 2
    seen = np.concatenate(x).astype(float)
    assert_statistics(shared, seen)
    halves = np.split(normalised(shared, seen), 2)
    assert_statistics(last, np.concatenate(halves, axis=1))


class TwoHeads(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm, self.unused = layers.BatchNormalization(name="used"), layers.BatchNormalization(name="unused")
        self.frozen = layers.BatchNormalization(name="frozen", trainable=False)
        self.unused.build((None, 12))
        self.out = layers.Dense(3)

    def call(self, x, training=None):
        return self.out(self.frozen(self.norm(x, training=training), training=training))


def test_frozen_and_unused_layers_are_left_alone(blobs, rng):
    model = TwoHeads()
    model(blobs[0])
    scramble(model, rng)
    before = [ops.convert_to_numpy(v).copy() for n in (model.unused, model.frozen) for v in n.variables]
    report = kw.reestimate_batchnorm(model, blobs, verbose=0)
    assert_statistics(model.norm, blobs[0].astype(float))
    assert_same([ops.convert_to_numpy(v) for n in (model.unused, model.frozen) for v in n.variables], before)
    assert report.layers == (model.norm.path,)
    assert set(report.left_alone) == {model.unused.path, model.frozen.path}
    assert "left alone (frozen or not called): " in str(report)


@pytest.mark.skipif(RELEASE < (3, 14), reason="Keras has no batch renormalisation before 3.14")
def test_batch_renormalisation_trains_on_from_the_new_statistics(blobs, rng):
    model = keras.Sequential([layers.Input((12,)), layers.BatchNormalization(renorm=True), layers.Dense(3)])
    scramble(model, rng)
    kw.reestimate_batchnorm(model, blobs, verbose=0)
    norm, x = model.layers[0], blobs[0].astype(float)
    assert_statistics(norm, x)
    deviation = np.sqrt(x.var(0) + EPSILON)
    for variable, right in (
        (norm.renorm_mean, x.mean(0)),
        (norm.renorm_stddev, deviation),
        (norm.moving_stddev, deviation),
    ):
        np.testing.assert_allclose(ops.convert_to_numpy(variable), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_policy_of_mixed_precision_stays(blobs, rng, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = sequential()
    finally:
        keras.config.set_dtype_policy("float32")
    scramble(model, rng)
    kw.reestimate_batchnorm(model, blobs, verbose=0)
    first = dense(named(model, "one"), blobs[0].astype(float))
    found = ops.convert_to_numpy(named(model, "norm_one").moving_variance)
    assert found.dtype == np.float32
    # So much the layer before it rounds.
    np.testing.assert_allclose(found, first.var(0), rtol=1e-3 if policy == "mixed_float16" else 1e-2)
    assert named(model, "norm_one").compute_dtype == policy.removeprefix("mixed_")


class Noisy(layers.Layer):
    """Its random state and its counter change in each call, training or not."""

    def __init__(self):
        super().__init__()
        self.generator = keras.random.SeedGenerator(3)
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False, name="seen")

    def call(self, x):
        self.seen.assign_add(1.0)
        self.add_loss(ops.mean(x))
        return x + 0.0 * keras.random.normal(ops.shape(x), seed=self.generator)


def test_nothing_is_left_behind(blobs, rng):
    model = keras.Sequential([layers.Input((12,)), Noisy(), *parts()[:3], layers.Dropout(0.5), layers.Dense(3)])
    scramble(model, rng)
    model.compile("adam", LOSS, metrics=["accuracy"])
    model.fit(*blobs, epochs=1, verbose=0)
    untouched = [v for v in model.variables if "moving" not in v.name]
    untouched += [*model.optimizer.variables, *model.metrics_variables, model.layers[0].generator.state]
    before = [ops.convert_to_numpy(v).copy() for v in untouched]
    attributes = {id(layer): set(vars(layer)) for layer in model._flatten_layers()}
    phases = [layer.trainable for layer in model._flatten_layers()]
    kw.reestimate_batchnorm(model, blobs, dense=model, verbose=0)
    assert_same([ops.convert_to_numpy(v) for v in untouched], before)
    assert {id(layer): set(vars(layer)) for layer in model._flatten_layers()} == attributes
    assert [layer.trainable for layer in model._flatten_layers()] == phases
    # Training goes on: moving statistics follow their momentum again.
    after = statistics(model)
    model.fit(*blobs, epochs=1, verbose=0)
    assert all((one != other).any() for one, other in zip(statistics(model), after, strict=True))


def test_a_call_of_the_users_own_stays(blobs):
    model = sequential()
    norm = named(model, "norm_one")
    calls, original = [], norm.call

    def call(inputs, training=None, mask=None):
        calls.append(1)
        return original(inputs, training=training, mask=mask)

    vars(norm)["call"] = call
    kw.reestimate_batchnorm(model, blobs, verbose=0)
    assert vars(norm)["call"] is call and calls


def broken(rng):
    """The second layer gets what isn't finite."""
    model = sequential()
    scramble(model, rng)
    named(model, "two").kernel.assign(np.full((6, 5), 3e38))
    return model


def test_a_failure_leaves_all_statistics_as_they_were(blobs, rng, monkeypatch):
    model = broken(rng)
    before = statistics(model)
    with pytest.raises(ValueError, match=r"'.*norm_two' gets on this data isn't finite; nothing was changed"):
        kw.reestimate_batchnorm(model, blobs, verbose=0)
    assert_same(statistics(model), before)

    model = sequential()
    scramble(model, rng)
    before, work = statistics(model), batchnorm.measure

    def interrupted(model, layer, calls, batches):
        work(model, layer, calls, batches)
        if layer.name == "norm_two":
            raise KeyboardInterrupt

    monkeypatch.setattr(batchnorm, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kw.reestimate_batchnorm(model, blobs, verbose=0)
    assert_same(statistics(model), before)
    assert all("call" not in vars(layer) for layer in norms(model))


def test_an_error_of_the_model_leaves_no_hook(blobs):
    model = sequential()
    with pytest.raises(ValueError):
        kw.reestimate_batchnorm(model, np.zeros((4, 5), "float32"), verbose=0)
    assert all("call" not in vars(layer) for layer in norms(model))


def test_data_that_changes_is_read_once(blobs, rng):
    model = sequential()
    scramble(model, rng)
    reads = []

    def augmenting():
        reads.append(1)
        noise = np.random.default_rng(len(reads)).normal(size=blobs[0].shape)
        x = (blobs[0] + noise).astype("float32")
        yield from ((x[start : start + 20], blobs[1][start : start + 20]) for start in range(0, 96, 20))

    assert kw.reestimate_batchnorm(model, augmenting, num_examples=50, dense=model, loss=LOSS, verbose=0).examples == 50
    assert len(reads) == 1
    x = (blobs[0] + np.random.default_rng(1).normal(size=blobs[0].shape)).astype("float32")
    assert_all_statistics(model, x[:50])


def test_examples_are_drawn_with_the_seed(blobs, rng):
    model = sequential()
    scramble(model, rng)
    for seed in (3, 4):
        assert kw.reestimate_batchnorm(model, blobs[0], num_examples=30, seed=seed, verbose=0).examples == 30
        assert_all_statistics(model, blobs[0][np.random.default_rng(seed).permutation(96)[:30]])
    assert kw.reestimate_batchnorm(model, blobs[0], num_examples=None, verbose=0).examples == 96


def fitted(blobs):
    """A net, and the examples that it gets right: plain ones, and augmented ones, whose statistics it has."""
    model = sequential()
    scramble(model, np.random.default_rng(1))
    model.compile("adam", LOSS)
    plain = blobs[0]
    augmented = (plain * np.linspace(-1.0, 4.0, 12) + 3.0).astype("float32")
    kw.reestimate_batchnorm(model, augmented, verbose=0)
    return model, *((x, ops.convert_to_numpy(model(x)).argmax(1).astype("int32")) for x in (plain, augmented))


def test_the_dense_model_tells_whether_augmentation_is_missing(blobs):
    model, plain, augmented = fitted(blobs)
    pruned = sequential()
    pruned.set_weights(model.get_weights())
    before = weights(model)
    with pytest.warns(UserWarning, match=r"dense model's loss on this data grows from .* augmentation missing\?"):
        report = kw.reestimate_batchnorm(pruned, plain, dense=model, verbose=0)
    own, measured = report.dense_loss
    assert report.dense_keeps_accuracy is False and "this data doesn't suit the model" in str(report)
    assert_same(weights(model), before)
    # What was measured are losses of this model.
    assert own == pytest.approx(model.evaluate(*plain, verbose=0), rel=1e-4)
    assert measured == pytest.approx(float(LOSS(plain[1], pruned(plain[0], training=False))), rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = kw.reestimate_batchnorm(pruned, augmented, dense=model, verbose=0)
    assert report.dense_keeps_accuracy is True
    assert report.dense_loss[0] == pytest.approx(report.dense_loss[1], rel=1e-3)
    assert_same(weights(model), before)


@pytest.mark.parametrize(
    "own, measured, keeps",
    [(0.4, 0.49, True), (0.4, 0.51, False), (0.0, 0.0009, True), (0.0, 0.0011, False), (0.4, float("nan"), False)],
)
def test_when_a_dense_model_keeps_its_accuracy(own, measured, keeps):
    assert kw.BatchNormReport(("a",), (), 10, (own, measured)).dense_keeps_accuracy is keeps


def frozen():
    model = sequential()
    model.trainable = False
    return model


class Forgetful(TwoHeads):
    """Calls none of its BatchNorm layers."""

    def __init__(self):
        super().__init__()
        for layer in (self.norm, self.frozen):
            layer.build((None, 12))

    def call(self, x, training=None):
        return self.out(x)


def forgetful():
    model = Forgetful()
    model(np.zeros((1, 12), "float32"))
    return model


def compiled():
    model = sequential()
    model.compile("sgd", LOSS)
    return model


@pytest.mark.parametrize(
    "error, message, make, kwargs",
    [
        (
            ValueError,
            "has no BatchNormalization layer",
            lambda: keras.Sequential([layers.Input((12,)), parts()[0]]),
            {},
        ),
        (ValueError, "isn't built yet. Call it on a batch", lambda: keras.Sequential(parts()), {}),
        (ValueError, "All 2 BatchNormalization layers of .* are frozen.*trainable = True", frozen, {}),
        (ValueError, "calls none of its 2 BatchNorm layers that aren't frozen", forgetful, {}),
        (ValueError, "data holds no example", sequential, {"data": lambda: iter([])}),
        (TypeError, r"can be read only once.*data=lambda", sequential, {"data": iter([])}),
        (ValueError, "num_examples must be at least 1, got 0. None means all", sequential, {"num_examples": 0}),
        (ValueError, "batch_size must be at least 1", sequential, {"batch_size": 0}),
        (ValueError, "verbose must be one of", sequential, {"verbose": 3}),
        (ValueError, "isn't compiled with a loss, so whether this data suits", sequential, {"dense": sequential}),
        (ValueError, "loss of the first examples in data can't be computed", compiled, {"dense": True, "data": "x"}),
    ],
)
def test_errors_come_before_anything_is_changed(blobs, error, message, make, kwargs):
    model = make()
    before = everything(model)
    kwargs = {"data": blobs, "verbose": 0} | kwargs
    if kwargs["data"] == "x":
        kwargs["data"] = blobs[0]
    if "dense" in kwargs:
        kwargs["dense"] = model if kwargs["dense"] is True else kwargs["dense"]()
    with pytest.raises(error, match=message):
        kw.reestimate_batchnorm(model, **kwargs)
    assert_same(everything(model), before)


def test_progress_is_shown(blobs, capsys):
    model = sequential()
    kw.reestimate_batchnorm(model, blobs, verbose=1)
    shown = capsys.readouterr().out
    assert "BatchNorm re-estimation" in shown and "2/2" in shown
    print(kw.reestimate_batchnorm(model, blobs, verbose=0))
    assert capsys.readouterr().out == "BatchNorm: statistics of 2 layers measured on 96 examples\n"


# Pruning with re-estimation.


@pytest.mark.parametrize("method", ["woodfisher", "magnitude"])
def test_prune_re_estimates_after_pruning(blobs, method):
    model, _, data = fitted(blobs)
    twin = sequential()
    twin.set_weights(model.get_weights())
    kw.prune(twin, data, 0.7, quality="fast", num_grads=32, loss=LOSS, method=method, verbose=0)
    pruned = kw.reestimate_batchnorm(twin, data, dense=model, verbose=0)
    how = {"quality": "fast", "num_grads": 32, "method": method, "verbose": 0}
    report = kw.prune(model, data, 0.7, reestimate_batchnorm=True, **how)
    assert_same(weights(model), weights(twin))
    assert report.batchnorm.dense_loss == pruned.dense_loss
    assert len(report.batchnorm.layers) == 2
    assert report.phases[-1].name == "batchnorm"
    assert str(report.batchnorm) in str(report)
    assert json.loads(json.dumps(report.as_dict()))["batchnorm"]["examples"] == 96
    # Without the wish statistics stay.
    model, _, data = fitted(blobs)
    before = statistics(model)
    assert kw.prune(model, data, 0.7, quality="fast", num_grads=32, method=method, verbose=0).batchnorm is None
    assert_same(statistics(model), before)


def test_prune_re_estimates_on_other_examples(blobs):
    model, plain, augmented = fitted(blobs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = kw.prune(model, plain, 0.5, quality="fast", num_grads=16, reestimate_batchnorm=augmented, verbose=0)
    assert report.batchnorm.dense_keeps_accuracy
    assert_all_statistics(model, augmented[0])
    with pytest.warns(UserWarning, match=r"augmentation missing\?"):
        kw.prune(model, plain, 0.6, quality="fast", num_grads=16, reestimate_batchnorm=True, verbose=0)
    assert_all_statistics(model, plain[0])
    # Magnitude pruning needs no other data.
    kw.prune(model, None, 0.8, method="magnitude", reestimate_batchnorm=augmented, verbose=0)
    assert_all_statistics(model, augmented[0])


def test_a_failure_after_pruning_brings_the_weights_back(blobs, monkeypatch):
    model, _, data = fitted(blobs)
    before, calls = everything(model), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:  # two layers of the dense model, then the pruned one's second
            assert kw.sparsity_report(model).sparsity == pytest.approx(0.7, abs=0.01)
            raise RuntimeError("the disk is full")

    monkeypatch.setattr(batchnorm, "measure", failing)
    with pytest.raises(RuntimeError, match="the disk is full"):
        kw.prune(model, data, 0.7, quality="fast", num_grads=16, reestimate_batchnorm=True, verbose=0)
    assert_same(everything(model), before)


@pytest.mark.parametrize(
    "error, message, make, kwargs",
    [
        (ValueError, "has no BatchNormalization layer", None, {}),
        (ValueError, "reestimate_batchnorm=True needs data", sequential, {"data": None, "method": "magnitude"}),
        (TypeError, "reestimate_batchnorm must be True, False, or training examples, got 1", sequential, {"wish": 1}),
        (TypeError, "must be True, False, or training examples, got None", sequential, {"wish": None}),
        (ValueError, "whether this data suits", sequential, {"method": "magnitude", "loss": None}),
    ],
)
def test_wrong_wishes_of_prune_change_nothing(blobs, make_mlp, error, message, make, kwargs):
    model = make_mlp(compile=False) if make is None else make()
    before = everything(model)
    kwargs = {"data": blobs, "loss": LOSS, "wish": True, "quality": "fast", "num_grads": 8} | kwargs
    with pytest.raises(error, match=message):
        kw.prune(model, sparsity=0.5, reestimate_batchnorm=kwargs.pop("wish"), verbose=0, **kwargs)
    assert_same(everything(model), before)


@pytest.mark.once
def test_keras_on_numpy_can_do_it_too():
    code = (
        "import keras, numpy as np, keras_woodfisher as kw\n"
        "from keras import layers\n"
        "model = keras.Sequential([layers.Input((4,)), layers.BatchNormalization(), layers.Dense(2)])\n"
        "x = np.random.default_rng(0).normal(3, 2, (50, 4)).astype('float32')\n"
        "kw.reestimate_batchnorm(model, x, batch_size=16, verbose=0)\n"
        "np.testing.assert_allclose(model.layers[0].moving_mean, x.mean(0), rtol=1e-5)\n"
        "np.testing.assert_allclose(model.layers[0].moving_variance, x.var(0), rtol=1e-5)\n"
    )
    env = os.environ | {"KERAS_BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
