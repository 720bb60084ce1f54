"""`prune(method="reconstruct")`: layers, models and data of every kind, beside magnitude and dense definitions."""

import json
from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_woodfisher as kw
from keras_woodfisher.model.targets import find_targets
from keras_woodfisher.oneshot.reconstruction import pruning
from keras_woodfisher.oneshot.reconstruction.allocation import Allocation
from keras_woodfisher.oneshot.reconstruction.apart import _begin_alike
from keras_woodfisher.oneshot.reconstruction.footprint import TOGETHER
from keras_woodfisher.oneshot.reconstruction.held_out import HeldOutOutputs
from keras_woodfisher.oneshot.reconstruction.refinement import Refinement
from keras_woodfisher.oneshot.reconstruction.walk import Walk
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner

RNG = np.random.default_rng(0)


def residual_cnn():
    inputs = layers.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    y = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(x))
    x = layers.ReLU()(layers.Add()([y, x]))
    x = layers.Conv2D(8, 3, strides=2, groups=2, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def mobile_cnn():
    return keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(8, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(6.0),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.ReLU(6.0),
            layers.SeparableConv2D(8, 3, padding="same", activation="relu"),
            layers.Conv2DTranspose(4, 3, strides=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, "softmax"),
        ]
    )


def transformer():
    inputs = layers.Input((6,), dtype="int32")
    x = layers.Embedding(20, 16, mask_zero=True)(inputs)
    x = x + layers.MultiHeadAttention(2, 8)(x, x)
    x = x + layers.Dense(16)(layers.Dense(32, "gelu")(layers.LayerNormalization()(x)))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def recurrent(layer):
    def make():
        inputs = layers.Input((7, 5))
        return keras.Model(inputs, layers.Dense(3)(layer()(inputs)))

    return make


def encoder_decoder():
    inputs = layers.Input((7, 5))
    _, *state = layers.LSTM(12, return_state=True)(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.LSTM(12)(inputs, initial_state=state)))


class Shared(keras.Model):
    """One layer is called twice, another one in between."""

    def __init__(self):
        super().__init__()
        self.twice = layers.Dense(12, "relu")
        self.between = layers.Dense(12, "tanh")
        self.head = keras.Sequential([layers.Dense(8, "relu"), layers.Dense(3)])

    def call(self, x):
        return self.head(self.twice(self.between(self.twice(x))))


def shared():
    model = Shared()
    model(np.zeros((1, 12), "float32"))
    return model


IMAGES = RNG.normal(size=(120, 8, 8, 3)).astype("float32")
TOKENS = np.where(np.arange(6) < RNG.integers(2, 7, (120, 1)), RNG.integers(1, 20, (120, 6)), 0).astype("int32")
SEQUENCES = RNG.normal(size=(120, 7, 5)).astype("float32")
POINTS = RNG.normal(size=(120, 12)).astype("float32")

MODELS = {
    "residual": (residual_cnn, IMAGES),
    "mobile": (mobile_cnn, IMAGES),
    "transformer": (transformer, TOKENS),
    "lstm": (recurrent(lambda: layers.LSTM(16)), SEQUENCES),
    "gru": (recurrent(lambda: layers.GRU(16)), SEQUENCES),
    "simple": (recurrent(lambda: layers.SimpleRNN(16, go_backwards=True)), SEQUENCES),
    "bidirectional": (recurrent(lambda: layers.Bidirectional(layers.LSTM(8))), SEQUENCES),
    "encoder and decoder": (encoder_decoder, SEQUENCES),
    "shared": (shared, POINTS),
}


def targets_of(model):
    return {v.path: ops.convert_to_numpy(v) for v in model.trainable_variables if "kernel" in v.name}


def distance(model, dense, x):
    output = ops.convert_to_numpy(model(ops.convert_to_tensor(x), training=False))
    return float(np.square(output - dense).sum())


def dense_output(model, x):
    return ops.convert_to_numpy(model(ops.convert_to_tensor(x), training=False))


@pytest.mark.parametrize("kind", MODELS)
def test_the_output_is_nearer_to_the_dense_one_than_that_of_magnitude(kind):
    make, x = MODELS[kind]
    model = make()
    weights, dense = model.get_weights(), dense_output(model, x)
    kw.prune(model, sparsity=0.6, method="magnitude", verbose=0)
    magnitude = distance(model, dense, x)
    model.set_weights(weights)
    report = kw.prune(model, x, 0.6, verbose=0)
    assert distance(model, dense, x) < 0.95 * magnitude
    kernels = targets_of(model)
    total = sum(kernel.size for kernel in kernels.values())
    assert report.pruned == sum((kernel == 0).sum() for kernel in kernels.values()) == int(np.floor(0.6 * total + 0.5))
    names = {name for layer in report.reconstruction.layers for name in layer.name.split(", ")}
    assert names == set(kernels)
    for layer in report.reconstruction.layers:
        assert not layer.note and layer.rows > 0 and 0.0 <= layer.error < 1.0
    assert report.reconstruction.examples + report.reconstruction.held_out == 120
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    json.dumps(report.as_dict())
    assert "distance of the outputs" in str(report)
    # All but the kernels is as before.
    for variable, before in zip(model.weights, weights, strict=True):
        if variable.path not in kernels:
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), before)


@pytest.mark.parametrize("mask", ["2:4", "block4", [2, 2], "filter", "channel"])
def test_masks_of_every_type(mask):
    model = residual_cnn()
    weights, dense = model.get_weights(), dense_output(model, IMAGES)
    sparsity = 0.3 if mask in ("filter", "channel") else 0.5
    kw.prune(model, sparsity=sparsity, method="magnitude", mask_type=mask, verbose=0)
    magnitude, zeros = distance(model, dense, IMAGES), kw.sparsity_report(model).pruned
    model.set_weights(weights)
    report = kw.prune(model, IMAGES, sparsity, mask_type=mask, verbose=0)
    assert report.settings["mask_type"] == str(mask)
    assert distance(model, dense, IMAGES) < magnitude
    assert report.pruned == zeros or mask in ("filter", "channel")
    if mask == "2:4":
        kernel = ops.convert_to_numpy(model.layers[1].kernel).reshape(-1, 8)
        assert ((kernel[:24].reshape(6, 4, 8) == 0).sum(1) == 2).all()


