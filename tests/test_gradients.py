"""Gradient samples: every kind of layer, loss and policy against plain autodiff, one group at a time."""

import warnings

import keras
import numpy as np
import pytest
from autodiff import plain_gradients
from gathering import gathered
from keras import layers, ops, tree

from keras_woodfisher.gradients import ModelLoss, checked, sample_gradients, usable_rows
from keras_woodfisher.options import PruningOptions
from keras_woodfisher.sources import SampledGradients
from keras_woodfisher.stores.store import MemoryStore
from keras_woodfisher.targets import find_targets

NAME = keras.backend.backend()
CAPTURES = NAME != "jax"  # on JAX there is one way only
SEED = 0


def source_of(backend, model, data, count, b=1, params="__ALL_PRUNABLE__", loss=None):
    options = PruningOptions(params=params, num_grads=count, grad_batch_size=b, verbose=0, seed=SEED)
    targets = find_targets(model, options.params)
    return SampledGradients(model, targets, options, backend, data, loss), targets


def collect(source, targets, count, backend, draw=0):
    source.check(count)
    kept = [np.ones(t.size, bool) for t in targets]
    return gathered(source, kept, count, draw)


def sample(backend, model, data, count, **kwargs):
    source, targets = source_of(backend, model, data, count, **kwargs)
    grads = collect(source, targets, count, backend)
    return grads, targets, getattr(source._sampler, "trusted", None)


def truth_of(model, targets, loss_of_output, data, count, b=1):
    """The samples by definition: group i holds the examples `permutation[i b : (i + 1) b]`."""
    length = len(tree.flatten(data[0])[0])
    order = np.random.default_rng(SEED).permutation(length)[: count * b].reshape(count, b)
    groups = [tree.map_structure(lambda array, chosen=chosen: array[chosen], list(data)) for chosen in order]
    return rows_of(model, targets, loss_of_output, groups)


def rows_of(model, targets, loss_of_output, groups):
    gradients = plain_gradients(model, [t.variable for t in targets], loss_of_output)
    rows = [[t.flatten(g) for t, g in zip(targets, gradients(*group), strict=True)] for group in groups]
    return np.array([np.concatenate(row) for row in rows])


def assert_rows(grads, truth, targets, tolerance=1e-5):
    assert grads.dtype == np.float32
    assert grads.shape == truth.shape
    edges = np.cumsum([t.size for t in targets])[:-1]
    for target, found, right in zip(targets, np.split(grads, edges, 1), np.split(truth, edges, 1), strict=True):
        distance = np.linalg.norm(found - right, axis=1)
        assert np.linalg.norm(right) > 0, target.name
        assert (distance <= tolerance * np.linalg.norm(right, axis=1)).all(), (target.name, distance)


def mean_square(output, y):
    return ops.mean(ops.square(output - y))


def cross_entropy(output, y):
    picked = ops.take_along_axis(ops.log_softmax(output), ops.cast(y, "int32")[:, None], axis=1)
    return -ops.mean(picked)


def chain(shape, *parts, dtype=None):
    inputs = layers.Input(shape, dtype=dtype)
    x = inputs
    for part in parts:
        x = part(x)
    return keras.Model(inputs, layers.Flatten()(x))


def shared():
    inputs = layers.Input((5,))
    dense = layers.Dense(5, activation="tanh")
    return keras.Model(inputs, dense(dense(inputs)))


def attention():
    inputs = layers.Input((4, 6))
    x = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    return keras.Model(inputs, layers.Flatten()(x))


