"""Several inputs and outputs on the command line: named or numbered arrays, nested as the model has them."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_woodfisher as kw
from keras_woodfisher.cli.arrays import load_data

CLASS, BOX = "sparse_categorical_crossentropy:from_logits", "mse"
LOSSES = {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "box": "mse"}


def detector(outputs=list, inputs=None):
    """An input of 6 numbers (or two of 3) and the outputs `kind`, 3 classes, and `box`, 4 numbers."""
    keras.utils.set_random_seed(1)
    given = [layers.Input((3,), name="left"), layers.Input((3,), name="right")] if inputs else [layers.Input((6,))]
    x = layers.concatenate(given) if inputs else given[0]
    h = layers.Dense(8, "tanh", name="body")(x)
    made = {"kind": layers.Dense(3, name="kind")(h), "box": layers.Dense(4, name="box")(h)}
    return keras.Model(inputs(given) if inputs else given[0], made if outputs is dict else list(made.values()))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    rng = np.random.default_rng(0)
    x, kind, box = rng.normal(size=(40, 6)).astype("float32"), rng.integers(0, 3, 40), rng.normal(size=(40, 4))
    np.savez(folder / "named.npz", x=x, y_box=box, y_kind=kind)
    np.savez(folder / "ordered.npz", x=x, y_0=kind, y_1=box)
    np.savez(folder / "inputs.npz", x_right=x[:, 3:], x_left=x[:, :3], y_kind=kind, y_box=box)
    np.savez(folder / "numbered.npz", x_0=x[:, :3], x_1=x[:, 3:], y_0=kind, y_1=box)
    np.savez(folder / "one.npz", x=x, y=kind)
    np.savez(folder / "wrong.npz", x=x, y_kind=kind, y_boxes=box)
    np.savez(folder / "short.npz", x=x[:, :5], y_0=kind, y_1=box)
    np.savez(folder / "beyond.npz", x=x, y_kind=kind + 1, y_box=box)
    for name, outputs in (("list", list), ("dict", dict)):
        model = detector(outputs)
        model.save(folder / f"bare_{name}.keras")
        model.compile("sgd", LOSSES)
        model.save(folder / f"{name}.keras")
    return folder


def kernels(model):
    return [ops.convert_to_numpy(model.get_layer(name).kernel) for name in ("body", "kind", "box")]


@pytest.mark.parametrize(("name", "file"), [("list", "named"), ("dict", "named"), ("dict", "ordered")])
def test_prune_takes_outputs_by_name_or_in_order(cli, name, file):
    if (name, file) == ("dict", "ordered"):
        # A dictionary's outputs are in the order of their keys: box, kind.
        with np.load("ordered.npz") as found:
            np.savez("turned.npz", x=found["x"], y_0=found["y_1"], y_1=found["y_0"])
        file = "turned"
    options = "--sparsity 0.5 --quality fast --num-grads 16 --out p.keras --eval named.npz --json"
    code, out, err = cli(f"prune {name}.keras --data {file}.npz {options}")
    assert code == 0, err
    model = keras.models.load_model(f"{name}.keras")
    with np.load("named.npz") as found:
        x, labels = found["x"], {"kind": found["y_kind"].astype("int32"), "box": found["y_box"]}
    y = labels if name == "dict" else [labels["kind"], labels["box"]]
    before = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    report = kw.prune(model, (x, y), 0.5, quality="fast", num_grads=16, verbose=0)
    for found, right in zip(kernels(keras.models.load_model("p.keras")), kernels(model), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-7)
    document = json.loads(out)
    assert document["report"]["pruned"] == report.pruned == (48 + 24 + 32) // 2
    assert document["evaluation"]["before"]["loss"] == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("name", ["list", "dict"])
def test_losses_by_output(cli, name):
    measured = []
    for model, loss in ((f"bare_{name}", f"--loss kind={CLASS},box={BOX}"), (name, "")):
        command = f"prune {model}.keras --sparsity 0.5 --method magnitude --eval named.npz --json {loss}"
        code, out, err = cli(f"{command} --out {model}_p.keras")
        assert code == 0, err
        measured.append(json.loads(out)["evaluation"]["after"]["loss"])
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    assert not keras.models.load_model(f"bare_{name}_p.keras").compiled
    command = f"prune bare_{name}.keras --data named.npz --sparsity 0.5 --quality fast --num-grads 16 --out p.keras"
    code, _, err = cli(f"{command} --loss kind={CLASS},boxes={BOX} --force")
    assert code == 1 and "names kind, boxes; the model's outputs are " in err
    code, _, err = cli(f"{command} --loss kind=sparse_categorical_crossentropy,box=mse --force")
    assert code == 1 and f"they are logits. Write --loss sparse_categorical_crossentropy{':from_logits'}" in err
    code, _, err = cli(f"{command} --loss kind=mse,box=mse --force")
    assert code == 1 and "--loss mse wants one label an output, got labels of shape () for outputs of shape (3,)" in err
    assert cli(f"{command} --loss kind={CLASS},box --force")[0] == 1


def test_training_checking_and_sensitivity(cli, tmp_path):
    code, _, err = cli("prune list.keras --data named.npz --sparsity 0.5 --method magnitude --epochs 1 --out p.keras")
    assert code == 0, err
    assert sum(int((kernel == 0).sum()) for kernel in kernels(keras.models.load_model("p.keras"))) == 52
    code, out, err = cli("sensitivity list.keras --data named.npz --levels 0.5 --num-grads 8 --json")
    assert code == 0, err
    assert all(name in out for name in ("body/kernel", "kind/kernel", "box/kernel"))
    text = (
        "modifiers: [!GMPruningModifier {final_sparsity: 0.5, start_epoch: 0, end_epoch: 1, params: __ALL_PRUNABLE__}]"
    )
    (tmp_path / "r.yaml").write_text(text.replace("end_epoch", "update_frequency: 1, init_sparsity: 0.1, end_epoch"))
    code, out, err = cli("check r.yaml list.keras --data ordered.npz --epochs 2 --json")
    assert code == 0, err + out


def test_one_shot_without_labels(cli):
    code, _, err = cli("prune bare_dict.keras --data one.npz --sparsity 0.5 --num-examples 30 --out p.keras")
    assert code == 1 and "one.npz holds one y for 2 outputs" in err
    with np.load("one.npz") as found:
        np.savez("x.npz", x=found["x"])
    assert cli("prune bare_dict.keras --data x.npz --sparsity 0.5 --num-examples 30 --out p.keras")[0] == 0


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("one", "holds one y for 2 outputs. The model's outputs are, in their order: kind, box. Name each y_NAME"),
        ("wrong", "holds y_kind, y_boxes. The model's outputs are, in their order: kind, box"),
        ("short", "holds examples of shape (5,) for the model's input input_layer, which has the shape (6,)"),
        ("inputs", "holds x_right, x_left. The model's inputs are, in their order: "),
    ],
)
def test_what_does_not_fit_the_model_is_named(cli, file, message):
    code, _, err = cli(f"prune list.keras --data {file}.npz --sparsity 0.5 --out p.keras --quiet")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"keras-woodfisher: error: {file}.npz") and message in err


@pytest.mark.parametrize("inputs", [list, lambda given: {tensor.name: tensor for tensor in given}])
@pytest.mark.parametrize("file", ["inputs", "numbered"])
def test_inputs_by_name_or_in_order(cli, inputs, file):
    model = detector(list, inputs)
    data = load_data(f"{file}.npz", model)
    one = keras.Model(model.inputs, model.outputs)
    with np.load("inputs.npz") as found:
        right = one([found["x_left"], found["x_right"]])
    for output, wanted in zip(model(data.x), right, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(output), ops.convert_to_numpy(wanted), rtol=1e-6)
    assert [label.shape for label in data.y] == [(40,), (40, 4)]
