"""BatchNorm re-estimation and sensitivity analysis on the command line, compared with the library."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_woodfisher as kw

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LOGITS = "sparse_categorical_crossentropy:from_logits"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A compiled and an uncompiled classifier with BatchNorm, one without, and data."""
    folder = tmp_path_factory.mktemp("shelf")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 96)
    x = (rng.normal(size=(96, 12)) + 2.0 * np.eye(3, 12)[y]).astype("float32")
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(folder / "held_out.npz", x=x[:40], y=y[:40])
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [layers.Input((12,)), layers.Dense(8, name="hidden"), layers.BatchNormalization(name="norm"), layers.ReLU()]
        + [layers.Dense(3, name="out")],
        name="net",
    )
    kw.reestimate_batchnorm(model, x, verbose=0)
    model.save(folder / "bare.keras")
    model.compile("sgd", LOSS)
    model.save(folder / "model.keras")
    plain = keras.Sequential([layers.Input((12,)), layers.Dense(3)])
    plain.compile("sgd", LOSS)
    plain.save(folder / "plain.keras")
    return folder


def data(name="data.npz"):
    with np.load(name) as file:
        return file["x"], file["y"].astype("int32")


def assert_weights(path, model):
    for found, right in zip(keras.models.load_model(path).weights, model.weights, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(found), ops.convert_to_numpy(right), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("option, wish", [("", None), (" held_out.npz", "held_out.npz")])
def test_prune_re_estimates_batchnorm(cli, option, wish):
    command = "prune model.keras --data data.npz --sparsity 0.6 --quality fast --num-grads 16 --out p.keras --json"
    code, out, err = cli(f"{command} --reestimate-batchnorm{option}")
    assert code == 0, err
    model = keras.models.load_model("model.keras")
    wish = True if wish is None else data(wish)
    report = kw.prune(model, data(), 0.6, quality="fast", num_grads=16, reestimate_batchnorm=wish, verbose=0)
    assert_weights("p.keras", model)
    assert json.loads(out)["report"]["batchnorm"]["dense_loss"] == pytest.approx(report.batchnorm.dense_loss)


def test_magnitude_needs_a_loss_to_check_the_data(cli):
    command = "--sparsity 0.6 --method magnitude --reestimate-batchnorm held_out.npz --out p.keras --quiet"
    code, out, err = cli(f"prune bare.keras {command}")
    assert (code, out) == (1, "")
    assert "The model isn't compiled, so --reestimate-batchnorm needs --loss" in err
    code, out, err = cli(f"prune bare.keras {command} --loss {LOGITS}")
    assert code == 0, err
    assert "BatchNorm: statistics of 1 layers measured on 40 examples" in out


def test_sensitivity_answers_as_the_library_does(cli):
    options = "--levels 0.5 0.8 --num-grads 16 --num-examples 30 --batch-size 7 --damp 1e-3 --exclude out/kernel"
    code, out, err = cli(f"sensitivity model.keras --data data.npz --eval held_out.npz {options} --json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    model = keras.models.load_model("model.keras")
    report = kw.sensitivity(
        model,
        data(),
        [0.5, 0.8],
        eval_data=data("held_out.npz"),
        num_examples=30,
        batch_size=7,
        num_grads=16,
        damp=1e-3,
        exclude=["out/kernel"],
        verbose=0,
    )
    assert (document["command"], document["model"], document["plot"]) == ("sensitivity", "model.keras", None)
    assert document["dense_loss"] == pytest.approx(report.dense_loss)
    assert [entry["level"] for entry in document["entries"]] == [0.5, 0.8]
    for found, right in zip(document["entries"], report.entries, strict=True):
        assert found["pruned"] == right.pruned
        assert found["predicted"] == pytest.approx(right.predicted, rel=1e-4)
        assert found["measured"] == pytest.approx(right.measured, rel=1e-3, abs=1e-6)


def test_sensitivity_prints_tables_and_draws(cli, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    command = "sensitivity bare.keras --eval data.npz --method magnitude --plot curves.svg"
    code, out, err = cli(f"{command} --loss {LOGITS}")
    assert code == 0, err
    assert "increase of the loss when one variable alone is pruned, measured" in out
    assert ["variable", "weights", "0.5", "0.7", "0.8", "0.9", "0.95"] in [line.split() for line in out.splitlines()]
    assert out.endswith("Wrote curves.svg.\n")
    assert "loss at 0.95" in err, "progress goes to stderr"
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    assert "curves.svg exists" in cli(f"{command} --loss {LOGITS}")[2]
    assert cli(f"{command} --loss {LOGITS} --force --quiet")[::2] == (0, "")
    assert "must end in .png or .svg or .pdf" in cli("sensitivity model.keras --data data.npz --plot curves.txt")[2]


@pytest.mark.parametrize(
    "command, message",
    [
        ("prune model.keras --data data.npz --recipe r.yaml --reestimate-batchnorm", "no effect beside --recipe"),
        (
            "prune model.keras --sparsity 0.5 --method magnitude --reestimate-batchnorm",
            "--reestimate-batchnorm needs examples: give --data",
        ),
        ("sensitivity model.keras", "--data is needed; only --method magnitude works with --eval alone"),
        ("sensitivity model.keras --eval data.npz", "--data is needed"),
        ("sensitivity model.keras --data data.npz --method magnitude --damp 1", "--damp has no effect beside --method"),
        (
            "sensitivity model.keras --data data.npz --eval data.npz --method magnitude",
            "--data has no effect beside --method magnitude and --eval",
        ),
        ("sensitivity model.keras --data data.npz --levels 80", "must be a fraction in [0, 1), got 80: write 0.8"),
    ],
)
def test_wrong_usage_exits_with_2(cli, command, message):
    command += " --out p.keras" if command.startswith("prune") else ""
    code, out, err = cli(command)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    "command, message",
    [
        ("prune plain.keras --data data.npz --sparsity 0.5 --out p.keras", "has no BatchNormalization layer"),
        ("sensitivity bare.keras --data data.npz", "The model isn't compiled, so --data needs --loss"),
        ("sensitivity bare.keras --data data.npz --loss sparse_categorical_crossentropy", "they are logits"),
    ],
)
def test_what_cannot_work_is_one_line(cli, command, message):
    command += " --reestimate-batchnorm" if command.startswith("prune") else ""
    code, out, err = cli(command)
    assert (code, out) == (1, "")
    assert message in err and err.count("\n") == 1


def test_a_plot_without_matplotlib_ends_before_any_work(cli, monkeypatch):
    import sys

    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(kw, "sensitivity", None)
    assert "plot() needs matplotlib" in cli("sensitivity model.keras --data data.npz --plot curves.png")[2]