# Name: the model, and whether layer inputs and output gradients are captured.
MODELS = {
    "dense": (
        lambda: chain((6,), layers.Dense(5, "tanh"), layers.Dense(4, activation=layers.LeakyReLU()), layers.Dense(3)),
        True,
    ),
    "dense on sequences": (lambda: chain((4, 5), layers.Dense(3, "tanh"), layers.Dense(2)), True),
    "dense on images": (lambda: chain((2, 3, 5), layers.Dense(3, "tanh"), layers.Dense(2)), True),
    "conv1d": (
        lambda: chain(
            (11, 3),
            layers.Conv1D(4, 3, dilation_rate=2, padding="causal", activation="tanh"),
            layers.Conv1D(6, 4, strides=2, padding="same", activation="tanh"),
            layers.Conv1D(4, 2, groups=2, padding="valid"),
            layers.Conv1D(2, 3, strides=2, padding="causal"),
        ),
        True,
    ),
    "conv2d": (
        lambda: chain(
            (9, 8, 3),
            layers.Conv2D(4, (3, 2), strides=2, padding="same", activation="tanh"),
            layers.Conv2D(6, 2, dilation_rate=(2, 1), padding="valid", activation="tanh"),
            layers.Conv2D(4, (2, 3), groups=2, padding="same", use_bias=False),
            layers.Conv2D(2, 2, dilation_rate=2, padding="same"),
            layers.Conv2D(2, 1, strides=2),
        ),
        True,
    ),
    "conv3d": (
        lambda: chain(
            (4, 5, 3, 2),
            layers.Conv3D(3, (2, 3, 2), strides=(1, 2, 1), padding="same", activation="tanh"),
            layers.Conv3D(2, 2, padding="valid"),
        ),
        True,
    ),
    "einsum": (
        lambda: chain(
            (4, 6),
            layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", activation="tanh"),
            layers.EinsumDense("abde,dec->abc", (None, 5), activation="tanh"),
            layers.EinsumDense("...x,xy->...y", 3),
            layers.Reshape((4, 3)),
            layers.EinsumDense("abc,bcd->ad", (2,)),
        ),
        True,
    ),
    "attention": (attention, True),
    "shared": (shared, True),
    "time distributed": (lambda: chain((3, 4), layers.TimeDistributed(layers.Dense(2, "tanh"))), True),
    "lstm": (lambda: chain((4, 3), layers.LSTM(3, return_sequences=True), layers.GRU(2)), False),
    "depthwise": (
        lambda: chain(
            (7, 6, 2),
            layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", activation="tanh"),
            layers.SeparableConv2D(3, 2, padding="valid", activation="tanh"),
            layers.Conv2DTranspose(2, 3, strides=2, padding="same"),
        ),
        False,
    ),
    "1d kin": (
        lambda: chain(
            (7, 2),
            layers.DepthwiseConv1D(3, padding="same", activation="tanh"),
            layers.SeparableConv1D(3, 2),
            layers.Conv1DTranspose(2, 3, strides=2),
            layers.SimpleRNN(3),
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_one_example_at_a_time(backend, rng, name):
    make, captured = MODELS[name]
    model = make()
    x = rng.normal(size=(4, *model.input_shape[1:])).astype("float32")
    y = rng.normal(size=(4, *model.output_shape[1:])).astype("float32")
    model.compile(loss="mse")
    grads, targets, trusted = sample(backend, model, (x, y), 3)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 3), targets)
    assert trusted == ((captured or None) if CAPTURES else None)


def test_channels_first(backend, rng):
    # TensorFlow has channels_first convolutions on GPUs only.
    order = "channels_last" if NAME == "tensorflow" else "channels_first"
    model = chain(
        (4, 6, 4),
        layers.Conv2D(4, (2, 3), strides=(1, 2), padding="same", groups=2, data_format=order, activation="tanh"),
        layers.Conv2D(2, 2, data_format=order),
    )
    model.compile(loss="mse")
    x = rng.normal(size=(4, 4, 6, 4)).astype("float32")
    y = rng.normal(size=(4, model.output_shape[1])).astype("float32")
    grads, targets, trusted = sample(backend, model, (x, y), 4)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 4), targets)
    assert trusted == (True if CAPTURES else None)


def test_embedding_when_named(backend, rng):
    model = chain((3,), layers.Embedding(8, 4, name="words"), layers.Dense(2, "tanh", name="head"), dtype="int32")
    model.compile(loss="mse")
    x = rng.integers(0, 8, (6, 3)).astype("int32")
    y = rng.normal(size=(6, 6)).astype("float32")
    params = ["words/embeddings", "head/kernel"]
    grads, targets, _ = sample(backend, model, (x, y), 6, params=params)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 6), targets)


@pytest.mark.parametrize("b, count", [(1, 70), (3, 20)])
def test_rows_are_means_over_b_examples_whatever_the_chunks(backend, blobs, make_mlp, b, count):
    x, y = blobs
    model = make_mlp()
    grads, targets, trusted = sample(backend, model, blobs, count, b=b)
    assert_rows(grads, truth_of(model, targets, cross_entropy, (x, y), count, b), targets)
    assert trusted == (True if CAPTURES and b == 1 else None)


