"""Gauss-Newton samples: their mean outer product is the curvature of the loss, on each backend."""

import itertools

import keras
import numpy as np
import pytest
from autodiff import plain_gradients
from keras_woodfisher_backends.nest import take

import keras_woodfisher as kw
from keras_woodfisher.gradients.gauss_newton import GaussNewtonLoss
from keras_woodfisher.model.targets import find_targets

BATCH, CLASSES = 2, 3


def small_model(activation, classes=CLASSES):
    return keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(3, activation="tanh"),
            keras.layers.Dense(classes, activation=activation),
        ]
    )


def jacobian(model, targets, x):
    """(examples, outputs, d), by plain autodiff, in weight order."""
    rows = []
    for example in x:
        outputs = []
        for index in range(model.output_shape[-1]):
            of = plain_gradients(model, [t.variable for t in targets], lambda z, i=index: z[0, i])
            grads = of(example[None])
            outputs.append(np.concatenate([t.flatten(g) for t, g in zip(targets, grads, strict=True)]))
        rows.append(outputs)
    return np.array(rows)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def of_softmax(z):
    p = softmax(z)
    return np.diag(p) - np.outer(p, p)


KINDS = {
    "softmax": (keras.losses.SparseCategoricalCrossentropy(from_logits=True), None, of_softmax, 1),
    "one-hot": (keras.losses.CategoricalCrossentropy(from_logits=True), None, of_softmax, 1),
    "probabilities": ("sparse_categorical_crossentropy", "softmax", lambda p: np.diag(1 / p), 1),
    "binary": (keras.losses.BinaryCrossentropy(from_logits=True), None, lambda z: np.diag(sig(z) * (1 - sig(z))), 3),
    "binary-probabilities": ("binary_crossentropy", "sigmoid", lambda p: np.diag(1 / (p * (1 - p))), 3),
    "squares": ("mse", None, lambda z: 2.0 * np.eye(3), 3),
}


def sig(z):
    return 1 / (1 + np.exp(-z))


def mean_product(backend, of, targets, x, weight):
    """The mean outer product of the rows for all signs, (d, d)."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=BATCH * CLASSES)), "float32")
    signs = signs.reshape(-1, BATCH, CLASSES)
    number = len(signs)
    sampler = backend.sampler(of, of.model, [t.variable for t in targets])
    batch = (
        np.repeat(x[None], number, 0),
        signs,
        keras.tree.map_structure(lambda w: np.repeat(w[None], number, 0), weight),
    )
    with of.sampling_mode():
        rows = sampler(*of.values(), batch)
    grads = np.concatenate([t.flatten(np.asarray(r)) for t, r in zip(targets, rows, strict=True)], 1).astype(np.float64)
    return grads.T @ grads / number


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_all_signs_is_the_gauss_newton_matrix(backend, kind):
    loss, activation, second, terms = KINDS[kind]
    model = small_model(activation)
    model.compile(loss=loss)
    targets = find_targets(model, "__ALL_PRUNABLE__", ())
    x = np.random.default_rng(0).normal(size=(BATCH, 4)).astype("float32")
    weight = np.array([1.0, 2.5], "float32")
    j = jacobian(model, targets, x)
    z = np.asarray(keras.ops.convert_to_numpy(model(x)), np.float64)
    truth = sum(w * a.T @ second(o) @ a for w, a, o in zip(weight, j, z, strict=True)) / (BATCH * terms)
    found = mean_product(backend, GaussNewtonLoss(model, targets), targets, x, weight)
    np.testing.assert_allclose(found, truth, rtol=2e-4, atol=2e-6 * np.abs(truth).max())


def of_shares(p):
    """The curvature of `-sum_c y_c log(p_c / sum p)` where y is p's shares."""
    return np.diag(1 / (p * p.sum())) - 1 / p.sum() ** 2


SUMS = {
    "logits": ({"from_logits": True}, None, of_softmax),
    "smoothed": ({"from_logits": True, "label_smoothing": 0.2}, None, of_softmax),
    "probabilities": ({}, "softmax", lambda p: np.diag(1 / p)),
    "shares": ({}, "sigmoid", of_shares),
}


@pytest.mark.parametrize("kind", SUMS)
def test_one_hot_labels_weigh_by_their_sum(backend, kind):
    settings, activation, second = SUMS[kind]
    model = small_model(activation)
    model.compile(loss=keras.losses.CategoricalCrossentropy(**settings))
    targets = find_targets(model, "__ALL_PRUNABLE__", ())
    of = GaussNewtonLoss(model, targets)
    x = np.random.default_rng(0).normal(size=(BATCH, 4)).astype("float32")
    weight = np.array([1.0, 2.5], "float32")
    j = jacobian(model, targets, x)
    z = np.asarray(keras.ops.convert_to_numpy(model(x)), np.float64)
    for labels in ([[0, 0, 0], [0, 1, 0]], [[1, 0, 1], [0.5, 0.0, 0.0]]):
        y = np.array(labels, "float32")
        smoothing = settings.get("label_smoothing", 0.0)
        sums = y.sum(-1) * (1 - smoothing) + smoothing
        truth = sum(s * w * a.T @ second(o) @ a for s, w, a, o in zip(sums, weight, j, z, strict=True)) / BATCH
        _, _, factors = of.signs(0)((x[None], y[None], weight[None]))
        found = mean_product(backend, of, targets, x, take(factors, 0))
        np.testing.assert_allclose(found, truth, rtol=2e-4, atol=2e-6 * np.abs(truth).max())


