"""Where SparseML's behaviour was a defect: each row of the list, with its own numbers, and what happens here."""

import warnings
from itertools import pairwise

import keras
import numpy as np
import pytest
from keras import ops

import keras_woodfisher as kw


def magnitude(**fields):
    known = {
        "params": "__ALL_PRUNABLE__",
        "init_sparsity": 0.0,
        "final_sparsity": 0.8,
        "start_epoch": 0.0,
        "end_epoch": 3.0,
        "update_frequency": 1.0,
    }
    return kw.load_recipe({"modifiers": [{"GMPruningModifier": known | fields}]})


class Seen(keras.callbacks.Callback):
    """The sparsity after each batch, at each validation, and in each checkpoint's place at an epoch's end."""

    def __init__(self):
        super().__init__()
        self.batches, self.validated, self.epochs = [], [], []

    def _sparsity(self):
        return round(kw.sparsity_report(self.model).sparsity, 3)

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(self._sparsity())

    def on_test_begin(self, logs=None):
        self.validated.append(self._sparsity())

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(self._sparsity())


def run(model, data, recipe, steps=3, epochs=None, others=(), **kwargs):
    seen = Seen()
    x, y = (part[: steps * 16] for part in data)
    callbacks = [*recipe.callbacks(model, verbose=0), seen, *others]
    model.fit(x, y, batch_size=16, epochs=epochs or recipe.epochs, verbose=0, callbacks=callbacks, **kwargs)
    return seen


@pytest.fixture
def model(make_mlp):
    return make_mlp(keras.optimizers.SGD(0.05))


@pytest.mark.parametrize(("end_epoch", "before"), [(2.0, 0.7), (3.0, 0.77)])
def test_final_sparsity_is_reached_in_exactly_end_epoch_epochs(model, blobs, tmp_path, end_epoch, before):
    # SparseML ended at 0.703: its last update fell on the first batch of an epoch that never came.
    recipe, path = magnitude(end_epoch=end_epoch), tmp_path / "last.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    seen = run(model, blobs, recipe, validation_data=blobs, others=[checkpoint])
    assert seen.batches[-2] == pytest.approx(before, abs=0.003)
    assert (seen.validated[-1], seen.epochs[-1]) == (0.8, 0.8)
    model.load_weights(path)
    assert round(kw.sparsity_report(model).sparsity, 3) == 0.8


def test_the_grid_is_fixed(model, blobs):
    # Half an epoch of 3 steps: SparseML updated every 2 steps, and so at 0, 2/3, 4/3, 2, ... epochs.
    recipe = magnitude(update_frequency=0.5, end_epoch=2.0, inter_func="linear")
    seen = run(model, blobs, recipe)
    assert seen.batches == [0, 0, 0.2, 0.4, 0.4, 0.8]
    plan = kw.check_recipe(recipe, model, steps_per_epoch=3).modifiers[0].updates
    assert [(u.position, u.epoch, u.step) for u in plan] == [(0, 0, 0), (0.5, 0, 2), (1, 1, 0), (1.5, 1, 2), (2, 1, 3)]


def test_one_step_an_epoch(model, blobs):
    seen = run(model, blobs, magnitude(inter_func="linear", end_epoch=4.0), steps=1)
    assert seen.epochs == [0, 0.2, 0.4, 0.8]


def test_start_is_end(model, blobs):
    # SparseML divided by zero.
    recipe = magnitude(start_epoch=1.0, end_epoch=1.0, init_sparsity=0.3)
    seen = run(model, blobs, recipe, epochs=2)
    assert seen.epochs == [0, 0.8]
    assert [(u.position, u.sparsity) for u in kw.check_recipe(recipe, model).modifiers[0].updates] == [(1, 0.8)]


@pytest.mark.parametrize("value", [1.5, -0.5, 1, 1.0])
def test_what_is_no_fraction_is_refused(value):
    # SparseML took 1.5 and -0.5 for 0.0, and crashed on 1.
    with pytest.raises(kw.RecipeError, match=r"final_sparsity must lie in \[0, 1\), got"):
        magnitude(final_sparsity=value)