def test_each_variable_to_a_sparsity_of_its_own():
    model = shared()
    report = kw.prune(model, POINTS, {0.8: ["re:.*dense_1/kernel"], 0.25: ["re:.*kernel"]}, verbose=0)
    assert sorted({round(variable.sparsity, 2) for variable in report.variables}) == [0.25, 0.8]
    assert report.reconstruction.allocation == "magnitude"


def test_nothing_is_changed_where_nothing_is_pruned():
    model = residual_cnn()
    before = model.get_weights()
    report = kw.prune(model, IMAGES, 0.0, verbose=0)
    assert report.reconstruction is None and "nothing was left to prune" in str(report)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_kernels_that_are_sparse_are_found():
    """What is zero but for noise goes, and the rest takes up what the noise did."""
    model = keras.Sequential([layers.Input((12,)), layers.Dense(10, "relu"), layers.Dense(4)])
    true, noisy = [], []
    for layer in model.layers:
        kernel = RNG.choice([-1.0, 1.0], layer.kernel.shape) * RNG.uniform(0.5, 1.0, layer.kernel.shape)
        sparse = np.where(RNG.random(kernel.shape) < 0.5, kernel, 0.0)
        true.append(sparse)
        noisy.append(np.where(sparse, sparse, 1e-4 * kernel))
        layer.kernel.assign(noisy[-1])
    zeros = sum((kernel == 0).sum() for kernel in true) / sum(kernel.size for kernel in true)
    kw.prune(model, POINTS, float(zeros), global_sparsity=True, verbose=0)
    found = targets_of(model)
    if sum(((a == 0) != (b == 0)).sum() for a, b in zip(true, found.values(), strict=True)):
        # The zeros are divided otherwise: each layer to its own sparsity then.
        for layer, kernel in zip(model.layers, noisy, strict=True):
            layer.kernel.assign(kernel)
        levels = {float((k == 0).mean()): [n] for k, n in zip(true, found, strict=True)}
        kw.prune(model, POINTS, levels, verbose=0)
    for kernel, now in zip(true, targets_of(model).values(), strict=True):
        np.testing.assert_array_equal(now == 0, kernel == 0)
        np.testing.assert_allclose(now, kernel, atol=5e-3)


def test_what_is_zero_stays_zero():
    model = shared()
    kw.prune(model, sparsity=0.3, method="magnitude", verbose=0)
    zero = {name: kernel == 0 for name, kernel in targets_of(model).items()}
    report = kw.prune(model, POINTS, 0.6, verbose=0)
    assert report.sparsity == pytest.approx(0.6, abs=1e-2)
    for name, kernel in targets_of(model).items():
        assert (kernel[zero[name]] == 0).all()


def test_examples_a_part_at_a_time_give_nearly_the_same():
    model = residual_cnn()
    weights, dense, found = model.get_weights(), dense_output(model, IMAGES), []
    for limit in (None, "7 MiB"):
        model.set_weights(weights)
        report = kw.prune(model, IMAGES, 0.5, memory_limit=limit, verbose=0)
        found.append(distance(model, dense, IMAGES))
        assert report.reconstruction.examples == 109
    assert found[1] == pytest.approx(found[0], rel=0.5)
    with pytest.raises(MemoryError, match=r"needs at least .* but 0\.0 MiB may be used \(memory_limit\)"):
        kw.prune(model, IMAGES, 0.5, memory_limit=2000, verbose=0)


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="has channels_first on GPUs only")
def test_channels_may_come_first():
    """Convolutions of every kind, with a shortcut and a bias: the same kernels as with channels last."""
    found = []
    for order in ("channels_last", "channels_first"):
        keras.utils.set_random_seed(0)
        first = order == "channels_first"
        conv = {"padding": "same", "data_format": order, "bias_initializer": "ones"}
        inputs = layers.Input((3, 8, 8) if first else (8, 8, 3))
        x = layers.Conv2D(6, 3, activation="relu", **conv)(inputs)
        x = layers.Conv2D(5, 3, strides=2, **conv)(x)
        branch = layers.Conv2D(5, 1, **conv)(layers.DepthwiseConv2D(3, **conv)(x))
        x = layers.Add()([x, layers.BatchNormalization(axis=1 if first else -1, gamma_initializer="he_normal")(branch)])
        x = layers.SeparableConv2D(4, 3, **conv)(x)
        x = layers.Conv2DTranspose(4, 3, strides=2, **conv)(x)
        outputs = layers.Dense(4)(layers.GlobalAveragePooling2D(data_format=order)(x))
        model = keras.Model(inputs, outputs)
        images = RNG.normal(size=(96, 8, 8, 3)).astype("float32") if not found else found[0][1]
        data = images.transpose(0, 3, 1, 2) if first else images
        report = kw.prune(model, data, 0.6, method="reconstruct", seed=0, verbose=0)
        assert not any(layer.note for layer in report.reconstruction.layers)
        found.append((model, images))
    for one, other in zip(found[0][0].get_weights(), found[1][0].get_weights(), strict=True):
        assert ((one == 0) == (other == 0)).mean() > 0.98
        np.testing.assert_allclose(one, other, atol=0.05 * np.abs(one).max())


def test_one_pass_solves_every_matrix_where_all_examples_fit(monkeypatch):
    """Six of them, where a pass over chunks would solve a few."""
    passes, solve = [], Walk.solve
    monkeypatch.setattr(
        Walk, "solve", lambda self, group, *more: passes.append(len(group)) or solve(self, group, *more)
    )
    model = mobile_cnn()
    total = len(targets_of(model))
    kw.prune(model, IMAGES, 0.5, method="reconstruct", verbose=0)
    assert passes == [total] and total > TOGETHER


