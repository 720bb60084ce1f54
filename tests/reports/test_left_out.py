"""What a report isn't about is told: which weights, how many, why, and how to name them."""

import json
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_woodfisher as kw
from keras_woodfisher.model.targets import all_targets, named_targets
from keras_woodfisher.reports import zeros as reasons
from keras_woodfisher.reports.left_out import patterns_of

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
PATTERNS = ("re:block(_?\\d+)?/w_in$", "re:block(_?\\d+)?/w_out$")


class Experts(layers.Layer):
    """A mixture of experts, whose kernels are its own and have three axes."""

    def build(self, shape):
        self.router = layers.Dense(3, name="router")
        self.router.build(shape)
        self.w_in = self.add_weight(shape=(3, shape[-1], 5), name="w_in")
        self.w_out = self.add_weight(shape=(3, 5, shape[-1]), name="w_out")
        self.gain = self.add_weight(shape=(shape[-1],), name="gain")

    def call(self, x):
        hidden = ops.relu(ops.einsum("btd,edh->bteh", x, self.w_in))
        return self.gain * ops.einsum("bte,bteh,ehd->btd", ops.softmax(self.router(x)), hidden, self.w_out)


def mixture():
    tokens = keras.Input((6,), dtype="int32")
    h = layers.Embedding(20, 4, name="embed")(tokens)
    for number in range(2):
        h = layers.Add()([h, Experts(name=f"block_{number}")(h)])
    return keras.Model(tokens, layers.Dense(7, name="head")(h))


def tied():
    tokens = keras.Input((6,), dtype="int32")
    embedding = layers.ReversibleEmbedding(20, 4, name="embed")
    h = embedding(tokens)
    return keras.Model(tokens, embedding(layers.Dense(4, name="inner")(h), reverse=True))


@pytest.fixture
def text(rng):
    return rng.integers(0, 20, (16, 6)).astype("int32"), rng.integers(0, 7, (16, 6)).astype("int32")


def told(left_out):
    return {v.name: (v.weights, v.reason) for v in left_out.variables}


EXPERTS = {f"block_{n}/{name}": (60, reasons.OTHER) for n in range(2) for name in ("w_in", "w_out")}
EMBEDDING = {"embed/embeddings": (80, reasons.EMBEDDING)}


@pytest.fixture
def pruned(text):
    """A mixture that was pruned to 0.5 by default, and its report."""
    model = mixture()
    model.compile("sgd", LOSS)
    return model, kw.prune(model, text, 0.5, method="magnitude", verbose=0)


def test_prune_tells_what_it_left_out(pruned):
    _, report = pruned
    assert report.weights == 2 * 12 + 28
    assert told(report.left_out) == EMBEDDING | EXPERTS
    assert (report.left_out.weights, report.left_out.share) == (320, 320 / 372)
    assert report.overall_sparsity == 26 / 372
    assert report.left_out.params == ("__ALL_PRUNABLE__", "embed/embeddings", *PATTERNS)
    assert str(report).splitlines()[7:12] == [
        "not considered: 5 variables with 320 weights, 86.0 % of the model's, biases and other vectors aside",
        "  7.0 % of all these weights are zero",
        "  embeddings, which are taken only when named: 1 variable with 80 weights: embed/embeddings",
        "  of layers of another kind, which are taken only when named: 4 variables with 240 weights: "
        "block_0/w_in, block_0/w_out, block_1/w_in, ...",
        f"  to take them too: params={list(report.left_out.params)!r}",
    ]


def test_the_advice_takes_everything(pruned, text):
    model, report = pruned
    wanted = {"params": report.left_out.params, "global_sparsity": False, "method": "magnitude", "verbose": 0}
    again = kw.prune(model, text, 0.6, **wanted)
    assert again.weights == 372 and again.left_out.variables == () and again.left_out.params == ()
    assert "not considered" not in str(again)


