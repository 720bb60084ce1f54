"""Several stages within one update."""

import itertools

import keras
import numpy as np
import pytest
from gathering import GivenGradients, stored
from keras import layers

from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.shrinkage import shrinkage_ridge
from keras_woodfisher.pruning.stages import StagedUpdates, stage_sparsities


def pruner_of(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((6,)), layers.Dense(10), layers.Dense(4)])
    return Pruner(model, PruningOptions(**{"damp": 1e-3, "num_grads": 8, "verbose": 0} | options))


class Drawn(GivenGradients):
    """Other gradients at each draw, and a failure at one of them."""

    def __init__(self, width, fails_at=None):
        super().__init__(np.zeros((8, width), np.float32))
        self._fails_at = fails_at

    def fill(self, store, kept, rows, draw, advance):
        if draw == self._fails_at:
            raise KeyboardInterrupt
        self.grads = np.random.default_rng(draw).normal(size=self.grads.shape).astype(np.float32)
        return super().fill(store, kept, rows, draw, advance)


@pytest.mark.parametrize("now, final, stages", [(0.0, 0.9, 14), (0.5, 0.95, 3), (0.2, 0.3, 1)])
def test_the_kept_fraction_falls_by_one_factor(now, final, stages):
    levels = [now, *stage_sparsities(now, final, stages)]
    assert levels[-1] == final and len(levels) == stages + 1
    factors = (1 - np.array(levels[1:])) / (1 - np.array(levels[:-1]))
    np.testing.assert_allclose(factors, factors[0])


def test_stages_prune_more_and_more_with_new_gradients():
    pruner = pruner_of()
    source = Drawn(100)
    masks = []

    class Watched(Drawn):
        def fill(self, store, kept, rows, draw, advance):
            masks.append(np.concatenate(kept))
            return super().fill(store, kept, rows, draw, advance)

    source = Watched(100)
    done = StagedUpdates(pruner, source, 4).update([0.8] * 2, lambda _: 8, draw=2)
    assert [draw for _, draw in source.asked] == [8, 9, 10, 11]
    assert pruner.zeros[0] + pruner.zeros[1] == 80
    assert [round(stage.sparsity, 2) for stage in done] == [0.33, 0.55, 0.7, 0.8]
    assert all(stage.samples == 8 and stage.damp == 1e-3 for stage in done)
    for earlier, later in itertools.pairwise(masks):
        assert not (later & ~earlier).any()


def test_each_variable_has_its_own_stages():
    pruner = pruner_of(global_sparsity=False)
    StagedUpdates(pruner, Drawn(100), 2).update([0.5, 0.9], lambda _: 8)
    assert pruner.zeros == [30, 36]


def test_a_failed_stage_undoes_those_before():
    pruner = pruner_of()
    before = [target.read().copy() for target in pruner.targets]
    with pytest.raises(KeyboardInterrupt):
        StagedUpdates(pruner, Drawn(100, fails_at=2), 3).update([0.8] * 2, lambda _: 8)
    for target, values in zip(pruner.targets, before, strict=True):
        np.testing.assert_array_equal(target.read(), values)
    assert pruner.zeros == [0, 0]


def test_damp_auto_shrinks_the_fisher():
    pruner = pruner_of(damp="auto")
    rng = np.random.default_rng(0)
    grads = (rng.normal(size=(8, 3)) @ rng.normal(size=(3, 100))).astype(np.float32)
    done = pruner.update([0.5] * 2, GivenGradients(grads), 8)
    blocks = [slice(0, 60), slice(60, 100)]
    assert done.damp == shrinkage_ridge(stored(grads), blocks, np.square(grads.astype(float)).mean())