def test_padding_does_not_count():
    model = transformer()
    weights, kernels = model.get_weights(), []
    table = model.layers[1].embeddings
    for value in (0.0, 50.0):
        model.set_weights(weights)
        # What stands at padded positions.
        table.assign(np.concatenate([np.full((1, 16), value), ops.convert_to_numpy(table)[1:]]))
        kw.prune(model, TOKENS, 0.5, params="re:.*(query|key|value|output|dense/|dense_1/)", verbose=0)
        kernels.append(targets_of(model))
    for name in kernels[0]:
        np.testing.assert_allclose(kernels[0][name], kernels[1][name], atol=2e-3, err_msg=name)


def test_padding_does_not_count_where_an_addition_follows_the_embedding():
    """No layer ever gets the mask there."""
    inputs = layers.Input((6,), dtype="int32")
    x = layers.Embedding(20, 16, mask_zero=True)(inputs) + np.ones((1, 6, 1), "float32")
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(8, "relu")(x)))
    report = kw.prune(model, TOKENS, 0.5, params="__ALL_PRUNABLE__", num_examples=64, verbose=0)
    used = report.reconstruction.examples
    rows = {layer.rows for layer in report.reconstruction.layers}
    assert len(rows) == 1 and rows != {6 * used}
    # The examples are drawn from these.
    assert abs(rows.pop() / used - (TOKENS != 0).sum(1).mean()) < 1.0


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Conv1D(6, 3),
        lambda: layers.Conv1D(6, 3, strides=2, padding="same"),
        lambda: layers.Conv1DTranspose(6, 3),
        lambda: layers.SeparableConv1D(6, 3),
        lambda: layers.Conv1D(6, 3, padding="same"),
    ],
)
def test_padding_before_convolutions_of_any_length(layer):
    parts = [layers.Embedding(20, 5, mask_zero=True), layer(), layers.GlobalAveragePooling1D(), layers.Dense(3)]
    model = keras.Sequential([layers.Input((8,), dtype="int32"), *parts])
    tokens = RNG.integers(1, 20, (60, 8))
    tokens[:, 5:] = 0
    report = kw.prune(model, tokens, 0.5, verbose=0)
    assert all(found.rows and not found.note for found in report.reconstruction.layers)


class Noise(layers.Layer):
    """Draws in inference, too."""

    def __init__(self):
        super().__init__()
        self.draws = keras.random.SeedGenerator(3)
        self.size = 1.0

    def call(self, x):
        return x + self.size * keras.random.normal(ops.shape(x), seed=self.draws)


def test_noise_is_the_same_in_both_models():
    """Else least squares would regress one draw on another."""
    noise = Noise()
    parts = [layers.Dense(24, "relu"), noise, layers.Dense(16, "relu"), layers.Dense(3)]
    model, x = keras.Sequential([layers.Input((12,)), *parts]), RNG.normal(size=(300, 12)).astype("float32")
    before, state = model.get_weights(), ops.convert_to_numpy(noise.draws.state)
    found = {}
    for method in ("reconstruct", "magnitude"):
        model.set_weights(before)
        noise.size = 0.0
        wanted = model.predict(x, verbose=0)
        noise.size = 1.0
        kw.prune(model, x, 0.1, method=method, verbose=0)
        noise.size = 0.0
        found[method] = np.square(model.predict(x, verbose=0) - wanted).sum()
    assert found["reconstruct"] < found["magnitude"]
    np.testing.assert_array_equal(ops.convert_to_numpy(noise.draws.state).shape, state.shape)


@pytest.mark.parametrize("call", ["prune", "sensitivity"])
def test_recurrent_layers_of_every_kind_with_an_even_number_of_examples(call):
    """Cells have random generators, and JAX traces a cell: none may be touched there."""
    kinds = [
        layers.LSTM(4),
        layers.SimpleRNN(4),
        layers.GRU(4),
        layers.GRU(4, reset_after=False),
        layers.RNN(layers.LSTMCell(4)),
        layers.Bidirectional(layers.LSTM(4)),
    ]
    inputs = layers.Input((3, 5))
    model = keras.Model(inputs, layers.Dense(2)(layers.Concatenate()([kind(inputs) for kind in kinds])))
    x = SEQUENCES[:40, :3]
    if call == "prune":
        report = kw.prune(model, x, {0.5: ["re:.*kernel"]}, verbose=0).reconstruction
        assert report.examples == 36 and all(not layer.note and layer.error < 1.0 for layer in report.layers)
    else:
        model.compile("sgd", "mse")
        options = {"params": "re:.*/kernel", "eval_data": (x, np.zeros((40, 2))), "levels": (0.5,), "verbose": 0}
        report = kw.sensitivity(model, x, method="reconstruct", **options)
        assert len(report.entries) == 8 and not any(entry.note for entry in report.entries)


class Drawing(keras.Model):
    """Draws between layers that are solved, and after the product of one."""

    def __init__(self):
        super().__init__()
        self.draws = keras.random.SeedGenerator(3)
        self.first, self.own, self.last = layers.Dense(12, "relu"), Adding(24), layers.Dense(3)

    def call(self, x):
        hidden = self.first(x)
        return self.last(self.own(hidden + 1e-6 * keras.random.normal(ops.shape(hidden), seed=self.draws)))


class Adding(layers.Dense):
    def build(self, shape):
        super().build(shape)
        self.draws = keras.random.SeedGenerator(3)

    def call(self, x):
        product = super().call(x)
        return product + keras.random.normal(ops.shape(product), seed=self.draws)


def test_draws_of_layers_that_are_solved_and_of_those_that_hold_them():
    """The first are the same in both models; the second see all examples."""
    model, x = Drawing(), RNG.normal(size=(200, 6)).astype("float32")
    model(x)
    report = kw.prune(model, x, 0.1, verbose=0).reconstruction
    assert [layer.rows for layer in report.layers] == 3 * [report.examples]
    assert report.layers[-1].error < 0.1