def test_the_same_is_told_as_data(pruned):
    data = pruned[1].as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["overall_sparsity"] == 26 / 372
    assert data["left_out"]["variables"][0] == {
        "name": "embed/embeddings",
        "shape": [20, 4],
        "weights": 80,
        "pruned": 0,
        "reason": reasons.EMBEDDING,
    }
    figures = {name: data["left_out"][name] for name in ("weights", "pruned", "share", "considered")}
    assert figures == {"weights": 320, "pruned": 0, "share": 320 / 372, "considered": 52}
    assert data["left_out"]["params"] == ["__ALL_PRUNABLE__", "embed/embeddings", *PATTERNS]


def test_sparsity_report_counts_the_zeros_of_the_others_too(pruned):
    model, _ = pruned
    model.get_layer("embed").embeddings.assign(np.eye(20, 4))
    report = kw.sparsity_report(model)
    assert (report.pruned, report.left_out.pruned, report.overall_sparsity) == (26, 76, 102 / 372)
    assert told(report.left_out) == EMBEDDING | EXPERTS
    assert kw.sparsity_report(model, "__ALL__").left_out.weights == 0


def test_a_tied_embedding_is_told():
    report = kw.sparsity_report(tied())
    assert told(report.left_out) == EMBEDDING
    assert report.left_out.share == 80 / 96


def test_the_callback_tells_it_and_says_it_when_training_begins(text, capsys):
    model = mixture()
    model.compile("sgd", LOSS)
    pruner = kw.WoodFisherPruning(0.5, end_epoch=0, method="magnitude", exclude=["block_1/router/kernel"], verbose=1)
    model.fit(*text, callbacks=[pruner], verbose=0)
    assert "not considered: 6 variables with 332 weights" in capsys.readouterr().out
    assert told(pruner.report().left_out) == EMBEDDING | EXPERTS | {"block_1/router/kernel": (12, reasons.EXCLUDED)}
    pruner = kw.WoodFisherPruning(0.5, end_epoch=0, method="magnitude", verbose=0)
    model.fit(*text, callbacks=[pruner], verbose=0)
    assert capsys.readouterr().out == ""
    assert told(pruner.report().left_out) == EMBEDDING | EXPERTS


@pytest.mark.filterwarnings("ignore:Frozen variables")
def test_each_reason_is_told(pruned, text):
    model, _ = pruned
    model.get_layer("block_0").trainable = False
    report = kw.prune(model, text, 0.5, params=["re:.*router", "re:.*w_"], exclude=["re:.*w_in"], method="magnitude")
    frozen = {"block_0/router/kernel": (12, reasons.FROZEN), "block_0/w_out": (60, reasons.FROZEN)}
    excluded = {f"block_{n}/w_in": (60, reasons.EXCLUDED) for n in range(2)}
    unnamed = {"head/kernel": (28, reasons.UNNAMED)}
    assert told(report.left_out) == EMBEDDING | frozen | excluded | unnamed
    assert report.left_out.params == ("re:.*router", "re:.*w_", "embed/embeddings", "head/kernel")


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
def test_layers_that_cannot_be_pruned_are_told():
    model = keras.Sequential([keras.Input((4,)), *(layers.Dense(4, name=name) for name in ("plain", "adapted", "int"))])
    model.get_layer("adapted").enable_lora(2)
    model.get_layer("int").quantize("int8")
    report = kw.prune(model, sparsity=0.5, params=["plain/kernel"], method="magnitude", verbose=0)
    adapted = {f"sequential/adapted/{name}": (size, reasons.LORA) for name, size in SIZES.items()}
    expected = adapted | {"sequential/int/kernel": (16, reasons.QUANTIZED)}
    assert told(report.left_out) == {name.replace("sequential", model.name): entry for name, entry in expected.items()}
    assert report.left_out.params == ()


SIZES = {"kernel": 16, "lora_kernel_a": 8, "lora_kernel_b": 8}


