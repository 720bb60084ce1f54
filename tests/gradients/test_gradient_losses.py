"""Gradient samples of every kind of loss, input, output and policy against plain autodiff."""

import keras
import numpy as np
import pytest
from keras import layers, ops, tree
from sampling import NAME, assert_rows, chain, cross_entropy, mean_square, sample, source_of, truth_of

from keras_woodfisher.gradients.loss import ModelLoss
from keras_woodfisher.model.targets import find_targets


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


def test_samples_are_taken_in_full_float32(backend, rng, precision):
    seen = []

    def loss(y, prediction):
        seen.append(precision.read())
        return ops.mean(ops.square(prediction - y), axis=-1)

    model = chain((4,), layers.Dense(2))
    model.compile(loss=loss)
    sample(backend, model, (rng.normal(size=(5, 4)).astype("float32"), rng.normal(size=(5, 2)).astype("float32")), 5)
    assert seen[-1] == precision.strict
    assert precision.read() == precision.loose


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
    for unlabelled in (x, (x,), lambda: ((x[i : i + 8], None) for i in range(0, 96, 8))):
        source, _ = source_of(backend, make_mlp(), unlabelled, 4)
        with pytest.raises(ValueError, match=r"^data holds no labels: give \(x, y\).*The loss of the first examples"):
            source.check(4)
    for reduction in (None, "none"):
        loss = keras.losses.MeanSquaredError(reduction=reduction)
        source, _ = source_of(backend, model, (x, np.eye(3)[y]), 4, b=2, loss=loss)
        with pytest.raises(ValueError, match=r"reduction='none'.*a number for each example.*sum_over_batch_size"):
            source.check(4)
    model = LossOfEach(model.inputs, model.outputs)
    model.compile("sgd")
    source, _ = source_of(backend, model, (x, np.eye(3)[y]), 4, b=2)
    with pytest.raises(ValueError, match=r"has shape \(2,\), but must be a scalar.*sum_over_batch_size"):
        source.check(4)