class Several(keras.Model):
    """Outputs that tell nothing of single examples."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.last = kind, layers.Dense(12, "relu"), layers.Dense(3)

    def call(self, x):
        hidden = self.first(x)
        return {"logits": self.last(hidden), "loss": None if self.kind == "none" else ops.mean(hidden)}


@pytest.mark.parametrize("kind", ["none", "scalar"])
@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_outputs_that_tell_nothing_of_an_example_do_not_count(kind, quality):
    model, x = Several(kind), RNG.normal(size=(80, 6)).astype("float32")
    model(x)
    report = kw.prune(model, x, 0.5, quality=quality, verbose=0)
    assert np.isfinite(report.reconstruction.error)
    assert report.reconstruction.refined is None or report.reconstruction.refined.steps == 0


def test_steps_go_towards_the_actions_that_are_not_ruled_out(backend):
    inputs, allowed = layers.Input((8,)), layers.Input((5,), dtype="bool")
    hidden = layers.Dense(24, "relu")(inputs)
    ruled = layers.Lambda(lambda z: ops.where(z[1], z[0], -np.inf), output_shape=(5,))
    model = keras.Model([inputs, allowed], ruled([layers.Dense(5)(hidden), allowed]))
    x = [RNG.normal(size=(200, 8)).astype("float32"), RNG.random((200, 5)) < 0.8]
    targets = Pruner(model, PruningOptions(verbose=0)).targets
    outputs = HeldOutOutputs(model, targets, [x], 200)
    kernels = [ops.convert_to_numpy(target.variable) for target in targets]
    kernels = [np.where(np.abs(kernel) < np.median(np.abs(kernel)), 0.0, kernel) for kernel in kernels]
    before = outputs.distance(kernels)
    after = outputs.distance(Refinement(model, targets, [x], backend, 0).run(kernels, 64, 0.02))
    assert np.isfinite(before) and after < 0.8 * before


def test_constraints_come_after_what_is_measured_and_that_is_said():
    constrained = layers.Dense(16, kernel_constraint="unit_norm")
    model = keras.Sequential([layers.Input((8,)), constrained, layers.Dense(3)])
    report = kw.prune(model, RNG.normal(size=(60, 8)).astype("float32"), 0.5, verbose=0)
    assert any("constraints of weights were applied after" in note for note in report.notes)
    norms = np.linalg.norm(ops.convert_to_numpy(constrained.kernel), axis=0)
    np.testing.assert_allclose(norms[norms > 0], 1.0, atol=1e-4)


def test_zeros_are_not_divided_so_that_outputs_no_longer_depend_on_the_example(monkeypatch):
    model = keras.Sequential([layers.Input((12,)), layers.Dense(8, "relu"), layers.Dense(3, "softmax")])
    ways = {"dead": [96, 0], "alive": [76, 20]}
    monkeypatch.setattr(pruning, "candidates", lambda pruner, _: {n: Allocation(pruner, z) for n, z in ways.items()})
    report = kw.prune(model, POINTS, 0.8, verbose=0).reconstruction
    # Shares of classes are near to their means, so that the distance alone says nothing.
    assert report.allocation == "alive" and dict(report.compared)["dead"] < 0.3


def test_an_output_that_is_constant_is_farther_than_any_that_tells_examples_apart():
    model = keras.Sequential([layers.Input((12,)), layers.Dense(3)])
    outputs = HeldOutOutputs(model, find_targets(model, "__ALL_PRUNABLE__", ()), [POINTS], 50)
    kernel = ops.convert_to_numpy(model.layers[0].kernel)
    dead, loud = outputs.closeness([0 * kernel]), outputs.closeness([5 * kernel])
    assert dead.constant and not loud.constant and loud < dead and dead.distance < loud.distance


def test_few_examples_are_told_and_that_none_was_held_out():
    model = keras.Sequential([layers.Input((12,)), layers.Dense(4), layers.Dense(3)])
    with pytest.warns(UserWarning, match=r"fitted to 3 example\(s\): .* has 12 inputs, but 3 row.*some hundreds"):
        report = kw.prune(model, POINTS[:3], 0.3, verbose=0)
    assert "on the same 3, too few to hold any out" in str(report)
    assert "others" in str(kw.prune(model, POINTS, 0.4, verbose=0))


def test_inputs_that_do_not_fit_the_model_are_told_with_the_mend():
    pair = [layers.Input((12,), name="left"), layers.Input((12,), name="right")]
    model = keras.Model(pair, layers.Dense(3)(layers.Add()(pair)))
    one = keras.Sequential([layers.Input((12,)), layers.Dense(3)])
    model.compile(loss="mse")
    for options in ({}, {"method": "woodfisher", "num_grads": 8}):
        with pytest.raises(
            ValueError, match=r"1 array\(s\) as x, .* 2 inputs \('left', 'right'\).*data=\(\[x1, x2\],\)"
        ):
            kw.prune(model, [POINTS, POINTS], 0.3, verbose=0, **options)
    with pytest.raises(ValueError, match=r"single examples needs `\.batch\(\.\.\.\)`"):
        kw.prune(one, lambda: iter(POINTS), 0.3, verbose=0)
    kw.prune(model, ([POINTS, POINTS],), 0.3, verbose=0)


class Squaring(layers.Dense):
    """Not the product that its class says."""

    def call(self, x):
        return super().call(x * x)


class Doubling(layers.Dense):
    """A product of its input all the same."""

    def call(self, x, training=None):
        return super().call(x)


class Odd(keras.Model):
    """With a layer that isn't a product, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.squaring, self.own = Squaring(8, name="squaring"), Doubling(8, name="own")
        self.idle, self.head = layers.Dense(4, name="idle"), layers.Dense(3)

    def build(self, shape):
        self.idle.build((None, 3))

    def call(self, x):
        return self.head(self.own(self.squaring(x)))


def test_layers_that_are_no_products_are_pruned_by_magnitude_and_say_so():
    model = Odd()
    model(np.zeros((1, 12), "float32"))
    before = targets_of(model)
    report = kw.prune(model, POINTS, 0.5, verbose=0)
    notes = {layer.name: layer.note for layer in report.reconstruction.layers if layer.note}
    squaring, idle = model.squaring.kernel.path, model.idle.kernel.path
    assert set(notes) == {squaring, idle}
    assert "isn't the product that its class says" in notes[squaring]
    assert "doesn't call its layer" in notes[idle]
    for name, kernel in targets_of(model).items():
        unchanged = (kernel == before[name]) | (kernel == 0)
        assert unchanged.all() == (name in notes)
        assert (kernel == 0).any()