def test_reconstruct_and_sensitivity_tell_it(text):
    dense, model = mixture(), mixture()
    dense.set_weights(model.get_weights())
    kw.prune(model, sparsity=0.5, method="magnitude", verbose=0)
    assert told(kw.reconstruct(model, text[0], dense=dense, verbose=0).left_out) == EMBEDDING | EXPERTS
    report = kw.sensitivity(model, eval_data=text, loss=LOSS, levels=[0.5], method="magnitude", verbose=0)
    assert told(report.left_out) == EMBEDDING | EXPERTS
    assert "not considered: 5 variables" in str(report)
    data = report.as_dict()
    assert json.loads(json.dumps(data)) == data and data["left_out"]["weights"] == 320


def modifier(tag, **fields):
    ramp = {"init_sparsity": 0.0, "final_sparsity": 0.5, "start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 1.0}
    return {tag: (ramp if "Constant" not in tag else {}) | fields}


def test_the_dry_run_and_a_recipe_tell_what_no_modifier_considers(text):
    model = mixture()
    model.compile("sgd", LOSS)
    recipe = kw.load_recipe(
        {
            "modifiers": [
                modifier("GMPruningModifier", params=["__all_prunable__", "re:block_0/w_"]),
                modifier("ConstantPruningModifier", params=["block_1/w_in"]),
            ]
        }
    )
    expected = EMBEDDING | {"block_1/w_out": (60, reasons.OTHER)}
    check = kw.check_recipe(recipe, model, 2, 1, verbose=0)
    assert not check.problems
    assert told(check.left_out) == expected
    assert "not considered: 2 variables with 140 weights, 37.6 %" in str(check)
    data = check.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["left_out"]["params"][-2:] == ["embed/embeddings", "block_1/w_out"]
    recipe = kw.load_recipe({"modifiers": [modifier("GMPruningModifier", params=["__ALL_PRUNABLE__", "re:.*/w_"])]})
    assert told(recipe.apply(model, verbose=0).left_out) == EMBEDDING


def test_the_dry_run_reads_keywords_in_lists():
    model = mixture()
    model.compile("sgd", LOSS)
    modifiers = [
        {"TrainableParamsModifier": {"params": ["__ALL__", "head/bias"], "trainable": True}},
        {"ConstantPruningModifier": {"params": ["__ALL_PRUNABLE__", "hed/kernel"]}},
    ]
    check = kw.check_recipe(kw.load_recipe({"modifiers": modifiers}), model, 2, 1, verbose=0)
    every, wrong = check.modifiers
    assert len(every.variables) == len(model.trainable_variables) == 13
    assert len(wrong.variables) == 3, "those that the other names match"
    (problem,) = check.problems
    assert "'hed/kernel', which no variable has. The nearest: head/kernel" in problem.message


@pytest.mark.parametrize(
    ("params", "count"),
    [
        (["__ALL_PRUNABLE__"], 3),
        (["__all_prunable__", "re:.*/w_"], 7),
        (["embed/embeddings", "__ALL_PRUNABLE__"], 4),
        (["__ALL__"], 8),
        (["__ALL__", "block_0/gain"], 9),
    ],
)
def test_keywords_stand_in_lists(params, count):
    everything = all_targets(mixture())
    chosen = named_targets(everything, params)
    assert len(chosen) == count
    assert [t for t in everything if t in chosen] == chosen, "each once, in the model's order"


def test_a_keyword_may_be_excluded():
    wanted = {"params": "__ALL__", "exclude": ["__ALL_PRUNABLE__"], "global_sparsity": False, "method": "magnitude"}
    report = kw.prune(mixture(), sparsity=0.5, **wanted)
    assert report.weights == 320


def test_levels_and_keep_zeros_take_keywords(text):
    model = mixture()
    model.compile("sgd", LOSS)
    levels = {0.75: "embed/embeddings", 0.5: ["__ALL_PRUNABLE__", "block_0/w_in"]}
    report = kw.prune(model, sparsity=levels, method="magnitude", verbose=0)
    assert {v.name: v.sparsity for v in report.variables} == {"embed/embeddings": 0.75} | dict.fromkeys(
        ["block_0/router/kernel", "block_0/w_in", "block_1/router/kernel", "head/kernel"], 0.5
    )
    holding = kw.KeepZeros(["__ALL_PRUNABLE__", "embed/embeddings"])
    model.fit(*text, callbacks=[holding], verbose=0)
    assert kw.sparsity_report(model, ["embed/embeddings"]).sparsity == 0.75


def test_keep_zeros_tells_which_zeros_it_does_not_hold(text):
    model = mixture()
    model.compile("sgd", LOSS)
    kw.prune(model, sparsity=0.5, params="__ALL__", global_sparsity=False, method="magnitude", verbose=0)
    model.get_layer("block_1").w_in.assign(np.zeros((3, 4, 5)))  # not trained yet
    model.get_layer("block_1").w_out.assign(np.ones((3, 5, 4)))
    free = ["embed/embeddings", "block_0/w_in", "block_0/w_out"]
    with pytest.warns(UserWarning, match=r"doesn't hold the zeros of embed/embeddings, block_0/w_in, .*_out, which"):
        model.fit(*text, callbacks=[kw.KeepZeros()], verbose=0)
    kw.prune(model, sparsity=0.5, params=free, global_sparsity=False, method="magnitude", verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(*text, callbacks=[kw.KeepZeros(["__ALL_PRUNABLE__", *free])], verbose=0)
        model.fit(*text, callbacks=[kw.KeepZeros(exclude=free)], verbose=0)
        model.fit(*text, callbacks=[kw.KeepZeros(), kw.KeepZeros(free)], verbose=0)


def test_a_keyword_among_the_params_of_trainable_params_means_every_weight():
    model = mixture()
    model.compile("sgd", LOSS)
    frozen = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: frozen.append(len(model.trainable_variables))
    )
    held = kw.TrainableParams(["head/kernel", "__ALL__"], trainable=False, end_epoch=1)
    kept = kw.TrainableParams(["head/bias"])
    x, y = np.zeros((8, 6), "int32"), np.zeros((8, 6), "int32")
    model.fit(x, y, epochs=1, callbacks=[held, kept, look], verbose=0)
    assert frozen == [1]


def test_a_model_of_custom_layers_only_gets_the_hint():
    class Own(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 4), name="w")

        def call(self, x):
            return x @ self.w

    model = keras.Sequential([keras.Input((3,)), Own(name="own")], name="m")
    model.compile("sgd", "mse")
    hint = r"params='__ALL__' takes the weights of layers of every kind: m/own/w"
    for work in (
        lambda: kw.prune(model, np.zeros((4, 3)), 0.5),
        lambda: kw.sensitivity(model, np.zeros((4, 3))),
        lambda: model.fit(np.zeros((4, 3)), np.zeros((4, 4)), callbacks=[kw.KeepZeros()], verbose=0),
    ):
        with pytest.raises(ValueError, match=rf"Nothing to prune: .*none\. {hint}"):
            work()
    with pytest.raises(KeyError, match=rf"which no variable has\. The nearest: none\. {hint}"):
        kw.prune(model, np.zeros((4, 3)), 0.5, params=["xyz"])
    assert kw.prune(model, sparsity=0.5, params="__ALL__", method="magnitude", verbose=0).sparsity == 0.5


def test_the_advice_takes_no_vectors():
    class Numbered(layers.Layer):
        def build(self, shape):
            for number in range(4):
                self.add_weight(shape=(shape[-1], 4) if number % 2 else (4,), name=f"variable_{number}")

        def call(self, x):
            return x

    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), Numbered(name="own")], name="m")
    assert kw.sparsity_report(model).left_out.params == ("__ALL_PRUNABLE__", "m/own/variable_1", "m/own/variable_3")


def test_patterns_match_no_more_than_they_must():
    names = ["m/dense/kernel", "m/dense_1/kernel", "m/dense_12/kernel", "m/head.1/w"]
    assert patterns_of(names, []) == [r"re:m/dense(_?\d+)?/kernel$", "m/head.1/w"]
    assert patterns_of(names, ["m/dense_3/kernel"]) == names
    assert patterns_of(["a_1/b", "a/b_1"], []) == ["a_1/b", "a/b_1"]
    assert patterns_of(["a.1/b", "a.2/b"], ["ax1/b"]) == [r"re:a\.(_?\d+)?/b$"]