def test_streams_give_the_same_rows_in_their_order(backend, blobs, make_mlp):
    x, y = blobs
    model = make_mlp()
    for batch in (1, 7, 50):  # smaller and larger than a chunk

        def batches(batch=batch):
            return ((x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch))

        grads, targets, _ = sample(backend, model, batches, 40)
        truth = rows_of(model, targets, cross_entropy, [(x[[i]], y[[i]]) for i in range(40)])
        assert_rows(grads, truth, targets)


def test_small_batches_of_a_stream_share_a_chunk(backend, blobs, make_mlp):
    x, y = blobs
    source, targets = source_of(backend, make_mlp(), lambda: ((x[[i]], y[[i]]) for i in range(40)), 40)
    calls, original = [], backend.sampler

    def counting(*args):
        sampler = original(*args)

        def count(values, others, batch):
            calls.append(len(batch[0]))
            return sampler(values, others, batch)

        return count

    source._backend = type("Counting", (), {"sampler": staticmethod(counting), "chunk_groups": backend.chunk_groups})()
    collect(source, targets, 40, backend)
    size = backend.chunk_groups(1)
    assert calls == [size] * -(-40 // size)


def test_sequences_of_different_lengths_are_never_mixed(backend, rng):
    inputs = layers.Input((None, 3))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(layers.Dense(2, "tanh")(inputs)))
    model.compile(loss="mse")
    batches = [rng.normal(size=(2, length, 3)).astype("float32") for length in (4, 4, 2, 5)]
    y = rng.normal(size=(2, 2)).astype("float32")
    grads, targets, _ = sample(backend, model, lambda: ((x, y) for x in batches), 8)
    truth = rows_of(model, targets, mean_square, [(x[[i]], y[[i]]) for x in batches for i in range(2)])
    assert_rows(grads, truth, targets)


@pytest.mark.parametrize("b", [1, 2])
def test_sample_weights(backend, blobs, make_mlp, b):
    x, y = blobs
    weights = np.random.default_rng(1).uniform(0.5, 2.0, len(x)).astype("float32")

    def weighted(output, y, w):
        picked = ops.take_along_axis(ops.log_softmax(output), ops.cast(y, "int32")[:, None], axis=1)[:, 0]
        return -ops.sum(w * picked) / b

    model = make_mlp()
    grads, targets, _ = sample(backend, model, (x, y, weights), 6, b=b)
    assert_rows(grads, truth_of(model, targets, weighted, (x, y, weights), 6, b), targets)


def branches(outputs):
    inputs = {"left": layers.Input((4,), name="left"), "right": layers.Input((3,), name="right")}
    x = layers.concatenate([layers.Dense(3, "tanh")(inputs["left"]), layers.Dense(2, "tanh")(inputs["right"])])
    heads = {"a": layers.Dense(2, name="a")(x), "b": layers.Dense(3, name="b")(x)}
    if outputs == "one":
        return keras.Model(inputs, heads["a"])
    return keras.Model(inputs, heads if outputs == "dict" else list(heads.values()))


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_several_inputs(backend, rng, kind):
    model = branches("one")
    x = {"left": rng.normal(size=(5, 4)).astype("float32"), "right": rng.normal(size=(5, 3)).astype("float32")}
    if kind == "list":
        model = keras.Model(model.inputs, model.outputs[0])
        x = [x["left"], x["right"]]
    y = rng.normal(size=(5, 2)).astype("float32")
    model.compile(loss="mse")
    grads, targets, _ = sample(backend, model, (x, y), 5)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 5), targets)