def test_layers_are_checked_where_their_inputs_are_not_blank():
    model = keras.Sequential([layers.Input((12,)), Squaring(8, use_bias=False), layers.Dense(3)])
    x = np.concatenate([np.zeros((280, 12)), np.random.default_rng(0).normal(size=(70, 12))]).astype("float32")
    first, _ = kw.prune(model, lambda: iter([x]), 0.5, verbose=0).reconstruction.layers
    assert "isn't the product" in first.note


class Mixing(keras.Model):
    """Has a layer whose first axis isn't that of the examples, or (windows) is that of parts of each."""

    def __init__(self, kind, times):
        super().__init__()
        self.kind, self.times = kind, times
        self.inner, self.last = layers.Dense(4, activation="relu"), layers.Dense(4)

    def call(self, x):
        count = ops.shape(x)[0]
        if self.kind == "table":
            table = np.random.default_rng(0).normal(size=(self.times, 4)).astype("float32")
            x = x + self.inner(ops.convert_to_tensor(table))[None]
        elif self.kind == "time first":
            x = ops.moveaxis(self.inner(ops.moveaxis(x, 1, 0)), 0, 1)
        elif self.kind == "time first, flat":
            flat = ops.reshape(ops.moveaxis(x, 1, 0), (-1, 4))
            x = ops.moveaxis(ops.reshape(self.inner(flat), (self.times, count, 4)), 0, 1)
        elif self.kind == "two views":
            one, other = ops.split(self.inner(ops.concatenate([x, -x], 0)), 2, 0)
            x = one - other
        else:
            x = ops.reshape(self.inner(ops.reshape(x, (-1, 4))), (count, -1, 4))
        return self.last(x)


@pytest.mark.parametrize("times", [7, 8])
@pytest.mark.parametrize("kind", ["table", "time first", "time first, flat", "two views", "windows"])
def test_layers_in_which_examples_cannot_be_told_apart(kind, times):
    x = RNG.normal(size=(60, times, 4)).astype("float32")
    keras.utils.set_random_seed(0)
    model = Mixing(kind, times)
    wanted = model.predict(x, verbose=0)
    report = kw.prune(model, x, 0.5, verbose=0)
    notes = {layer.name.split("/")[-2]: layer.note for layer in report.reconstruction.layers}
    mixed = notes[model.inner.name]
    assert not notes[model.last.name] and (not mixed if kind == "windows" else "isn't that of the examples" in mixed)
    last = next(layer for layer in report.reconstruction.layers if model.last.name in layer.name)
    # Else the pruned model's examples would be taken for the dense one's.
    found = model.predict(x, verbose=0)
    assert last.error < 0.3 and np.square(found - wanted).sum() < 0.9 * np.square(wanted).sum()


def test_examples_of_several_shapes_each_give_rows_of_their_own():
    model = Mixing("windows", -1)
    batches = [RNG.normal(size=(24, times, 4)).astype("float32") for times in (3, 5)]
    model(batches[0])
    report = kw.prune(model, lambda: iter(batches), 0.3, verbose=0).reconstruction
    first = next(layer for layer in report.layers if model.inner.name in layer.name)
    assert not first.note and first.rows > 3 * report.examples


class Routed(keras.Model):
    """Gives each example to one of two experts; on JAX no tracer can follow that."""

    def __init__(self):
        super().__init__()
        self.experts, self.last = [layers.Dense(6, "relu") for _ in range(2)], layers.Dense(3)

    def build(self, shape):
        for expert in self.experts:
            expert.build(shape)

    def call(self, x):
        hidden = ops.zeros((x.shape[0], 6))
        for number, expert in enumerate(self.experts):
            (mine,) = ops.nonzero(ops.equal(ops.cast(x[:, 0] > 0, "int32"), number))
            if mine.shape[0]:
                hidden = ops.scatter_update(hidden, ops.expand_dims(mine, -1), expert(ops.take(x, mine, axis=0)))
        return self.last(hidden)


@pytest.mark.parametrize("alike", [True, False])
def test_layers_that_get_the_rows_that_values_choose(alike):
    """Also where the examples that are looked at beforehand all go the same way."""
    x = RNG.normal(size=(72, 4)).astype("float32")
    model = Routed()
    model(x[:4])
    x[:, 0] = np.where(np.arange(72) % 2, 1.0, -1.0)
    if alike:
        looked = np.random.default_rng(0).permutation(72)[:66][np.unique(np.linspace(0, 65, 4).astype(int))]
        x[looked, 0] = 1.0
    report = kw.prune(model, x, {0.5: ["re:.*kernel"]}, verbose=0).reconstruction
    notes = {layer.name: layer.note for layer in report.layers}
    idle, busy = (notes[expert.kernel.path] for expert in model.experts)
    assert "decide which rows its layer gets" in busy and not notes[model.last.kernel.path]
    assert ("on the examples that were looked at" if alike else "decide which rows") in idle


class Regularised(layers.Dense):
    """Gives a loss, which isn't of examples, beside its product."""

    def build(self, shape):
        super().build(shape)
        self.draws = keras.random.SeedGenerator(3)

    def call(self, x):
        product = super().call(x) + 0.0 * keras.random.normal((self.units,), seed=self.draws)
        return product, ops.mean(product), {"by unit": ops.mean(product, 0), "none": None}


class WithLosses(keras.Model):
    def __init__(self):
        super().__init__()
        self.solved, self.left, self.last = Regularised(8), Regularised(9), layers.Dense(3)

    def call(self, x):
        for layer in (self.solved, self.left):
            x, loss, parts = layer(x)
            assert loss.shape == () and parts["by unit"].shape == (layer.units,)
        return self.last(x)


