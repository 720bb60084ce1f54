"""The gradient of the mean loss at given weights, against plain autodiff."""

import keras
import numpy as np
import pytest
from autodiff import plain_gradients
from sampling import source_of

from keras_woodfisher.gradients.loss import mean_loss

EXAMPLES = 24


def problem():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((5,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(2)])
    model.compile(loss="mse")
    rng = np.random.default_rng(0)
    return model, (rng.normal(size=(EXAMPLES, 5)).astype("float32"), rng.normal(size=(EXAMPLES, 2)).astype("float32"))


def truth_at(model, targets, weights, kept, data):
    """All examples are used, so their order is irrelevant."""
    before = [target.read() for target in targets]
    starts = np.cumsum([0, *(target.size for target in targets)])
    try:
        for target, start in zip(targets, starts[:-1], strict=True):
            target.write(weights[start : start + target.size])
        of = plain_gradients(model, [t.variable for t in targets], lambda z, y: keras.ops.mean((z - y) ** 2))
        rows = [t.flatten(np.asarray(g, np.float64)) for t, g in zip(targets, of(*data), strict=True)]
    finally:
        for target, values in zip(targets, before, strict=True):
            target.write(values)
    return np.concatenate([row[mask] for row, mask in zip(rows, kept, strict=True)])


@pytest.mark.parametrize("size, b", [(8, 1), (6, 2), (96, 4)])
def test_it_is_that_of_the_given_weights(backend, size, b):
    model, data = problem()
    source, targets = source_of(backend, model, data, 4, b=b)
    rng = np.random.default_rng(1)
    kept = [rng.random(target.size) < 0.7 for target in targets]
    weights = rng.normal(size=sum(target.size for target in targets)).astype("float32")
    before = model.get_weights()
    found, examples = source.mean_gradient(weights, kept, 0, 0, size)
    assert examples == len(data[0])
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_allclose(found, truth_at(model, targets, weights, kept, data), rtol=1e-4, atol=1e-6)


def test_fewer_at_a_time_where_memory_is_full(backend, monkeypatch):
    model, data = problem()
    source, targets = source_of(backend, model, data, 4)
    kept = [np.ones(target.size, bool) for target in targets]
    weights = np.concatenate([target.read() for target in targets])
    sampler, sizes = source._sampler_of(source.loss), []
    plain = sampler.sampler

    def small(values, others, batch):
        sizes.append(batch[0].shape[1])
        if sizes[-1] > 6:
            raise FULL
        return plain(values, others, batch)

    FULL = RuntimeError("full")
    monkeypatch.setattr(type(backend), "is_out_of_memory", lambda self, error: error is FULL)
    monkeypatch.setattr(sampler, "sampler", small)
    found, examples = source.mean_gradient(weights, kept, 0, 0, 24)
    assert examples == len(data[0])
    assert sizes[:3] == [24, 12, 6]
    np.testing.assert_allclose(found, truth_at(model, targets, weights, kept, data), rtol=1e-4, atol=1e-6)


def test_streams_whose_batches_differ_in_shape(backend):
    """No group of many examples of one shape ever forms: fewer are taken at a time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Input((None, 5)), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2)]
    )
    model.compile(loss="mse")
    rng = np.random.default_rng(0)
    lengths = [3, 4] * 3
    data = [(rng.normal(size=(4, n, 5)).astype("float32"), rng.normal(size=(4, 2)).astype("float32")) for n in lengths]
    source, targets = source_of(backend, model, lambda: data, 2, b=1)
    kept = [np.ones(target.size, bool) for target in targets]
    weights = np.concatenate([target.read() for target in targets])
    found, examples = source.mean_gradient(weights, kept, 0, 0, 16)
    assert examples == EXAMPLES
    truth = np.mean([truth_at(model, targets, weights, kept, part) for part in data], axis=0)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [4, 24])
def test_of_a_sum_over_examples_it_is_their_mean_too(backend, size):
    model, data = problem()
    model.compile(loss=keras.losses.MeanSquaredError(reduction="sum"))
    source, targets = source_of(backend, model, data, 4)
    kept = [np.ones(target.size, bool) for target in targets]
    weights = np.concatenate([target.read() for target in targets])
    found, _ = source.mean_gradient(weights, kept, 0, 0, size)
    np.testing.assert_allclose(found, truth_at(model, targets, weights, kept, data), rtol=1e-4, atol=1e-6)
    batches = [(data[0][:5], data[1][:5]), (data[0][5:], data[1][5:])]
    whole = mean_loss(model, [(*data, None)])
    assert mean_loss(model, [(*batch, None) for batch in batches]) == pytest.approx(whole, rel=1e-5)
    model.compile(loss="mse")
    assert mean_loss(model, [(*data, None)]) == pytest.approx(whole, rel=1e-5)