@pytest.mark.parametrize("kind", ["dict", "list", "loss="])
def test_several_outputs_with_weights(backend, rng, kind):
    model = branches("list" if kind == "list" else "dict")
    x = {"left": rng.normal(size=(5, 4)).astype("float32"), "right": rng.normal(size=(5, 3)).astype("float32")}
    y = {"a": rng.normal(size=(5, 2)).astype("float32"), "b": rng.normal(size=(5, 3)).astype("float32")}
    losses, weights = {"a": "mse", "b": "mae"}, {"a": 0.3, "b": 2.0}
    if kind == "list":
        y, losses, weights = list(y.values()), list(losses.values()), list(weights.values())
    if kind == "loss=":
        weights = {"a": 1.0, "b": 1.0}
    else:
        model.compile(loss=losses, loss_weights=weights, metrics={"a": "mae"} if kind == "dict" else None)

    def by_hand(output, y):
        (first, second), (one, two), (u, v) = (tree.flatten(nest) for nest in (output, y, weights))
        return u * ops.mean(ops.square(first - one)) + v * ops.mean(ops.abs(second - two))

    grads, targets, _ = sample(backend, model, (x, y), 4, loss=losses if kind == "loss=" else None)
    assert_rows(grads, truth_of(model, targets, by_hand, (x, y), 4), targets)
    # The means of each loss, which compiling keeps as metrics, stay at zero.
    assert all(not ops.convert_to_numpy(v).any() for v in model.metrics_variables)
    assert len(model.metrics_variables) > 0 or kind == "loss="


def test_loss_of_an_uncompiled_model_which_stays_uncompiled(backend, blobs, make_mlp):
    model = make_mlp(compile=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    grads, targets, _ = sample(backend, model, blobs, 5, loss=loss)
    assert_rows(grads, truth_of(model, targets, cross_entropy, blobs, 5), targets)
    assert not model.compiled
    with pytest.raises(ValueError, match=r"isn't compiled with a loss.*or give `loss=`"):
        ModelLoss(model, targets)


@keras.saving.register_keras_serializable()
class OwnLoss(keras.Model):
    """A subclass whose compute_loss looks at x and keeps a metric."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(4, "tanh")
        self.head = layers.Dense(3)
        self.tracker = keras.metrics.Mean(name="own")

    def call(self, x):
        return self.head(self.hidden(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        loss = ops.mean(ops.square(y_pred)) * (1.0 + ops.mean(ops.square(x)))
        self.tracker.update_state(loss)
        return loss + sum(self.losses)


def test_custom_compute_loss(backend, rng):
    model = OwnLoss()
    model.compile(optimizer="sgd")
    x = rng.normal(size=(5, 6)).astype("float32")
    model(x)
    grads, targets, _ = sample(backend, model, (x,), 5)

    def by_hand(output, x):
        return ops.mean(ops.square(output)) * (1.0 + ops.mean(ops.square(x)))

    assert_rows(grads, truth_of(model, targets, by_hand, (x, x), 5), targets)
    assert float(model.tracker.result()) == 0.0


class Penalty(layers.Layer):
    def call(self, x):
        self.add_loss(ops.sum(ops.square(x)))
        return x


def test_regularisers_and_add_loss_are_left_out(backend, rng):
    model = chain((4,), layers.Dense(5, "tanh", kernel_regularizer="l2"), Penalty(), layers.Dense(2))
    x, y = rng.normal(size=(5, 4)).astype("float32"), rng.normal(size=(5, 2)).astype("float32")
    model.compile(loss="mse")
    grads, targets, _ = sample(backend, model, (x, y), 5)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 5), targets)
    assert len(model.losses) == 1 or len(model.losses) == 2  # put back: the regulariser, and what a call added
    assert float(model.losses[-1]) != 0.0 or float(model.losses[0]) != 0.0


def conv_net(policy):
    return keras.Sequential(
        [
            layers.Input((6, 6, 2)),
            layers.Conv2D(3, 3, activation="relu", dtype=policy),
            layers.BatchNormalization(dtype=policy),
            layers.Flatten(dtype=policy),
            layers.Dropout(0.5, dtype=policy),
            layers.Dense(3, dtype=policy),
        ]
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_half_precision_models_are_sampled_in_float32(backend, rng, policy):
    x, y = rng.normal(size=(6, 6, 6, 2)).astype("float32"), rng.integers(0, 3, 6)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    half, full = conv_net(policy), conv_net("float32")
    full.set_weights([np.asarray(ops.convert_to_numpy(w), "float32") for w in half.weights])
    half.compile("sgd", loss)
    grads, targets, _ = sample(backend, half, (x, y), 6)
    full_targets = find_targets(full, "__ALL_PRUNABLE__")
    # Variables that are themselves bfloat16 take gradients with its 8 bits.
    assert_rows(
        grads, truth_of(full, full_targets, cross_entropy, (x, y), 6), targets, 4e-3 if policy == "bfloat16" else 1e-5
    )
    assert [layer.dtype_policy.name for layer in half.layers] == [policy] * 5


def test_a_float64_model(backend, rng):
    policy = "float32" if NAME == "jax" else "float64"  # JAX has no float64 by default
    model = chain((4,), layers.Dense(5, "tanh", dtype=policy), layers.Dense(2, dtype=policy), dtype=policy)
    x, y = rng.normal(size=(5, 4)).astype(policy), rng.normal(size=(5, 2)).astype(policy)
    model.compile(loss="mse")
    grads, targets, _ = sample(backend, model, (x, y), 5)
    assert_rows(grads, truth_of(model, targets, lambda o, t: mean_square(o, ops.cast(t, o.dtype)), (x, y), 5), targets)


class Noisy(layers.Layer):
    """Draws random numbers in inference mode too, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, x):
        self.calls.assign(self.calls + 1.0)
        return x + 0.0 * keras.random.normal(ops.shape(x), seed=self.seeds)


