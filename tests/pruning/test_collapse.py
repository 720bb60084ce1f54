"""What dies of pruning is told: variables without a weight, outputs that are the same whatever goes in."""

import json
import warnings

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.model.targets import find_targets
from keras_woodfisher.pruning.collapse import Collapse, _is_constant, constant_outputs

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture
def chain(rng):
    """736 weights; those of the first layer are by far the smallest."""

    def make():
        model = keras.Sequential(
            [
                keras.Input((16,)),
                layers.Dense(32, activation="tanh", name="first"),
                layers.Dense(7, bias_initializer="ones", name="last"),
            ],
            name="m",
        )
        model.get_layer("first").kernel.assign(1e-3 * rng.normal(size=(16, 32)))
        model.get_layer("last").kernel.assign(rng.normal(size=(32, 7)))
        model.compile("sgd", LOSS)
        return model

    return make


@pytest.fixture
def examples(rng):
    return rng.normal(size=(32, 16)).astype("float32"), rng.integers(0, 7, 32)


FIRST = r"No weight is left of m/first/kernel \(512\): only biases and shortcuts are left.*global_sparsity=False"
BOTH = r"No weight is left of m/first/kernel \(512\), m/last/kernel \(224\)"
SAME = r"The output of the pruned model is the same for all 16 examples"


def messages(caught):
    return [str(entry.message) for entry in caught if entry.category is UserWarning]


@pytest.mark.parametrize("method", ["magnitude", "woodfisher"])
def test_prune_warns_of_a_variable_without_weights_and_of_a_dead_output(chain, examples, method):
    wanted = {"num_grads": 16, "quality": "fast"} if method == "woodfisher" else {}
    with pytest.warns(UserWarning, match=BOTH), pytest.warns(UserWarning, match=SAME):
        report = kw.prune(chain(), examples, 0.9999, method=method, verbose=0, **wanted)
    assert (report.pruned, report.weights) == (736, 736)
    assert report.zeroed == ("m/first/kernel", "m/last/kernel")
    data = report.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["zeroed"] == list(report.zeroed) and data["notes"][0].startswith("The output of the pruned model")
    assert "zero as a whole: m/first/kernel, m/last/kernel" in str(report)


def test_a_dead_output_is_known_without_data_only_from_the_variables(chain):
    with pytest.warns(UserWarning, match=FIRST) as caught:
        report = kw.prune(chain(), sparsity=0.9, method="magnitude", verbose=0)
    assert len(messages(caught)) == 1
    assert report.zeroed == ("m/first/kernel",) and not report.notes


