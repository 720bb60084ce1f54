"""What is chosen by the loss on held-out examples."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_woodfisher.gradients.loss import MeanLoss, ModelLoss
from keras_woodfisher.model.targets import find_targets
from keras_woodfisher.pruning.calibration import HeldOutLoss, best_of, longest_that_helps

CHANGES = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]], np.float32)


def losses(table):
    """Those of a table, by change; what isn't there must not be asked for."""
    return lambda change: table[float(change[0])]


def test_the_best_of_all():
    assert best_of(CHANGES[:3], losses({1: 4.0, 2: 3.0, 3: 3.5}), 5.0) == (1, 3.0)
    assert best_of(CHANGES[:3], losses({1: 4.0, 2: np.inf, 3: 5.0}), 4.0) == (None, 4.0)


def test_steps_become_longer_while_that_helps():
    assert longest_that_helps(CHANGES, losses({1: 4.0, 3: 3.0, 5: 2.0, 4: 2.5}), 5.0) == (4, 2.0)
    assert longest_that_helps(CHANGES, losses({1: 4.0, 3: 4.5, 2: 3.9}), 5.0) == (1, 3.9)
    assert longest_that_helps(CHANGES, losses({1: 4.0, 3: 3.0, 5: 3.5, 2: 3.4, 4: 2.9}), 5.0) == (3, 2.9)
    # Of equal ones that which was found first.
    assert longest_that_helps(CHANGES, losses({1: 4.0, 3: 3.0, 5: 3.0, 2: 3.0, 4: 3.0}), 5.0) == (2, 3.0)


def test_no_step_where_the_shortest_does_not_help():
    assert longest_that_helps(CHANGES, losses({1: 5.0}), 5.0) == (None, 5.0)


def test_from_a_likely_step_the_search_goes_downhill():
    assert longest_that_helps(CHANGES, losses({3: 3.0, 4: 2.0, 5: 2.5}), 5.0, start=2) == (3, 2.0)
    assert longest_that_helps(CHANGES, losses({3: 3.0, 4: 3.5, 2: 2.0, 1: 2.5}), 5.0, start=2) == (1, 2.0)
    assert longest_that_helps(CHANGES, losses({3: 3.0, 4: 3.5, 2: 3.2}), 5.0, start=2) == (2, 3.0)
    assert longest_that_helps(CHANGES, losses({5: 3.0, 4: 3.5}), 5.0, start=4) == (4, 3.0)
    assert longest_that_helps(CHANGES, losses({1: 3.0, 2: 3.5}), 5.0, start=0) == (0, 3.0)


def test_from_a_step_that_is_too_long_the_search_goes_to_the_shortest():
    assert longest_that_helps(CHANGES, losses({4: 9.0, 3: 8.0, 2: 4.0, 1: 4.5}), 5.0, start=3) == (1, 4.0)
    assert longest_that_helps(CHANGES, losses({3: 9.0, 2: 5.0, 1: 5.0}), 5.0, start=2) == (None, 5.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_held_out_loss_is_that_of_the_model_with_those_weights(backend, weighted):
    rng = np.random.default_rng(0)
    model = keras.Sequential([layers.Input((5,)), layers.Dense(6, "relu"), layers.Dropout(0.5), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    targets = find_targets(model, "__ALL_PRUNABLE__")
    x, y = rng.normal(size=(20, 5)).astype("float32"), rng.integers(0, 3, 20).astype("int32")
    weight = rng.random(20).astype("float32") if weighted else None
    batches = [(x[part], y[part], weight[part] if weighted else None) for part in (slice(0, 12), slice(12, 20))]
    held_out = HeldOutLoss(MeanLoss(ModelLoss(model, targets), backend.compiled), targets, batches)
    before = model.get_weights()
    other = rng.normal(size=sum(t.size for t in targets)).astype("float32")
    found = held_out(other, 5)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    start = 0
    for target in targets:
        target.write(other[start : start + target.size])
        start += target.size
    logits = keras.ops.convert_to_numpy(model(x, training=False)).astype(np.float64)
    each = np.log(np.exp(logits).sum(1)) - logits[np.arange(20), y]
    np.testing.assert_allclose(found, np.mean(each * (weight if weighted else 1.0)), rtol=1e-5)
    assert held_out(np.full_like(other, np.nan), 20) == np.inf