def test_labels_of_a_negative_sum_are_refused_before_anything_is_sampled():
    model = small_model(None)
    model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    y = np.eye(CLASSES, dtype="float32")[np.arange(8) % CLASSES]
    y[5] = -1
    with pytest.raises(ValueError, match=r"sum over the classes isn't negative, got -3\. Give zeros"):
        kw.prune(model, (np.ones((8, 4), "float32"), y), 0.5, fisher="ggn", num_grads=2, grad_batch_size=1, verbose=0)


def samples(backend, model, batch):
    """The rows for a batch whose labels are signs, in weight order."""
    targets = find_targets(model, "__ALL_PRUNABLE__", ())
    of = GaussNewtonLoss(model, targets)
    sampler = backend.sampler(of, model, [t.variable for t in targets])
    with of.sampling_mode():
        rows = sampler(*of.values(), batch)
    return np.concatenate([t.flatten(np.asarray(r)) for t, r in zip(targets, rows, strict=True)], 1)


@pytest.mark.parametrize("loss", [keras.losses.MeanSquaredError, keras.losses.BinaryCrossentropy])
def test_a_sum_over_examples_is_so_many_times_their_mean(backend, loss):
    model = small_model("sigmoid")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    batch = (x, np.sign(rng.normal(size=(2, 5, CLASSES))).astype("float32"), None)
    rows = {}
    for reduction in ("sum", "sum_over_batch_size"):
        model.compile(loss=loss(reduction=reduction))
        rows[reduction] = samples(backend, model, batch)
    mean = np.sqrt(5.0) * rows["sum_over_batch_size"]
    # GPUs add in another order: small entries, of which most cancels, have fewer digits.
    np.testing.assert_allclose(rows["sum"], mean, rtol=1e-5, atol=1e-6 * np.abs(mean).max())


def test_what_a_mask_hides_has_no_curvature(backend):
    model = keras.Sequential(
        [
            keras.layers.Input((None,), dtype="int32"),
            keras.layers.Embedding(7, 4, mask_zero=True),
            keras.layers.Dense(CLASSES),
        ]
    )
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 7, (1, 1, 6)).astype("int32")
    signs = np.sign(rng.normal(size=(1, 1, 6, CLASSES))).astype("float32")
    # Keras's mean is over what isn't hidden: padding changes nothing.
    padded = tokens.copy()
    padded[..., 4:] = 0
    short = samples(backend, model, (tokens[..., :4], signs[..., :4, :], None))
    found = samples(backend, model, (padded, signs, None))
    np.testing.assert_allclose(found, short, rtol=1e-4, atol=1e-6 * np.abs(short).max())
    assert not np.allclose(samples(backend, model, (tokens, signs, None)), found, rtol=1e-2)


def test_weights_of_examples_may_come_in_a_dictionary(backend):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"out": keras.layers.Dense(CLASSES, name="out")(inputs)})
    model.compile(loss={"out": keras.losses.SparseCategoricalCrossentropy(from_logits=True)})
    rng = np.random.default_rng(0)
    x, signs = rng.normal(size=(2, 3, 4)).astype("float32"), np.ones((2, 3, CLASSES), "float32")
    signs[..., 0] = -1.0
    weight = rng.uniform(1.0, 2.0, (2, 3)).astype("float32")
    plain = samples(backend, model, (x, signs, weight))
    np.testing.assert_array_equal(samples(backend, model, (x, signs, {"out": weight})), plain)
    assert not np.allclose(samples(backend, model, (x, signs, None)), plain, rtol=1e-2)


def test_a_group_gets_the_same_signs_however_groups_are_cut():
    model = small_model(None)
    model.compile(loss="mse")
    of = GaussNewtonLoss(model, find_targets(model, "__ALL_PRUNABLE__", ()))
    x, y = np.ones((6, 1, 4), "float32"), np.zeros((6, 1, 3), "float32")
    whole = of.signs(5)((x, y, None))[1]
    parts = of.signs(5)
    cut = [parts((x[part], y[part], None))[1] for part in (slice(0, 1), slice(1, 4), slice(4, 6))]
    np.testing.assert_array_equal(np.concatenate(cut), whole)
    assert set(whole.ravel()) == {-1.0, 1.0} and whole.dtype == np.float32


def test_several_outputs_are_told_before_anything_is_sampled():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x):
            return self.dense(x), self.dense(x)

    model = Two()
    model.compile(loss="mse")
    x, y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")
    model(x)
    with pytest.raises(ValueError, match="needs a model with one output, got 2"):
        kw.prune(model, (x, (y, y)), 0.5, num_grads=2, grad_batch_size=1, calibration=2, verbose=0)