@pytest.mark.parametrize("kind", ["captured", "direct"])
def test_nothing_of_the_model_is_changed(backend, rng, kind):
    extra = [] if kind == "captured" else [layers.DepthwiseConv2D(2)]
    model = keras.Sequential(
        [
            layers.Input((5, 5, 2)),
            layers.Conv2D(3, 2, activation=layers.ReLU()),
            layers.BatchNormalization(),
            Noisy(),
            *extra,
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = rng.normal(size=(8, 5, 5, 2)).astype("float32"), rng.integers(0, 3, 8)
    model.train_on_batch(x, y)
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    values = [np.copy(ops.convert_to_numpy(v)) for v in variables]
    attributes = [dict(vars(layer)) for layer in model._flatten_layers()]
    held = [layer.activation for layer in model.layers if hasattr(layer, "activation")]
    modes = [module.training for module in model.modules()] if NAME == "torch" else []
    grads_of_training = [v.value.grad for v in model.variables] if NAME == "torch" else []
    random_state = np.random.get_state()[1].copy()
    sample(backend, model, (x, y), 6)
    for variable, before in zip(variables, values, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), before, err_msg=variable.path)
    for layer, before in zip(model._flatten_layers(), attributes, strict=True):
        after = vars(layer)
        assert after.keys() == before.keys(), layer.name
        changed = [key for key in after if after[key] is not before[key] and not key.startswith("_losses")]
        assert not [key for key in changed if key in ("call", "activation", "_dtype_policy")], changed
    assert [layer.activation for layer in model.layers if hasattr(layer, "activation")] == held
    if NAME == "torch":
        assert [module.training for module in model.modules()] == modes
        assert all(v.value.grad is grad for v, grad in zip(model.variables, grads_of_training, strict=True))
    np.testing.assert_array_equal(np.random.get_state()[1], random_state)


def test_inference_mode_is_used(backend, rng):
    # In training mode dropout would zero and scale, so the rows would differ.
    model = chain((6,), layers.Dense(8, "tanh"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(2))
    model.layers[2].moving_mean.assign(rng.normal(size=8))
    model.compile(loss="mse")
    x, y = rng.normal(size=(5, 6)).astype("float32"), rng.normal(size=(5, 2)).astype("float32")
    grads, targets, _ = sample(backend, model, (x, y), 5)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 5), targets)