def test_layers_that_give_more_than_what_is_of_examples():
    model, x = WithLosses(), RNG.normal(size=(40, 6)).astype("float32")
    model(x[:2])
    report = kw.prune(model, x, 0.3, exclude="re:.*_1/kernel", verbose=0).reconstruction
    assert len(report.layers) == 2 and all(layer.error < 0.3 for layer in report.layers)


class Tied(layers.Layer):
    """Multiplies by the transposed kernel of another layer, which it asks for or (`holds`) has as its own."""

    def __init__(self, other, holds):
        super().__init__()
        self.other, self.kernel = None if holds else other, other.kernel if holds else None

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.kernel if self.other is None else self.other.kernel))


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_kernels_that_another_layer_reads_are_pruned_by_magnitude(holds, wrapped):
    """What fits one of the two doesn't fit the other."""
    first, cell = layers.Dense(10, "tanh"), layers.SimpleRNNCell(10)
    owner = cell if wrapped else first
    inputs = layers.Input((3, 12))
    hidden = layers.RNN(cell, unroll=True)(inputs) if wrapped else first(inputs)
    model = keras.Model(inputs, layers.Dense(4)(Tied(owner, holds)(hidden)))
    before = ops.convert_to_numpy(owner.kernel)
    x = RNG.normal(size=(60, 3, 12)).astype("float32")
    report = kw.prune(model, x, {0.5: ["re:.*kernel"]}, verbose=0).reconstruction
    notes = {layer.name.split(", ")[0]: layer.note for layer in report.layers}
    assert notes.pop(owner.kernel.path) == "another layer uses its weights, too"
    assert not notes[model.layers[-1].kernel.path]
    kept = ops.convert_to_numpy(owner.kernel)
    np.testing.assert_array_equal(kept[kept != 0], before[kept != 0])
    assert (kept == 0).sum() == 60 and np.abs(before[kept == 0]).max() <= np.abs(before[kept != 0]).min()


