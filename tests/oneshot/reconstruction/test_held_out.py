"""The distance of outputs: never less than nothing, and that of its definition."""

import numpy as np
import pytest

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


@pytest.mark.parametrize("columns", [1, 3])
def test_what_is_not_finite_is_not_near(columns):
    dense = np.full((4, columns), 1.0 / max(2, columns))
    assert np.isnan(output_distance(dense, np.full((4, columns), np.nan)))
