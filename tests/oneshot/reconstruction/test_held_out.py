"""The distance of outputs: never less than nothing, and that of its definition."""

import keras
import numpy as np
import pytest
from keras import layers
from keras_woodfisher_backends.keras_internals.graphs import sigmoid_outputs

from keras_woodfisher.oneshot.reconstruction.held_out import output_distance


@pytest.mark.parametrize("columns", [1, 3])
def test_rounding_makes_no_distance_negative(columns):
    dense = np.full((4, columns), 1.0 / max(2, columns))
    assert output_distance(dense, dense * (1 + 1e-6)) >= 0.0
    assert output_distance(dense, dense) == 0.0


def test_probabilities_are_compared_by_their_divergence():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), 50), rng.dirichlet(np.ones(4), 50)
    assert output_distance(p, q) == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-4)


@pytest.mark.once
def test_probabilities_may_be_nothing_or_all():
    classes, found = np.eye(3)[[0, 1, 2, 2]], np.full((4, 3), 1 / 3)
    assert output_distance(classes, found) == pytest.approx(np.log(3.0), rel=1e-4)
    assert output_distance(classes[:, :1], found[:, :1], binary=True) == pytest.approx(
        (np.log(3.0) + 3.0 * np.log(1.5)) / 4, rel=1e-4
    )


@pytest.mark.parametrize("columns", [1, 3])
def test_what_is_not_finite_is_not_near(columns):
    dense = np.full((4, columns), 1.0 / max(2, columns))
    assert not np.isfinite(output_distance(dense, np.full((4, columns), np.nan)))


def test_numbers_within_zero_and_one_are_probabilities_only_where_a_sigmoid_gives_them():
    rng = np.random.default_rng(0)
    dense, pruned = rng.uniform(0.1, 0.9, (2, 50, 3))
    error = np.square(pruned - dense).mean() / np.square(dense - dense.mean(0)).mean()
    assert output_distance(dense, pruned) == pytest.approx(error)
    assert output_distance(dense + 1.0, pruned + 1.0) == pytest.approx(error)
    divergence = dense * np.log(dense / pruned) + (1 - dense) * np.log((1 - dense) / (1 - pruned))
    assert output_distance(dense, pruned, binary=True) == pytest.approx(divergence.sum(1).mean())


def test_which_outputs_come_out_of_a_sigmoid():
    inputs = layers.Input((4,))
    inner = keras.Sequential([layers.Input((4,)), layers.Dense(2, "sigmoid")])
    outputs = [layers.Dense(1, "sigmoid")(inputs), layers.Dense(1)(inputs), inner(inputs)]
    outputs += [layers.Activation("sigmoid")(outputs[1])]
    assert sigmoid_outputs(keras.Model(inputs, outputs)) == [True, False, True, True]
    assert sigmoid_outputs(inner) == [True] and sigmoid_outputs(keras.Model()) == []


@pytest.mark.parametrize("ruled_out", [-np.inf, -1e9])
def test_what_is_ruled_out_in_both_does_not_count(ruled_out):
    rng = np.random.default_rng(1)
    dense, pruned = rng.normal(size=(2, 60, 3))
    wanted = output_distance(dense[:, :2], pruned[:, :2])
    dense[:, 2] = pruned[:, 2] = ruled_out
    assert output_distance(dense, pruned) == pytest.approx(wanted)
    pruned[0, 2] = 0.0
    assert output_distance(dense, pruned) > 1e3