def test_a_buffer_that_can_not_be_full_is_found_out_before_training(model, blobs):
    fields = {"num_grads": 64, "start_epoch": 4, "end_epoch": 8, "init_sparsity": 0.1}
    known = {"params": "__ALL__", "final_sparsity": 0.8, "update_frequency": 1.0}
    recipe = kw.load_recipe({"modifiers": [{"MFACPruningModifier": known | fields}]})
    message = "num_grads=64 gradients can't have been buffered by the update at epoch 4: only 12 steps .*num_grads=12"
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        run(model, blobs, recipe)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    (problem,) = kw.check_recipe(recipe, model, steps_per_epoch=3).problems
    assert "num_grads=12 would fit" in problem.message
    assert not kw.check_recipe(recipe, model, steps_per_epoch=16).problems


@pytest.mark.parametrize("mask", ["2:4", "unstructured"])
def test_once_pruned_stays_pruned(model, blobs, mask):
    # With second-order scores of N:M masks SparseML turned the mask around.
    fields = {"init_sparsity": 0.1, "final_sparsity": 0.5, "start_epoch": 0, "end_epoch": 2}
    known = {"params": "__ALL_PRUNABLE__", "update_frequency": 0.5, "num_grads": 16}
    recipe = kw.load_recipe({"modifiers": [{"MFACPruningModifier": known | fields | {"mask_type": mask}}]})
    zero = []

    class Masks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            zero.append([ops.convert_to_numpy(layer.kernel) == 0 for layer in self.model.layers])

    model.fit(
        *blobs, batch_size=24, epochs=2, verbose=0, callbacks=[*recipe.callbacks(model, blobs, verbose=0), Masks()]
    )
    for before, after in pairwise(zero):
        assert not any((b & ~a).any() for b, a in zip(before, after, strict=True))
    assert kw.sparsity_report(model).sparsity == 0.5


def test_resuming_is_exact(make_mlp, blobs):
    recipe = magnitude(end_epoch=4.0, update_frequency=0.5)
    whole, parts = make_mlp(keras.optimizers.SGD(0.05)), make_mlp(keras.optimizers.SGD(0.05))
    parts.set_weights(whole.get_weights())
    run(whole, blobs, recipe, shuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, y = (part[:48] for part in blobs)
        # Stopped after two of four epochs, and taken up again.
        stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda e, _: setattr(parts, "stop_training", e == 1))
        settings = {"batch_size": 16, "epochs": 4, "verbose": 0, "shuffle": False}
        parts.fit(x, y, callbacks=[*recipe.callbacks(parts, verbose=0), stop], **settings)
    assert 0.5 < kw.sparsity_report(parts).sparsity < 0.8
    run(parts, blobs, recipe, initial_epoch=2, shuffle=False)
    for a, b in zip(whole.get_weights(), parts.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert kw.sparsity_report(parts).pruned == kw.sparsity_report(whole).pruned == 192


def test_tied_and_frozen_weights(blobs):
    inputs = keras.Input((12,))
    shared, frozen = keras.layers.Dense(12, name="shared"), keras.layers.Dense(12, name="frozen", trainable=False)
    model = keras.Model(inputs, keras.layers.Dense(3, name="out")(frozen(shared(shared(inputs)))))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = ops.convert_to_numpy(frozen.kernel)
    with pytest.warns(UserWarning, match="Frozen variables are left as they are: frozen/kernel"):
        run(model, blobs, magnitude(end_epoch=1.0))
    # SparseML counted the tied weight twice, and crashed on the frozen one.
    found = {v.name.split("/")[-2]: (v.weights, v.pruned) for v in kw.sparsity_report(model).variables}
    assert found == {"shared": (144, 115), "frozen": (144, 0), "out": (36, 29)}
    np.testing.assert_array_equal(ops.convert_to_numpy(frozen.kernel), before)