def test_zero_and_non_finite_rows_are_dropped_and_counted(backend, rng):
    model = chain((3,), layers.Dense(2, use_bias=False))
    model.compile(loss="mse")
    x, y = rng.normal(size=(8, 3)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")
    x[1] = 0.0
    x[4] = np.nan
    x[6] = np.inf
    source, targets = source_of(backend, model, (x, y), 8)
    with pytest.warns(UserWarning, match="3 of 8 gradient samples are zero or not finite and were dropped"):
        grads = collect(source, targets, 8, backend)
    order = [i for i in np.random.default_rng(SEED).permutation(8) if i not in (1, 4, 6)]
    assert_rows(grads, rows_of(model, targets, mean_square, [(x[[i]], y[[i]]) for i in order]), targets)


def test_no_usable_row_is_an_error(backend):
    model = chain((3,), layers.Dense(2))
    model.compile(loss="mse")
    source, targets = source_of(backend, model, (np.zeros((8, 3)), np.zeros((8, 2))), 8)
    with pytest.raises(ValueError, match="No usable gradient sample: 8 of 8 are zero or not finite"):
        collect(source, targets, 8, backend)


def test_data_that_run_out_are_reported(backend, blobs, make_mlp):
    x, y = blobs
    source, targets = source_of(backend, make_mlp(), lambda: iter([(x[:5], y[:5])]), 8)
    with pytest.warns(UserWarning, match="Only 5 of 8 gradient samples could be taken: the data ran out"):
        assert len(collect(source, targets, 8, backend)) == 5


def test_a_callable_that_gives_its_data_only_once(backend, blobs, make_mlp):
    once = iter([blobs])
    source, targets = source_of(backend, make_mlp(), lambda: once, 8)
    with pytest.raises(ValueError, match=r"data gave no example.*fresh iterator"):
        collect(source, targets, 8, backend)


def test_usable_rows_and_their_messages():
    rows = np.array([[0, 0], [1, np.nan], [np.inf, 1], [0, -1e-30], [-np.inf, np.nan]], np.float32)
    assert usable_rows(rows).tolist() == [False, False, False, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(checked(rows[3:4], 0, 1)) == 1


class HalfCentred(layers.Layer):
    """Looks at the other examples, though a batch of one tells nothing from it."""

    def call(self, x):
        return 2.0 * x - ops.mean(x, axis=0, keepdims=True)


def test_a_layer_that_mixes_examples_is_never_captured(backend, rng):
    model = chain((4,), layers.Dense(3, "tanh"), HalfCentred(), layers.Dense(2))
    model.compile(loss="mse")
    x, y = rng.normal(size=(40, 4)).astype("float32"), rng.normal(size=(40, 2)).astype("float32")
    grads, targets, trusted = sample(backend, model, (x, y), 40)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 40), targets)
    assert trusted == (False if CAPTURES else None)


class Folded(layers.Layer):
    """Calls a Dense on tensors whose first axis isn't that of the examples."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, "tanh")

    def build(self, shape):
        self.dense.build((None, shape[-1]))

    def call(self, x):
        y = self.dense(ops.reshape(x, (-1, x.shape[-1])))
        return ops.reshape(y, (-1, x.shape[1] * 3))


class Tied(layers.Layer):
    """Uses a Dense layer's kernel behind its back."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4, "tanh")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return ops.matmul(self.dense(x), ops.transpose(self.dense.kernel))


@pytest.mark.parametrize("part", [Folded, Tied])
def test_a_layer_that_capture_cant_follow_is_sampled_directly(backend, rng, part):
    model = chain((2, 4), part())
    model.compile(loss="mse")
    x = rng.normal(size=(6, 2, 4)).astype("float32")
    y = rng.normal(size=(6, model.output_shape[1])).astype("float32")
    grads, targets, trusted = sample(backend, model, (x, y), 6)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 6), targets)
    assert trusted == (False if CAPTURES else None)


def batch_mean_loss(y, prediction):
    return ops.square(ops.mean(prediction)) + ops.mean(ops.square(prediction - y))


@pytest.mark.parametrize("b", [1, 3])
def test_a_loss_of_the_whole_group(backend, rng, b):
    model = chain((4,), layers.Dense(3, "tanh"), layers.Dense(2))
    model.compile(loss=batch_mean_loss)
    x, y = rng.normal(size=(12, 4)).astype("float32"), rng.normal(size=(12, 2)).astype("float32")
    grads, targets, _ = sample(backend, model, (x, y), 4, b=b)
    truth = truth_of(model, targets, lambda output, y: batch_mean_loss(y, output), (x, y), 4, b)
    assert_rows(grads, truth, targets)


