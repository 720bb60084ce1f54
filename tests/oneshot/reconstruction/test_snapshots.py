"""Passes that go on where the one before ended: the same kernels, in fewer calls of layers."""

import dataclasses
from functools import cache

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.oneshot.reconstruction import layerwise, walk
from keras_woodfisher.oneshot.reconstruction.snapshots import amid_bytes

RNG = np.random.default_rng(0)
NUMBERS = RNG.normal(size=(60, 8)).astype("float32")
IMAGES = RNG.normal(size=(60, 8, 8, 3)).astype("float32")
TOKENS = RNG.integers(1, 20, (60, 6)).astype("int32")
TOKENS[:, 4:] = 0


def chain():
    """Shortcuts, dropout, and a model within."""
    inputs = layers.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", activation="relu")(inputs)
    for _ in range(2):
        branch = layers.Conv2D(6, 3, padding="same", use_bias=False)(layers.Dropout(0.1)(x))
        x = layers.Add()([x, layers.BatchNormalization(gamma_initializer="he_normal")(branch)])
    inner = keras.Sequential([layers.Input((8, 8, 6)), layers.Conv2D(6, 3), layers.Conv2D(5, 3, strides=2)])
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(inner(x)))), IMAGES


def masked():
    """What is padding is told by a mask, which a pass that begins amid the model wouldn't see."""
    inputs = layers.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True)(inputs)
    for _ in range(2):
        x = layers.Dense(8, activation="gelu")(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x))), TOKENS


def noisy():
    """Numbers that are drawn depend on what was drawn before."""

    class Noise(layers.Layer):
        def __init__(self):
            super().__init__()
            self.seed_generator = keras.random.SeedGenerator(0)

        def call(self, x):
            return x + 0.1 * keras.random.normal(keras.ops.shape(x), seed=self.seed_generator)

    parts = [layers.Dense(8, "relu"), Noise(), layers.Dense(8, "relu"), layers.Dense(3)]
    return keras.Sequential([layers.Input((8,)), *parts]), NUMBERS


@cache
def pruned(made, together, room):
    """Weights, and the number of layers' calls, with so many examples at a time and that much room between passes."""
    keras.utils.set_random_seed(0)
    (model, x), calls = made(), []
    planned, call = layerwise.plan_chunks, walk.Walk._side_by_side

    def plan(examples, *rest):
        whole = planned(examples, *rest)
        return dataclasses.replace(whole, chunk=20, chunks=-(-examples // 20), together=together, room=room)

    def counted(self, layer, *rest):
        calls.append(layer)
        return call(self, layer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise, "plan_chunks", plan)
        patch.setattr(walk.Walk, "_side_by_side", counted)
        kw.prune(model, x, 0.5, quality="fast", method="reconstruct", seed=0, verbose=0)
    return model.get_weights(), len(calls)


@pytest.mark.parametrize(("made", "together"), [(chain, 1), (chain, 3), (masked, 1), (noisy, 1)])
def test_what_a_pass_leaves_to_the_next_one_changes_nothing(made, together):
    anew, often = pruned(made, together, 0)
    went_on, seldom = pruned(made, together, 10**9)
    for one, other in zip(anew, went_on, strict=True):
        np.testing.assert_array_equal(one, other)
    assert seldom < 0.7 * often if (made, together) == (chain, 1) else seldom <= often


def test_only_what_fits_is_kept():
    anew, often = pruned(chain, 1, 0)
    counts = []
    # 54 examples of both sides: of 8 x 8 x 6 numbers at most places, and twice as many amid a shortcut.
    for numbers in (6 * 64 - 1, 6 * 64, 2 * 6 * 64):
        weights, calls = pruned(chain, 1, 2 * 4 * 54 * numbers)
        counts.append(calls)
        for one, other in zip(anew, weights, strict=True):
            np.testing.assert_array_equal(one, other)
    assert often == counts[0] > counts[1] > counts[2]


def test_bytes_between_two_calls():
    model, _ = chain()
    # Images, the first convolution's output, twice a shortcut beside a branch and their sum, the rest.
    sizes = [3 * 64, 6 * 64, *[2 * 6 * 64] * 3, 6 * 64, *[2 * 6 * 64] * 3, 6 * 64, 20, 20]
    assert amid_bytes(model) == 4 * np.median(sizes)
    assert amid_bytes(keras.Sequential([layers.Input((None, 3)), layers.Dense(4), layers.Dense(2)])) == 0

    class Own(keras.Model):
        def call(self, x):
            return x

    own = Own()
    own(IMAGES[:1])
    assert amid_bytes(own) == 0
