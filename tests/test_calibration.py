"""What is chosen by the loss on held-out examples."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_woodfisher.calibration import HeldOutLoss, calibrate
from keras_woodfisher.gradients import ModelLoss
from keras_woodfisher.targets import find_targets

COMPENSATIONS, STEPS = [0.1, 0.01], [100.0, 10.0, 1.0]
CHANGES = np.array([[1.0, 0.0], [2.0, 0.0]], np.float32), np.array([[0, 1.0], [0, 2.0], [0, 3.0]], np.float32)


def choose(losses):
    """With a table of losses by change; those that aren't there must not be asked for."""
    return calibrate(CHANGES, lambda change: losses[tuple(change.tolist())], (COMPENSATIONS, STEPS))


def test_the_best_compensation_and_the_longest_step_that_helps():
    losses = {(0, 0): 5.0, (1, 0): 4.0, (2, 0): 3.0, (2, 1): 2.5, (2, 2): 2.0, (2, 3): 2.1}
    change, report = choose(losses)
    assert change.tolist() == [2.0, 2.0]
    assert (report.compensation, report.step) == (0.01, 10.0)
    assert (report.loss_removed, report.loss) == (5.0, 2.0)


def test_steps_end_where_they_no_longer_help():
    change, report = choose({(0, 0): 5.0, (1, 0): 4.0, (2, 0): 6.0, (1, 1): 4.0})
    assert change.tolist() == [1.0, 0.0]
    assert (report.compensation, report.step, report.loss) == (0.1, None, 4.0)


def test_nothing_is_changed_where_nothing_helps():
    change, report = choose({(0, 0): 5.0, (1, 0): 5.0, (2, 0): np.inf, (0, 1): 5.0})
    assert change.tolist() == [0.0, 0.0]
    assert (report.compensation, report.step, report.loss) == (None, None, 5.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_held_out_loss_is_that_of_the_model_with_those_weights(weighted):
    rng = np.random.default_rng(0)
    model = keras.Sequential([layers.Input((5,)), layers.Dense(6, "relu"), layers.Dropout(0.5), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    targets = find_targets(model, "__ALL_PRUNABLE__")
    x, y = rng.normal(size=(20, 5)).astype("float32"), rng.integers(0, 3, 20).astype("int32")
    weight = rng.random(20).astype("float32") if weighted else None
    batches = [(x[part], y[part], weight[part] if weighted else None) for part in (slice(0, 12), slice(12, 20))]
    held_out = HeldOutLoss(ModelLoss(model, targets), targets, batches)
    before = model.get_weights()
    other = rng.normal(size=sum(t.size for t in targets)).astype("float32")
    found = held_out(other)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    start = 0
    for target in targets:
        target.write(other[start : start + target.size])
        start += target.size
    logits = keras.ops.convert_to_numpy(model(x, training=False)).astype(np.float64)
    each = np.log(np.exp(logits).sum(1)) - logits[np.arange(20), y]
    np.testing.assert_allclose(found, np.mean(each * (weight if weighted else 1.0)), rtol=1e-5)
    assert held_out(np.full_like(other, np.nan)) == np.inf
