"""Gauss-Newton samples: their mean outer product is the curvature of the loss, on each backend."""

import itertools

import keras
import numpy as np
import pytest
from autodiff import plain_gradients

from keras_woodfisher.gauss_newton import GaussNewtonLoss
from keras_woodfisher.targets import find_targets

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
    of = GaussNewtonLoss(model, targets)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=BATCH * CLASSES)), "float32")
    signs = signs.reshape(-1, BATCH, CLASSES)
    number = len(signs)
    sampler = backend.sampler(of, model, [t.variable for t in targets])
    batch = (np.repeat(x[None], number, 0), signs, np.repeat(weight[None], number, 0))
    with of.sampling_mode():
        rows = sampler(*of.values(), batch)
    grads = np.concatenate([t.flatten(np.asarray(r)) for t, r in zip(targets, rows, strict=True)], 1).astype(np.float64)
    found = grads.T @ grads / number
    np.testing.assert_allclose(found, truth, rtol=2e-4, atol=2e-6 * np.abs(truth).max())