class ByName(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(8, activation="relu"), layers.Dense(4)

    def call(self, inputs):
        return self.last(inputs=self.first(inputs=inputs))


def test_layers_that_are_called_by_keyword():
    model, x = ByName(), RNG.normal(size=(60, 6)).astype("float32")
    wanted = model.predict(x, verbose=0)
    report = kw.prune(model, x, 0.4, verbose=0)
    assert all(layer.error is not None for layer in report.reconstruction.layers)
    assert np.square(model.predict(x, verbose=0) - wanted).sum() < 0.4 * np.square(wanted).sum()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16"])
def test_inputs_that_are_small_whole_numbers(dtype):
    """Sums of their products are beyond their type."""
    x = RNG.integers(0, 2 if dtype == "bool" else 100, (200, 8))
    found = []
    for kind in (dtype, "float32"):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([layers.Input((8,), dtype=kind), layers.Dense(16, "relu"), layers.Dense(4)])
        kw.prune(model, x.astype(kind), 0.3, seed=0, verbose=0)
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


class Hidden(layers.Layer):
    """A Dense layer within what each framework compiles, or runs on all examples at a time."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(5, activation="relu")

    def build(self, shape):
        self.dense.build((None, shape[-1]))

    def call(self, x):
        return ops.moveaxis(ops.vectorized_map(self.dense, ops.moveaxis(x, 1, 0)), 0, 1)


def test_layers_whose_values_cannot_be_seen_are_pruned_by_magnitude_and_say_so():
    model = keras.Sequential([layers.Input((6, 4)), Hidden(), layers.Flatten(), layers.Dense(3)])
    before = ops.convert_to_numpy(model.layers[0].dense.kernel)
    report = kw.prune(model, RNG.normal(size=(60, 6, 4)).astype("float32"), 0.5, verbose=0)
    hidden, last = report.reconstruction.layers
    assert "within something that the framework compiles" in hidden.note and hidden.error is None
    assert not last.note and last.rows
    kept = ops.convert_to_numpy(model.layers[0].dense.kernel)
    np.testing.assert_array_equal(kept[kept != 0], before[kept != 0])
    assert np.abs(before[kept == 0]).max() <= np.abs(before[kept != 0]).min()


def test_what_is_rematerialised_in_training_can_be_seen():
    x, y = RNG.normal(size=(60, 6)).astype("float32"), RNG.integers(0, 3, 60)
    found = []
    for mode in (None, "full"):
        keras.utils.set_random_seed(0)
        with keras.RematScope(mode):
            model = keras.Sequential([layers.Input((6,)), layers.Dense(5, activation="relu"), layers.Dense(3)])
        model.compile("sgd", "sparse_categorical_crossentropy")
        refitted = kw.prune(model, x, 0.3, seed=0, verbose=0)
        report = kw.prune(model, (x, y), 0.5, quality="fast", num_grads=16, seed=0, verbose=0)
        found.append((refitted, report, model.get_weights()))
    (one, _, weights), (other, report, same) = found
    assert other.reconstruction.error == pytest.approx(one.reconstruction.error, rel=1e-3)
    assert not report.slow_layers and not any(layer.note for layer in other.reconstruction.layers)
    for a, b in zip(weights, same, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_embedding_that_is_named_is_pruned_by_magnitude():
    model = transformer()
    report = kw.prune(model, TOKENS, 0.5, params=["re:.*embeddings", "re:.*dense/kernel"], verbose=0)
    notes = [layer.note for layer in report.reconstruction.layers if "embeddings" in layer.name]
    assert notes == ["its layer isn't a product of its input"]


@pytest.mark.parametrize("x", [np.full((40, 12), np.nan, "float32"), np.full((40, 12), 3e38, "float32")])
def test_what_is_not_finite_changes_nothing(x):
    model = shared()
    before = model.get_weights()
    with pytest.raises(FloatingPointError, match=r"isn't finite; nothing was changed"):
        kw.prune(model, x, 0.5, verbose=0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


def test_dead_inputs_are_told_and_their_weights_go():
    x = POINTS.copy()
    x[:, 3:6] = 0.0
    model = keras.Sequential([layers.Input((12,)), layers.Dense(8), layers.Dense(2)])
    report = kw.prune(model, x, {0.3: ["re:.*kernel"]}, verbose=0)
    assert report.reconstruction.layers[0].dead_inputs == 3
    assert (ops.convert_to_numpy(model.layers[0].kernel)[3:6] == 0).all()


@pytest.mark.parametrize("form", ["dictionary", "list", "labels", "batches", "dtype"])
def test_data_of_every_form(form):
    if form == "dictionary":
        inputs = {"a": layers.Input((12,), name="a"), "b": layers.Input((12,), name="b")}
        data = {"a": POINTS, "b": POINTS[::-1]}
        model = keras.Model(inputs, layers.Dense(3)(layers.Dense(6)(layers.concatenate(list(inputs.values())))))
    elif form == "list":
        inputs = [layers.Input((12,)), layers.Input((12,))]
        data = ([POINTS, POINTS[::-1]], None)
        model = keras.Model(inputs, layers.Dense(3)(layers.Dense(6)(layers.concatenate(inputs))))
    else:
        if form == "dtype":
            keras.config.set_dtype_policy("mixed_float16")
        try:
            model = keras.Sequential([layers.Input((12,)), layers.Dense(16, "relu"), layers.Dense(3)])
        finally:
            keras.config.set_dtype_policy("float32")
        data = {
            "labels": (POINTS, np.zeros(120)),
            "batches": lambda: (POINTS[i : i + 32] for i in range(0, 120, 32)),
            "dtype": POINTS,
        }[form]
    report = kw.prune(model, data, 0.5, verbose=0)
    assert report.sparsity == pytest.approx(0.5, abs=0.01) and report.reconstruction.examples == 109


def test_options_decide_on_the_method(make_mlp, blobs, monkeypatch):
    monkeypatch.setitem(pruning._EFFORTS, "best", replace(pruning._EFFORTS["best"], steps=8))
    model = make_mlp()
    weights = model.get_weights()
    for given, method in (
        ({}, "reconstruct"),
        ({"quality": "best", "num_examples": 50}, "reconstruct"),
        ({"quality": "fast"}, None),
        ({"num_grads": 32}, None),
        ({"fisher_block_size": 100}, None),
        ({"quality": "fast", "method": "reconstruct"}, "reconstruct"),
    ):
        model.set_weights(weights)
        report = kw.prune(model, blobs, 0.5, verbose=0, **given)
        assert report.settings.get("method") == method and (report.reconstruction is None) == (method is None)
        if "num_examples" in given:
            assert report.reconstruction.examples == 50
            assert {name for name, _ in report.reconstruction.compared} == {"between", "magnitude", "uniform"}
    with pytest.raises(ValueError, match="num_examples=9 is for method='reconstruct', got method='magnitude'"):
        kw.prune(model, blobs, 0.5, method="magnitude", num_examples=9)
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0"):
        kw.prune(model, blobs, 0.5, num_examples=0)
    report = kw.prune(model, blobs, 0.6, method="reconstruct", damp=0.1, verbose=0)
    assert "method='reconstruct' takes no gradients: damp had no effect." in report.notes


def test_statistics_of_batchnorm_are_better_left_alone(blobs):
    model = keras.Sequential([layers.Input((12,)), layers.Dense(8), layers.BatchNormalization(), layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.warns(UserWarning, match="Reconstruction fits the weights to the BatchNorm statistics"):
        kw.prune(model, blobs, 0.5, reestimate_batchnorm=True, verbose=0)


@pytest.mark.parametrize("method", ["magnitude", "woodfisher"])
def test_the_kept_weights_of_any_pruned_model_are_refitted(method):
    dense = residual_cnn()
    loss = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    output = dense_output(dense, IMAGES)
    pruned = keras.models.clone_model(dense)
    pruned.set_weights(dense.get_weights())
    labels = (IMAGES, output.argmax(1))
    kw.prune(pruned, labels, 0.7, method=method, quality="fast", num_grads=64, verbose=0, **loss)
    before, zero = distance(pruned, output, IMAGES), {n: k == 0 for n, k in targets_of(pruned).items()}
    untouched = dense.get_weights()
    report = kw.reconstruct(pruned, IMAGES, dense=dense, verbose=0)
    assert distance(pruned, output, IMAGES) < 0.8 * before
    for name, kernel in targets_of(pruned).items():
        np.testing.assert_array_equal(kernel == 0, zero[name])
    assert report.sparsity == pytest.approx(0.7, abs=1e-3) and report.reconstruction.allocation == "given"
    for now, then in zip(dense.get_weights(), untouched, strict=True):
        np.testing.assert_array_equal(now, then)


def test_values_are_those_of_dense_least_squares():
    """One layer, in float64: `(X_S^T X_S + r) w_S = X_S^T T + r w_dense`, for each output's support S."""
    dense = keras.Sequential([layers.Input((12,)), layers.Dense(5)])
    pruned = keras.models.clone_model(dense)
    pruned.set_weights(dense.get_weights())
    kw.prune(pruned, sparsity=0.5, method="magnitude", verbose=0)
    kw.reconstruct(pruned, POINTS, dense=dense, num_examples=1000, verbose=0)
    order = np.random.default_rng(0).permutation(120)[:109]
    x, kernel = POINTS[order].astype(np.float64), ops.convert_to_numpy(dense.layers[0].kernel).astype(np.float64)
    ridge = 0.001 * np.square(x).sum(0).mean()
    found = ops.convert_to_numpy(pruned.layers[0].kernel)
    for column in range(5):
        inside = found[:, column] != 0
        gram = x[:, inside].T @ x[:, inside] + ridge * np.eye(inside.sum())
        wanted = np.linalg.solve(gram, x[:, inside].T @ (x @ kernel[:, column]) + ridge * kernel[inside, column])
        np.testing.assert_allclose(found[inside, column], wanted, rtol=1e-4, atol=1e-5)


def test_models_that_do_not_fit_together_are_refused():
    dense, other = residual_cnn(), residual_cnn()
    with pytest.raises(ValueError, match="model and dense are the same model"):
        kw.reconstruct(dense, IMAGES, dense=dense)
    with pytest.raises(ValueError, match="have weights of other shapes"):
        kw.reconstruct(dense, IMAGES, dense=shared())
    other.set_weights(dense.get_weights())
    other.layers[1].bias.assign(np.ones(8))
    with pytest.raises(ValueError, match=r"differ in more than what is fitted: conv2d.*/bias"):
        kw.reconstruct(other, IMAGES, dense=dense)


def test_one_kernel_of_a_recurrent_layer():
    model = MODELS["lstm"][0]()
    before = targets_of(model)
    kw.prune(model, SEQUENCES, 0.5, params="re:.*lstm_cell/kernel", verbose=0)
    for name, kernel in targets_of(model).items():
        assert (kernel != before[name]).any() == name.endswith("lstm_cell/kernel")


@pytest.mark.parametrize(
    ("kind", "far"), [("residual", 0.0), ("residual", np.inf), ("mobile", 0.0), ("transformer", np.inf)]
)
def test_the_best_quality_goes_on_with_steps_on_all_layers_together(kind, far, monkeypatch):
    """Far from the dense outputs they begin with more weights than are left in the end."""
    monkeypatch.setattr(pruning, "_FAR", far)
    begun, removal = [], pruning.Removal
    monkeypatch.setattr(pruning, "Removal", lambda p, first, finals: begun.append(first) or removal(p, first, finals))
    make, x = MODELS[kind]
    model = make()
    monkeypatch.setitem(pruning._EFFORTS, "best", replace(pruning._EFFORTS["best"], steps=48))
    report = kw.prune(model, x, 0.7, quality="best", verbose=0)
    refined = report.reconstruction.refined
    # Twice the 30 % that are left in the end.
    assert all(first == pytest.approx([0.4] * len(first)) for first in begun) and len(begun) == (not far)
    assert refined.examples == 64 * (48 + 9) and report.settings["steps"] == 48
    if refined.steps:
        assert report.reconstruction.error < refined.error
        assert "refined in 48 steps" in str(report)
    assert refined.steps or kind != "transformer" or not far
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)
    json.dumps(report.as_dict())