def test_what_was_zero_before_is_no_news(chain):
    model = chain()
    model.get_layer("first").kernel.assign(np.zeros((16, 32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = kw.prune(model, sparsity=0.8, method="magnitude", verbose=0)
    assert report.zeroed == ("m/first/kernel",)


def test_a_sane_sparsity_says_nothing_and_looks_at_no_output(chain, examples, monkeypatch):
    monkeypatch.setattr("keras_woodfisher.pruning.collapse.constant_outputs", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = kw.prune(chain(), examples, 0.5, global_sparsity=False, method="magnitude", verbose=0)
    assert report.zeroed == () and not report.notes


def test_a_path_that_is_cut_is_seen_though_each_variable_has_weights(chain, examples):
    model, first, last = chain(), np.zeros((16, 32)), np.zeros((32, 7))
    first[:, :3], last[3:, :] = 1.0, 1.0
    targets = find_targets(model, "__ALL_PRUNABLE__")
    collapse = Collapse(targets)
    model.get_layer("first").kernel.assign(first)
    model.get_layer("last").kernel.assign(last)
    (text,) = collapse.news(model, lambda: open_examples(examples))
    assert text == collapse.constant and "is the same for all 16 examples" in text
    assert collapse.news(model, lambda: open_examples(examples)) == [], "nothing twice"


@pytest.mark.parametrize("entry", ["prune", "callback", "recipe", "recipe in one shot"])
def test_each_way_of_magnitude_looks_at_outputs_where_there_is_data(chain, examples, entry):
    """The weights that are left: 3 units of the first layer, the others' rows of the last one."""
    model = chain()
    first, last = 0.01 * np.ones((16, 32)), 0.01 * np.ones((32, 7))
    first[:, :3], last[3:, :] = 1.0, 1.0
    model.get_layer("first").kernel.assign(first)
    model.get_layer("last").kernel.assign(last)
    model.compile(keras.optimizers.SGD(1e-9), LOSS)
    sparsity = 1.0 - (16 * 3 + 29 * 7) / 736
    fields = {"init_sparsity": 0.0, "final_sparsity": sparsity, "start_epoch": 0.0, "end_epoch": 1.0}
    fields |= {"update_frequency": 1.0, "params": "__ALL_PRUNABLE__", "global_sparsity": True}
    with pytest.warns(UserWarning, match=SAME):
        if entry == "prune":
            kw.prune(model, examples, sparsity, method="magnitude", verbose=0)
        elif entry == "callback":
            pruner = kw.WoodFisherPruning(sparsity, end_epoch=1, data=examples, method="magnitude", verbose=0)
            model.fit(*examples, epochs=2, callbacks=[pruner], verbose=0)
            assert any("is the same for all 16 examples" in note for note in pruner.report().notes)
        else:
            recipe = kw.load_recipe({"modifiers": [{"GMPruningModifier": fields}]})
            if entry == "recipe":
                model.fit(*examples, epochs=2, callbacks=recipe.callbacks(model, examples, verbose=0), verbose=0)
            else:
                recipe.apply(model, examples, verbose=0)


def test_outputs_that_are_not_finite_are_told():
    class Normed(layers.Layer):
        def call(self, x):
            return x / keras.ops.sqrt(keras.ops.sum(x * x, -1, keepdims=True))

    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "relu"), Normed(), layers.Dense(3)])
    model.layers[0].kernel.assign(np.eye(4, 6))
    x = np.concatenate([np.ones((9, 4)), -np.ones((7, 4))]).astype("float32")
    assert constant_outputs(model, x).startswith("The output of the pruned model isn't finite for 7 of 16 examples")


def test_the_callback_warns_before_training_and_at_the_update(chain, examples):
    pruner = kw.WoodFisherPruning(0.9999, end_epoch=1, data=examples, num_grads=16, verbose=0)
    with pytest.warns(UserWarning) as caught:
        chain().fit(*examples, epochs=2, callbacks=[pruner], verbose=0)
    first, *rest = messages(caught)
    assert first.startswith("final_sparsity rounds to all weights. No weight will be left of m/first/kernel (512), m/")
    assert [text.split(":")[0] for text in rest] == [
        "No weight is left of m/first/kernel (512), m/last/kernel (224)",
        "The output of the pruned model is the same for all 16 examples that were looked at",
    ]
    report = pruner.report()
    assert report.zeroed == ("m/first/kernel", "m/last/kernel") and len(report.notes) == 1


def test_each_update_tells_only_what_is_new(chain, examples):
    pruner = kw.WoodFisherPruning(0.9, end_epoch=2, init_sparsity=0.8, method="magnitude", verbose=0)
    with pytest.warns(UserWarning, match=FIRST) as caught:
        chain().fit(*examples, epochs=3, callbacks=[pruner], verbose=0)
    assert len(messages(caught)) == 1


def test_the_dry_run_tells_which_variables_will_have_no_weight(chain, examples):
    ramp = {"init_sparsity": 0.0, "start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 1.0}

    def emptied(**fields):
        recipe = kw.load_recipe({"modifiers": [{"GMPruningModifier": ramp | fields}]})
        check = kw.check_recipe(recipe, chain(), 2, 1, verbose=0)
        entry = check.as_dict()["modifiers"][0]
        assert ("no weight will be left of" in str(check)) == bool(entry["emptied"])
        return entry["emptied"]

    every = {"params": "__ALL_PRUNABLE__", "global_sparsity": True}
    assert emptied(final_sparsity=0.9999, **every) == ["m/first/kernel", "m/last/kernel"]
    assert emptied(final_sparsity=0.998, **every) == []
    assert emptied(final_sparsity=0.998, params="__ALL_PRUNABLE__") == ["m/last/kernel"]
    assert emptied(final_sparsity={0.5: ["first/kernel"], 0.999: ["last/kernel"]}, params=[]) == ["m/last/kernel"]
    assert emptied(final_sparsity=0.998, params="__ALL_PRUNABLE__", mask_type="filter") == []


def test_sensitivity_tells_levels_without_weights(chain, examples):
    report = kw.sensitivity(chain(), eval_data=examples, levels=[0.5, 0.998, 0.9999], method="magnitude", verbose=0)
    assert report.zeroed == (("m/first/kernel", 0.9999), ("m/last/kernel", 0.998))
    assert "zero as a whole from level 0.998 on: m/last/kernel" in str(report)
    assert report.as_dict()["zeroed"][0] == {"name": "m/first/kernel", "level": 0.9999}


def test_outputs_are_compared_one_by_one(rng):
    inputs = keras.Input((3,))
    live, dead = layers.Dense(2, name="live"), layers.Dense(2, kernel_initializer="zeros", name="dead")
    model = keras.Model(inputs, {"a": live(inputs), "b": dead(inputs)})
    x = rng.normal(size=(5, 3)).astype("float32")
    assert constant_outputs(model, x).startswith("Output 1 of the pruned model is the same for all 5 examples")
    assert constant_outputs(keras.Model(inputs, live.output), x) == ""
    assert constant_outputs(model, np.ones((5, 3), "float32")) == "", "inputs that don't differ tell nothing"


@pytest.mark.once
def test_what_counts_as_the_same_for_all_examples():
    for same in ([[1.0, 2.0]] * 3, [[1e6, 2.0], [1e6 + 0.1, 2.0]], [[0.0]] * 2, [3, 3], [True, True], [["a", "b"]] * 2):
        assert _is_constant(np.array(same)), same
    for other in ([[1.0, 2.0], [1.0, 2.1]], [3, 4], [True, False], [["a", "b"], ["a", "c"]], [[1.0, 2.0], [0.0, 2.0]]):
        assert not _is_constant(np.array(other)), other
