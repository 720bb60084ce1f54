"""Weights that go while steps are taken: how many, which, and which never."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_woodfisher.oneshot.reconstruction.removal import Removal
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner


def _pruner(**options):
    model = keras.Sequential([layers.Input((6, 6, 4)), layers.Conv2D(8, 3), layers.Flatten(), layers.Dense(5)])
    return Pruner(model, PruningOptions.of(verbose=0, **options))


def _state(pruner, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [tuple(target.variable.shape) for target in pruner.targets]
    values = [rng.normal(size=shape) for shape in shapes]
    return values, [rng.uniform(0.1, 2.0, shape) for shape in shapes], [np.ones(shape, bool) for shape in shapes]


def _zeros(kept):
    return sum(int((~k).sum()) for k in kept) / sum(k.size for k in kept)


def _walk(removal, state, steps):
    values, squares, kept = state
    found = []
    for step in range(1, steps + 1):
        if (progress := removal.progress(step, steps)) is not None:
            before, kept = kept, removal.kept(values, squares, kept, progress)
            assert all((b | ~k).all() for b, k in zip(before, kept, strict=True))
            found.append((step, _zeros(kept)))
    return kept, found


@pytest.mark.parametrize("steps", [1, 7, 100, 256])
def test_what_is_to_go_is_gone_after_three_quarters_of_the_steps(steps):
    pruner = _pruner()
    _, found = _walk(Removal(pruner, [0.4, 0.4], [0.8, 0.8]), _state(pruner), steps)
    last = max(1, round(0.75 * steps))
    assert found[-1][0] == last and found[-1][1] == pytest.approx(0.8, abs=1e-3)
    for step, zeros in found:
        assert zeros == pytest.approx(0.8 - 0.4 * (1 - step / last) ** 3, abs=2e-3)


def test_the_least_worth_goes_first():
    pruner = _pruner()
    values, squares, kept = _state(pruner)
    (kept,) = (Removal(pruner, [0.0, 0.0], [0.5, 0.5]).kept(values, squares, kept, 1.0),)
    worth = np.concatenate([(np.square(v) * s).ravel() for v, s in zip(values, squares, strict=True)])
    left = np.concatenate([k.ravel() for k in kept])
    assert worth[left].min() >= worth[~left].max()


def test_each_variable_keeps_its_part():
    pruner = _pruner()
    values, squares, kept = _state(pruner)
    values[0] *= 1e-6
    kept = Removal(pruner, [0.0, 0.0], [0.8, 0.8]).kept(values, squares, kept, 1.0)
    assert kept[0].sum() == int(0.25 * 0.2 * kept[0].size)
    assert _zeros(kept) == pytest.approx(0.8, abs=1e-3)


def test_each_variable_reaches_a_sparsity_of_its_own():
    pruner = _pruner(global_sparsity=False)
    kept, _ = _walk(Removal(pruner, [0.2, 0.6], [0.5, 0.9]), _state(pruner), 64)
    assert [float((~k).mean()) for k in kept] == pytest.approx([0.5, 0.9], abs=2e-3)


def test_groups_go_as_a_whole():
    pruner = _pruner(mask_type="filter", params=["re:.*conv.*kernel"])
    kept, _ = _walk(Removal(pruner, [0.25], [0.5]), _state(pruner), 64)
    whole = kept[0].reshape(-1, 8)
    assert ((whole.sum(0) == 0) | (whole.sum(0) == len(whole))).all() and _zeros(kept) == 0.5