def test_confident_examples_dont_spoil_the_fast_way(backend, rng):
    # Gradients of examples that the model is sure of are rounding: they differ between any two ways.
    model = chain((4,), layers.Dense(3, "tanh", name="hidden"), layers.Dense(3, name="out"))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = rng.normal(size=(20, 4)).astype("float32")
    model.layers[-2].kernel.assign(30.0 * rng.normal(size=(3, 3)))
    logits = ops.convert_to_numpy(model(x))
    y = logits.argmax(1)
    y[5] = logits[5].argmin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows may be exactly zero
        _, _, trusted = sample(backend, model, (x, y), 20)
    assert trusted == (True if CAPTURES else None)


class LossOfEach(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(y - y_pred), axis=-1)


def test_data_that_dont_fit_the_loss_fail_early(backend, blobs, make_mlp, rng):
    x, y = blobs
    source, _ = source_of(backend, make_mlp(), (x[:, :5], y), 4)
    with pytest.raises(ValueError, match="The loss of the first examples in data can't be computed: "):
        source.check(4)
    model = make_mlp(compile=False)
    source, _ = source_of(backend, model, (x, rng.normal(size=(len(x), 5))), 4, loss="categorical_crossentropy")
    with pytest.raises(ValueError, match="The loss of the first examples in data can't be computed: "):
        source.check(4)
    loss = keras.losses.MeanSquaredError(reduction=None)
    source, _ = source_of(backend, model, (x, np.eye(3)[y]), 4, b=2, loss=loss)
    with pytest.raises(ValueError, match="The loss of the first examples in data can't be computed: "):
        source.check(4)
    model = LossOfEach(model.inputs, model.outputs)
    model.compile("sgd")
    source, _ = source_of(backend, model, (x, np.eye(3)[y]), 4, b=2)
    with pytest.raises(ValueError, match=r"has shape \(2,\), but must be a scalar.*sum_over_batch_size"):
        source.check(4)


def test_more_samples_than_data_says_what_fits(backend, blobs, make_mlp):
    source, _ = source_of(backend, make_mlp(), blobs, 50, b=2)
    with pytest.raises(ValueError, match=r"num_grads=50 with .*=2 needs 100 examples.*96. num_grads=48 would fit"):
        source.check(50)
    source, _ = source_of(backend, make_mlp(), lambda: iter([blobs]), 1, b=97)
    with pytest.raises(ValueError, match="data holds fewer than grad_batch_size=97 examples"):
        source.check(1)


def test_each_update_draws_other_examples(backend, blobs, make_mlp):
    source, targets = source_of(backend, make_mlp(), blobs, 10)
    first, again, other = (collect(source, targets, 10, backend, draw) for draw in (0, 0, 1))
    np.testing.assert_allclose(first, again, rtol=1e-4, atol=1e-7)
    assert np.abs(first - other).max() > 1e-2


def test_only_unpruned_weights_are_kept(backend, blobs, make_mlp):
    model = make_mlp()
    source, targets = source_of(backend, model, blobs, 6)
    full = collect(source, targets, 6, backend)
    rng = np.random.default_rng(3)
    kept = [rng.random(targets[0].size) < 0.5, np.zeros(targets[1].size, bool)]  # the second is pruned as a whole
    some = gathered(source, kept, 6)
    np.testing.assert_allclose(some, full[:, np.concatenate(kept)], rtol=1e-4, atol=1e-7)


def test_new_weights_are_seen_at_the_next_update(backend, blobs, make_mlp):
    model = make_mlp()
    source, targets = source_of(backend, model, blobs, 6)
    collect(source, targets, 6, backend)
    for target in targets:
        target.write(0.5 * target.read())
    grads = collect(source, targets, 6, backend)
    assert_rows(grads, truth_of(model, targets, cross_entropy, blobs, 6), targets)


def test_sample_gradients_counts_rows_not_padding(backend, blobs, make_mlp):
    model = make_mlp()
    targets = find_targets(model, "__ALL_PRUNABLE__")
    loss = ModelLoss(model, targets)
    sampler = backend.sampler(loss, model, [t.variable for t in targets])
    x, y = blobs
    done = []
    groups = iter([(x[:3, None], y[:3, None], None), (x[3:40, None], y[3:40, None], None)])
    kept = [(t, np.ones(t.size, bool)) for t in targets]
    store = MemoryStore((40, sum(t.size for t in targets)), 40)
    sample_gradients(loss, sampler, backend, groups, kept, 40, store, done.append)
    assert sum(done) == len(store) == 40
