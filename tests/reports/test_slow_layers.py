"""Every report of work that took gradient samples tells which layers made that slow, and why."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw

SLOW = keras.backend.backend() != "jax"  # on JAX there is one way for all


class Mixing(layers.Layer):
    """No rule knows its kernel."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 5), name="w")

    def call(self, x):
        return x @ self.w


def build(layer):
    model = keras.Sequential([keras.Input((4,)), layer, layers.Dense(2, name="head")], name="m")
    model.compile("sgd", "mse")
    return model


@pytest.fixture
def examples(rng):
    return rng.normal(size=(16, 4)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")


def by_prune(model, examples):
    return kw.prune(model, examples, 0.5, params="__ALL__", method="woodfisher", stages=2, num_grads=8, verbose=0)


def by_the_callback(model, examples):
    pruner = kw.WoodFisherPruning(0.5, end_epoch=1, data=examples, params="__ALL__", num_grads=8, verbose=0)
    model.fit(*examples, epochs=2, callbacks=[pruner], verbose=0)
    return pruner.report()


def by_a_recipe(model, examples):
    ramp = {"init_sparsity": 0.0, "final_sparsity": 0.5, "start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 1.0}
    recipe = kw.load_recipe({"modifiers": [{"MFACPruningModifier": ramp | {"params": "__ALL__", "num_grads": 8}}]})
    return recipe.apply(model, examples, verbose=0)


def by_sensitivity(model, examples):
    return kw.sensitivity(model, examples, levels=[0.5], params="__ALL__", num_grads=8, verbose=0)


@pytest.mark.parametrize("work", [by_prune, by_the_callback, by_a_recipe, by_sensitivity])
def test_slow_layers_are_told(work, examples, capsys):
    model = build(Mixing(name="mix"))
    report = work(model, examples)
    assert capsys.readouterr().out == "", "nothing is printed"
    # Once, whatever the number of stages and updates.
    assert [slow.names for slow in report.slow_layers] == ([("m/mix",)] if SLOW else [])
    assert all(slow.reason and str(slow) in str(report) for slow in report.slow_layers)
    data = report.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["slow_layers"] == [{"names": ["m/mix"], "reason": slow.reason} for slow in report.slow_layers]


def test_known_layers_are_not(examples):
    report = by_prune(build(layers.Dense(5)), examples)
    assert report.slow_layers == () and report.as_dict()["slow_layers"] == []
    assert all(stage.slow_layers is None for stage in report.stages) and len(report.stages) == 2


def test_buffered_gradients_are_never_slow(examples):
    model = build(Mixing())
    pruner = kw.WoodFisherPruning(0.5, start_epoch=1, end_epoch=1, params="__ALL__", num_grads=2, verbose=0)
    model.fit(*examples, batch_size=8, epochs=2, callbacks=[pruner], verbose=0)
    assert pruner.report().slow_layers == ()
    assert np.isclose(pruner.sparsity, 0.5)


class Position(keras.Model):
    """Adds what a layer makes of a table of positions."""

    def __init__(self, times):
        super().__init__()
        self.times, self.inner, self.last = times, layers.Dense(4, name="inner"), layers.Dense(2, name="last")

    def call(self, x):
        table = np.arange(4.0 * self.times, dtype="float32").reshape(-1, 4) / (4 * self.times)
        return self.last(keras.ops.mean(x + self.inner(keras.ops.convert_to_tensor(table))[None], 1))


@pytest.mark.parametrize("times", [7, 8])
def test_a_layer_whose_first_axis_is_another_one_is_slow_by_itself(rng, times):
    x, y = rng.normal(size=(16, times, 4)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")
    model = Position(times)
    model(x)
    model.compile("sgd", "mse")
    report = kw.prune(model, (x, y), 0.5, quality="fast", num_grads=16, verbose=0)
    assert [name.rpartition("/")[2] for slow in report.slow_layers for name in slow.names] == (
        ["inner"] if SLOW else []
    )


def test_a_wrapper_that_holds_the_kernel_of_its_layer_is_fast(rng):
    x, y = rng.normal(size=(16, 6, 6, 3)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")
    parts = [layers.Conv2D(4, 3, activation="relu"), layers.Conv2D(2, 3, activation="relu")]
    wrapped = [layers.SpectralNormalization(part) for part in parts]
    model = keras.Sequential([layers.Input((6, 6, 3)), *wrapped, layers.GlobalAveragePooling2D(), layers.Dense(2)])
    model.compile("sgd", "mse")
    report = kw.prune(model, (x, y), 0.5, quality="fast", num_grads=16, verbose=0)
    assert not report.slow_layers


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch modules are layers on torch only")
def test_samples_of_torch_modules_are_refused(rng):
    import torch

    x, y = rng.normal(size=(16, 4)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")
    model = keras.Sequential([layers.Input((4,)), layers.TorchModuleWrapper(torch.nn.Linear(4, 5)), layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"belongs to a torch module in a TorchModuleWrapper.*buffered gradients"):
        kw.prune(model, (x, y), 0.5, params="__ALL__", quality="fast", verbose=0)
    pruner = kw.WoodFisherPruning(0.5, start_epoch=1, end_epoch=2, params="__ALL__", num_grads=2, verbose=0)
    model.fit(x, y, batch_size=4, epochs=2, callbacks=[pruner], verbose=0)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.02)
