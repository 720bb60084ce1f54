"""Several stages within one update."""

import itertools

import keras
import numpy as np
import pytest
from gathering import GivenGradients, stored
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.gradients.sampling import NoUsableSamplesError, check_samples
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


class Saturated(Drawn):
    """No gradients at some draws."""

    def __init__(self, *draws):
        super().__init__(100)
        self.draws = draws

    def fill(self, store, kept, rows, draw, advance):
        if draw in self.draws:
            self.asked.append((rows, draw))
            check_samples(0, rows, rows)
        return super().fill(store, kept, rows, draw, advance)


@pytest.mark.parametrize("draw", [0, 2])
def test_without_gradients_in_a_later_stage_all_is_done_in_one(draw):
    pruner, alone, source = pruner_of(), pruner_of(), Saturated(3 * draw + 2)
    with pytest.warns(
        UserWarning, match=r"Stage 3 of 3, from sparsity 0\.6600 on, found no gradient.*saturated.*in one"
    ):
        done = StagedUpdates(pruner, source, 3).update([0.8] * 2, lambda _: 8, draw)
    assert [number for _, number in source.asked] == [3 * draw, 3 * draw + 1, 3 * draw + 2, 3 * draw]
    assert [(stage.sparsity, stage.note[:14]) for stage in done] == [(0.8, "Stage 3 of 3, ")]
    alone.update([0.8] * 2, Drawn(100), 8, 3 * draw)
    for one, other in zip(pruner.targets, alone.targets, strict=True):
        np.testing.assert_array_equal(one.read(), other.read())


def test_without_gradients_in_the_first_stage_nothing_is_done():
    pruner = pruner_of()
    with pytest.raises(NoUsableSamplesError, match="8 of 8 are zero or not finite"):
        StagedUpdates(pruner, Saturated(0), 3).update([0.8] * 2, lambda _: 8)
    assert pruner.zeros == [0, 0]


@pytest.fixture
def saturating():
    """A sigmoid of a difference of large numbers: without its smaller weights it is 1 everywhere, and flat."""
    rng = np.random.default_rng(0)
    x = 1.0 + 0.1 * rng.normal(size=(32, 1)).astype("float32") * np.ones((1, 4), "float32")
    x += 0.005 * rng.normal(size=x.shape).astype("float32")
    x[:, 2:] *= 2
    model = keras.Sequential([layers.Input((4,)), layers.Dense(1, "sigmoid", use_bias=False)])
    model.set_weights([np.array([[200.0], [210.0], [-100.0], [-105.0]], "float32")])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model, (x, (x[:, :1] > x[:, 1:2]).astype("float32"))


# Scores are squares of weights then, and nothing is corrected.
PLAIN = {"num_grads": 16, "fisher_block_size": 1, "damp": 1e9, "verbose": 0}
SATURATED = "Stage 2 of 2, from sparsity 0.5000 on, found no gradient"


def test_a_saturated_net_is_pruned_in_one_stage(saturating):
    model, data = saturating
    before = model.get_weights()
    kw.prune(model, data, 0.75, quality="fast", stages=1, **PLAIN)
    alone = model.get_weights()
    model.set_weights(before)
    with pytest.warns(UserWarning, match=SATURATED):
        report = kw.prune(model, data, 0.75, quality="fast", stages=2, **PLAIN)
    assert report.sparsity == 0.75 and report.notes[0].startswith(SATURATED)
    assert SATURATED in str(report) and report.as_dict()["stages"][0]["note"] == report.notes[0]
    np.testing.assert_array_equal(model.get_weights()[0], alone[0])


def test_a_net_that_saturates_while_it_trains(saturating):
    model, data = saturating
    pruner = kw.WoodFisherPruning(0.75, end_epoch=1, start_epoch=1, data=data, num_recomputations=2, **PLAIN)
    with pytest.warns(UserWarning, match=SATURATED):
        model.fit(*data, epochs=2, verbose=0, callbacks=[pruner])
    assert pruner.report().sparsity == 0.75 and SATURATED in pruner.report().notes[0]
    model.set_weights([np.array([[200.0], [210.0], [0.0], [-1.0]], "float32")])
    later = kw.WoodFisherPruning(0.75, end_epoch=2, start_epoch=1, data=data, **PLAIN)
    with pytest.raises(ValueError, match="The update at epoch 2: No usable gradient sample: 16 of 16"):
        model.fit(*data, epochs=3, verbose=0, callbacks=[later])
