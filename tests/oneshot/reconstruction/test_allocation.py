"""How zeros are divided among variables."""

import keras
import pytest
from keras import layers

from keras_woodfisher.oneshot.reconstruction.allocation import candidates
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner


@pytest.fixture
def pruner():
    model = keras.Sequential([layers.Input((2,)), layers.Dense(5), layers.Dense(2), layers.Dense(2)])
    return Pruner(model, PruningOptions(verbose=0))


def zeros_of(pruner, way, sparsity):
    allocation = candidates(pruner, [sparsity] * 3)[way]
    return [allocation.zeros[id(target.variable)] for target in pruner.targets]


def test_uniform_counts_are_exact_and_what_is_left_goes_to_the_largest_rest(pruner):
    assert [target.size for target in pruner.targets] == [10, 10, 4]
    # 17 of 24 stay: 7.08, 7.08 and 2.83.
    assert zeros_of(pruner, "uniform", 0.3) == [3, 3, 1]
    # 11 of 24: 4.58, 4.58 and 1.83.
    assert zeros_of(pruner, "uniform", 0.55) == [5, 6, 2]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9])
def test_every_way_removes_the_same_number(pruner, sparsity):
    total = sum(zeros_of(pruner, "magnitude", sparsity))
    for way in ("between", "uniform"):
        zeros = zeros_of(pruner, way, sparsity)
        assert sum(zeros) == total and all(0 <= z <= t.size for z, t in zip(zeros, pruner.targets, strict=True))
