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
