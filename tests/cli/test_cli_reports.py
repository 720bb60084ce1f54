"""What reports don't leave unsaid, on the command line: as text, and in the JSON document."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CAPTURES = keras.backend.backend() != "jax"
LEFT_OUT = "not considered: 2 variables with 125 weights"


@keras.saving.register_keras_serializable("tests")
class Mixing(layers.Layer):
    """No rule knows its kernel."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 5), name="w")

    def call(self, x):
        return x @ self.w


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A compiled model with an embedding and a layer of its own, data, and recipes."""
    folder = tmp_path_factory.mktemp("shelf")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.integers(0, 20, (32, 6)), y=rng.integers(0, 3, 32))
    keras.utils.set_random_seed(1)
    tokens = keras.Input((6,), dtype="int32")
    h = Mixing(name="mix")(layers.GlobalAveragePooling1D()(layers.Embedding(20, 5, name="embed")(tokens)))
    model = keras.Model(tokens, layers.Dense(3, name="out")(layers.Dense(8, activation="relu", name="hidden")(h)))
    model.compile("sgd", LOSS)
    model.save(folder / "model.keras")
    ramp = "init_sparsity: 0.0, start_epoch: 0.0, end_epoch: 1.0, update_frequency: 1.0"
    (folder / "all.yaml").write_text(
        f"modifiers:\n  - !GMPruningModifier {{final_sparsity: 0.99, params: [__ALL_PRUNABLE__, mix/w], {ramp}}}\n"
    )
    (folder / "before.yaml").write_text(
        "modifiers:\n  - !ReconstructionModifier {final_sparsity: 0.5, params: [__ALL_PRUNABLE__, 're:mix']}\n"
        "  - !ConstantPruningModifier {params: [__ALL_PRUNABLE__, 're:mix']}\n"
    )
    return folder


def named(left_out):
    return [variable["name"] for variable in left_out["variables"]]


@pytest.mark.parametrize("form", ["", " --json"])
def test_prune_tells_it(cli, form):
    command = "prune model.keras --data data.npz --sparsity 0.5 --quality fast --num-grads 16 --out p.keras"
    code, out, err = cli(command + form)
    assert code == 0, err
    if not form:
        assert LEFT_OUT in out and "params=['__ALL_PRUNABLE__', 'embed/embeddings', 'mix/w']" in out
        return
    report = json.loads(out)["report"]
    assert named(report["left_out"]) == ["embed/embeddings", "mix/w"]
    assert report["overall_sparsity"] == 32 / 189
    assert (report["zeroed"], report["slow_layers"]) == ([], [])


def test_prune_takes_keywords_beside_names_and_tells_what_was_slow(cli):
    command = "prune model.keras --data data.npz --sparsity 0.5 --quality fast --num-grads 16 --out p.keras --json"
    code, out, err = cli(f"{command} --params __ALL_PRUNABLE__ mix/w")
    assert code == 0, err
    report = json.loads(out)["report"]
    assert named(report["left_out"]) == ["embed/embeddings"]
    assert [entry["names"] for entry in report["slow_layers"]] == ([["mix"]] if CAPTURES else [])
    assert all(entry["reason"] for entry in report["slow_layers"])


@pytest.mark.parametrize("recipe", ["all.yaml", "before.yaml"])
def test_training_by_a_recipe_tells_it(cli, recipe):
    code, out, err = cli(f"prune model.keras --data data.npz --recipe {recipe} --epochs 2 --out p.keras --json")
    assert code == 0, err
    report = json.loads(out)["report"]
    assert named(report["left_out"]) == ["embed/embeddings"]
    assert [v["name"] for v in report["variables"]] == ["mix/w", "hidden/kernel", "out/kernel"]
    if recipe == "all.yaml":
        assert report["zeroed"] == ["mix/w", "hidden/kernel", "out/kernel"]
        assert "No weight is left of mix/w (25), hidden/kernel (40), out/kernel (24)" in err
    else:
        told = {entry["name"]: entry["note"] for entry in report["reconstruction"]["layers"]}
        assert told["mix/w"] and not told["hidden/kernel"], "which layers were pruned by magnitude, and why"


def test_check_tells_it(cli):
    code, out, err = cli("check all.yaml model.keras --data data.npz --steps-per-epoch 4 --json")
    assert code == 0, err
    document = json.loads(out)
    assert named(document["left_out"]) == ["embed/embeddings"]
    assert document["modifiers"][0]["emptied"] == ["mix/w", "hidden/kernel", "out/kernel"]
    assert "not considered: 1 variable with 100 weights" in cli("check all.yaml model.keras")[1]


def test_sensitivity_tells_it(cli):
    command = "sensitivity model.keras --data data.npz --levels 0.5 0.99 --method magnitude"
    assert LEFT_OUT in cli(command)[1]
    document = json.loads(cli(f"{command} --json")[1])
    assert named(document["left_out"]) == ["embed/embeddings", "mix/w"]
    assert document["zeroed"] == [{"name": name, "level": 0.99} for name in ("hidden/kernel", "out/kernel")]
    command = "sensitivity model.keras --data data.npz --levels 0.5 --num-grads 8 --params mix/w --json"
    slow = json.loads(cli(command)[1])["slow_layers"]
    assert [entry["names"] for entry in slow] == ([["mix"]] if CAPTURES else [])


def test_inspect_tells_it(cli):
    model = keras.models.load_model("model.keras")
    model.get_layer("mix").w.assign(np.zeros((5, 5)))
    kw.prune(model, sparsity=0.5, method="magnitude", verbose=0)
    model.get_layer("out").kernel.assign(np.zeros((8, 3)))
    model.save("pruned.keras")
    out = cli("inspect pruned.keras")[1]
    assert LEFT_OUT in out and "zero as a whole: out/kernel" in out
    document = json.loads(cli("inspect pruned.keras --json")[1])
    assert document["zeroed"] == ["out/kernel"]
    assert document["left_out"]["pruned"] == 25


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
@pytest.mark.skipif(not hasattr(keras.quantizers, "Int4QuantizationConfig"), reason="this Keras packs otherwise")
def test_inspect_reads_packed_weights(cli):
    model = keras.models.load_model("model.keras")
    kw.prune(model, sparsity=0.5, params=["hidden/kernel"], method="magnitude", verbose=0)
    model.get_layer("hidden").quantize("int4")
    model.save("int4.keras")
    code, out, err = cli("inspect int4.keras --json")
    assert code == 0, err
    row = json.loads(out)["variables"][0]
    assert (row["name"], row["shape"], row["weights"]) == ("hidden/kernel", [5, 8], 40)
    assert 20 <= row["pruned"] < 40
    assert (row["bytes"]["dense"], row["bytes"]["bitmask"]) == (20, 5 + -(-(40 - row["pruned"]) // 2))