def test_a_step_takes_each_example_once(backend):
    """Here all of a batch: in whatever order."""
    model, x = residual_cnn(), IMAGES[:24]
    work = Refinement(model, Pruner(model, PruningOptions(verbose=0)).targets, [x], backend, 0)
    inputs, outputs, weights = work._draw(np.random.default_rng(0))
    assert inputs.shape[0] == 1 and weights is None
    order = [int(np.flatnonzero((x == image).all((1, 2, 3)))[0]) for image in inputs[0]]
    assert sorted(order) == list(range(24)) and order != sorted(order)
    np.testing.assert_allclose(outputs[0], dense_output(model, x)[order], atol=1e-5)


@pytest.mark.parametrize("rate", [1e3, 0.0])
def test_steps_that_do_not_help_are_not_taken(monkeypatch, rate):
    model = residual_cnn()
    monkeypatch.setattr(pruning, "_FAR", np.inf)
    monkeypatch.setitem(pruning._EFFORTS, "best", replace(pruning._EFFORTS["best"], steps=4))
    monkeypatch.setattr(pruning, "RATES", (rate,))
    report = kw.prune(model, IMAGES, 0.5, quality="best", verbose=0)
    assert report.reconstruction.refined.steps == 0
    assert report.reconstruction.error == report.reconstruction.refined.error < 0.5


@pytest.mark.parametrize("method", ["magnitude", "reconstruct"])
def test_no_layer_loses_nearly_all_its_weights(method):
    """By global magnitude the first layer would lose all of them, and the model its input."""
    hidden = [layers.Dense(24, "relu"), layers.LayerNormalization(), layers.Dense(24, "relu"), layers.Dense(3)]
    model = keras.Sequential([layers.Input((12,)), *hidden])
    model.layers[0].kernel.assign(1e-3 * model.layers[0].kernel)
    report = kw.prune(model, RNG.normal(size=(120, 12)).astype("float32"), 0.8, method=method, verbose=0)
    assert report.sparsity == pytest.approx(0.8, abs=1e-3)
    first = report.variables[0]
    kept = first.weights - first.pruned
    assert kept == 0 if method == "magnitude" else kept >= 0.25 * 0.2 * first.weights - 1


def test_where_outputs_are_far_off_other_ways_to_divide_the_zeros_are_tried(monkeypatch):
    model = residual_cnn()
    weights = model.get_weights()
    plain = kw.prune(model, IMAGES, 0.9, verbose=0).reconstruction
    model.set_weights(weights)
    monkeypatch.setitem(pruning._EFFORTS, "balanced", replace(pruning._EFFORTS["balanced"], compare=1e-6))
    parts, run = [], pruning.Layerwise.run
    monkeypatch.setattr(
        pruning.Layerwise, "run", lambda self, a, part=1.0, *b, **c: parts.append(part) or run(self, a, part, *b, **c)
    )
    found = kw.prune(model, IMAGES, 0.9, verbose=0).reconstruction
    assert [name for name, _ in found.compared] == ["between", "magnitude", "uniform"]
    assert found.error <= plain.error and found.allocation in dict(found.compared)
    # They are tried with a part of the examples, and what is best with all of them.
    scouts = parts[1:4]
    assert len(set(scouts)) == 1 and 0.0 < scouts[0] < 0.5 and {*parts[:1], *parts[4:]} <= {1.0}


@pytest.mark.once
def test_first_halves_are_compared_as_far_as_there_are_values():
    one, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 9.0, 9.0])
    assert _begin_alike([one, None], [other, one]) and _begin_alike([one + 1e-4], [other]) and _begin_alike([], [])
    assert not _begin_alike([one], [other[::-1]]) and not _begin_alike([one], [one[None]])
    assert not _begin_alike([one, one], [one, other + 1.0]), "each call counts"
    assert not _begin_alike([one], [one, one]) and not _begin_alike([one], [])
    assert not _begin_alike([1e3 * one], [1e3 * one + 5.0]) and _begin_alike([1e3 * one], [1e3 * one + 0.3])
