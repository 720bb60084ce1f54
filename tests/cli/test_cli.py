"""The command line, mostly in this process through `main`; what it prunes is compared with `prune` itself."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_woodfisher_backends.keras_internals import RELEASE

import keras_woodfisher as kw
from keras_woodfisher.cli import files
from keras_woodfisher.cli.arrays import load_data

NAME = keras.backend.backend()
OTHER = "torch" if NAME == "jax" else "jax"
LOSS = "sparse_categorical_crossentropy"
LOGITS = f"{LOSS}:from_logits"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Files to read: a compiled and an uncompiled classifier with logits, and its data."""
    folder = tmp_path_factory.mktemp("shelf")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 96)
    x = rng.normal(size=(96, 12)) + 2.0 * np.eye(3, 12)[y]
    np.savez(folder / "data.npz", x=x.astype("float32"), y=y)
    np.savez(folder / "held_out.npz", x=x[:40].astype("float32"), y=y[:40], sample_weight=np.ones(40, "float32"))
    model = classifier()
    model.save(folder / "bare.keras")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.save(folder / "model.keras")
    return folder


def classifier():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [layers.Input((12,)), layers.Dense(16, "relu", name="hidden"), layers.Dense(3, name="out")], name="mlp"
    )


@pytest.fixture
def asked(monkeypatch):
    """What `prune` is asked for, without doing it."""
    calls = {}

    def record(model, data=None, sparsity=None, **arguments):
        calls.update(arguments, data=data, sparsity=sparsity)
        return kw.sparsity_report(model)

    monkeypatch.setattr(kw, "prune", record)
    return calls


def kernels(path):
    model = keras.models.load_model(path)
    return [ops.convert_to_numpy(model.get_layer(name).kernel) for name in ("hidden", "out")]


def zeros(path):
    return sum(int((kernel == 0).sum()) for kernel in kernels(path))


# --- prune, in one shot ------------------------------------------------------------------------------------------


def test_one_shot_prunes_as_the_library_does(cli, shelf):
    code, out, err = cli(
        "prune model.keras --data data.npz --sparsity 0.7 --quality fast --num-grads 32 --damp 1e-4 --out p.keras"
    )
    assert code == 0, err
    model = keras.models.load_model("model.keras")
    with np.load("data.npz") as file:
        data = file["x"], file["y"].astype("int32")
    report = kw.prune(model, data, 0.7, quality="fast", num_grads=32, damp=1e-4, verbose=0)
    for kernel, name in zip(kernels("p.keras"), ("hidden", "out"), strict=True):
        np.testing.assert_allclose(kernel, ops.convert_to_numpy(model.get_layer(name).kernel), rtol=1e-6)
    assert zeros("p.keras") == report.pruned == round(0.7 * (12 * 16 + 16 * 3))
    assert "mlp/hidden/kernel" in out or "hidden/kernel" in out
    assert "Wrote p.keras" in out
    assert "gradients" in err, "progress goes to stderr"
    assert sorted(os.listdir()) == sorted([*os.listdir(shelf), "p.keras"]), "no temporary file is left"


def test_the_settings_of_one_shot_reach_the_library(cli):
    given = {"quality": "best", "stages": 2, "num_grads": 12, "grad_batch_size": 2, "fisher": "ggn"}
    given |= {"damp": "auto", "calibration": 9, "newton_steps": 1, "update": "calibrated"}
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    code, out, err = cli(f"prune model.keras --data data.npz --sparsity 0.5 {words} --out p.keras --json")
    assert code == 0, err
    report = json.loads(out)["report"]
    assert {name: report["settings"][name] for name in given} == given
    assert [stage["samples"] for stage in report["stages"]] == [12, 12]
    code, out, err = cli("prune model.keras --data data.npz --sparsity 0.5 --damp much --out q.keras")
    assert code == 2 and "must be a number, got 'much'" in err


def test_json_is_one_document_and_nothing_else(cli):
    code, out, err = cli(
        "prune model.keras --data data.npz --sparsity 0.5 --quality fast --num-grads 8 --eval held_out.npz "
        "--out p.keras --json"
    )
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["report"]["pruned"] == zeros("p.keras") == 120
    assert document["report"]["samples"] == 8
    assert document["backend"] == NAME
    assert document["out_bytes"] == os.path.getsize("p.keras")


def test_quiet_says_nothing_on_stderr(cli):
    command = "prune model.keras --data data.npz --sparsity 0.5 --num-grads 8 --out p.keras --quiet"
    assert cli(command)[2] == ""


@pytest.mark.parametrize("model", ["model", "bare"])
def test_eval_measures_loss_and_accuracy(cli, model):
    # A compiled model has a loss of its own, and had no accuracy.
    loss = f"--loss {LOGITS}" if model == "bare" else ""
    command = f"prune {model}.keras --sparsity 0.6 --method magnitude --eval held_out.npz --out p.keras {loss} --json"
    code, out, err = cli(command)
    assert code == 0, err
    with np.load("held_out.npz") as file:
        x, y = file["x"], file["y"]
    for file, measured in zip((f"{model}.keras", "p.keras"), json.loads(out)["evaluation"].values(), strict=True):
        outputs = ops.convert_to_numpy(keras.models.load_model(file)(x)).astype("float64")
        log_p = outputs - np.log(np.exp(outputs).sum(1, keepdims=True))
        assert measured["accuracy"] == pytest.approx((outputs.argmax(1) == y).mean(), abs=1e-6)
        assert measured["loss"] == pytest.approx(-log_p[np.arange(len(y)), y].mean(), rel=1e-4)
    assert keras.models.load_model("p.keras").compiled == (model == "model"), "measuring compiles nothing"


def test_eval_is_printed_as_a_table(cli):
    out = cli("prune model.keras --sparsity 0.6 --method magnitude --eval held_out.npz --out p.keras")[1]
    assert "on held_out.npz  before   after" in out
    assert "\naccuracy" in out


def test_accuracy_of_binary_logits_has_its_threshold_at_zero(cli):
    keras.Sequential([layers.Input((1,)), layers.Dense(1, kernel_initializer="ones")]).save("binary.keras")
    x = np.array([[-2.0], [0.2], [0.3], [1.0]], "float32")
    np.savez("binary.npz", x=x, y=np.array([[0], [1], [1], [1]]))
    code, out, _ = cli(
        "prune binary.keras --sparsity 0 --method magnitude --eval binary.npz --loss binary_crossentropy:from_logits "
        "--out p.keras --json"
    )
    assert code == 0
    assert json.loads(out)["evaluation"]["before"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", {"seed": 0, "verbose": 2}),
        ("--quiet", {"verbose": 0}),
        ("--json", {"verbose": 0}),
        ("--params hidden/kernel out/kernel", {"params": ["hidden/kernel", "out/kernel"]}),
        ("--params __ALL__", {"params": ["__ALL__"]}),
        ("--exclude out/kernel --exclude re:x", {"exclude": ["out/kernel", "re:x"]}),
        ("--num-grads 24", {"num_grads": 24}),
        ("--damp 1e-3", {"damp": 1e-3}),
        ("--fisher-block-size 0", {"fisher_block_size": 0}),
        ("--memory-limit 1.5GiB", {"memory_limit": "1.5GiB"}),
        ("--method magnitude", {"method": "magnitude", "loss": None}),
        ("--update independent", {"update": "independent"}),
        ("--mask-type 2:4", {"mask_type": "2:4"}),
        ("--mask-type block4", {"mask_type": "block4"}),
        ("--mask-type 4,1", {"mask_type": [4, 1]}),
        ("--seed 5", {"seed": 5}),
        ("--loss ctc", {"loss": keras.losses.ctc}),
    ],
)
def test_options_reach_prune(cli, asked, written, expected):
    code, _, err = cli(f"prune model.keras --data data.npz --sparsity 0.25 --out p.keras {written}")
    assert code == 0, err
    assert asked["sparsity"] == 0.25
    assert asked["data"].x.shape == (96, 12)
    assert {name: asked[name] for name in expected} == expected
    left = {"num_grads", "damp", "fisher_block_size", "method", "update", "mask_type", "params", "exclude"}
    left -= expected.keys()
    assert not left & asked.keys(), "what isn't given is left to prune"


# --- prune, with training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "extra"), [("model", ""), ("bare", f"--loss {LOGITS} --learning-rate 0.01 --batch-size 16")]
)
def test_epochs_train_and_keep_the_zeros(cli, model, extra):
    command = f"prune {model}.keras --data data.npz --sparsity 0.5 --method magnitude --params hidden/kernel {extra}"
    code, out, err = cli(f"{command} --out p.keras --epochs 2 --json --eval held_out.npz")
    assert code == 0, err
    document = json.loads(out)
    assert document["evaluation"]["after"]["loss"] < document["evaluation"]["before"]["loss"]
    (before, _), (hidden, outer) = kernels(f"{model}.keras"), kernels("p.keras")
    assert (hidden == 0).sum() == document["report"]["pruned"] == before.size // 2
    assert (outer != 0).all(), "left free, as --params says"
    kept = hidden != 0
    assert (hidden[kept] != before[kept]).any(), "it was trained"
    saved = keras.models.load_model("p.keras")
    assert saved.compiled
    steps = 2 * -(-96 // (16 if extra else 64))
    assert int(saved.optimizer.iterations) == steps
    if extra:
        assert float(saved.optimizer.learning_rate) == pytest.approx(0.01)


def test_the_seed_decides_about_training_too(cli):
    command = "prune model.keras --data data.npz --sparsity 0.5 --method magnitude --epochs 1 --batch-size 8 --force"
    found = []
    for seed in (0, 0, 1):
        assert cli(f"{command} --out p.keras --seed {seed}")[0] == 0
        found.append(kernels("p.keras")[0])
    np.testing.assert_array_equal(found[0], found[1])
    # From 3.16 on Keras orders the examples by the epoch alone.
    assert (found[0] != found[2]).any() == (RELEASE < (3, 16)), "another order of the examples"


@pytest.mark.parametrize("option", ["--loss mse", "--learning-rate 0.1"])
def test_a_compiled_model_trains_with_its_own_loss_and_optimizer(cli, option):
    code, _, err = cli(f"prune model.keras --data data.npz --sparsity 0.5 --epochs 1 --out p.keras {option}")
    assert code == 1
    assert f"{option.split()[0]} has no effect: the model is compiled" in err


# --- recipes -----------------------------------------------------------------------------------------------------

OLD = """---
last: 2.0
goal: 0.6
modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: eval(last)
  - !MFACPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.2
    final_sparsity: eval(goal)
    start_epoch: 0.0
    end_epoch: eval(last - 1)
    update_frequency: 0.5
    mfac_options: {num_grads: 16, fisher_block_size: 50}
---
An old recipe.
"""


@pytest.fixture
def old(cli, tmp_path):
    (tmp_path / "old.md").write_text(OLD)
    return kw.load_recipe("old.md")


def test_a_recipe_in_one_shot_does_what_its_apply_does(cli, old):
    code, out, err = cli("prune model.keras --recipe old.md --var goal=0.7 --data data.npz --out p.keras --json")
    assert (code, err) == (0, ""), err
    assert json.loads(out)["report"]["pruned"] == zeros("p.keras") == 168
    assert json.loads(out)["report"]["samples"] == 16
    model = keras.models.load_model("model.keras")
    kw.load_recipe("old.md", {"goal": 0.7}).apply(model, load_data("data.npz"), verbose=0)
    np.testing.assert_allclose(kernels("p.keras")[0], ops.convert_to_numpy(model.get_layer("hidden").kernel), rtol=1e-6)


@pytest.mark.parametrize(("model", "extra"), [("model", ""), ("bare", f"--loss {LOGITS}")])
def test_a_recipe_while_training(cli, old, model, extra):
    command = f"prune {model}.keras --recipe old.md --data data.npz --epochs 2 --out p.keras --batch-size 24 {extra}"
    code, out, err = cli(f"{command} --json")
    assert (code, err) == (0, ""), err
    report = json.loads(out)["report"]
    assert report["pruned"] == zeros("p.keras") == 144
    assert report["stages"] and report["samples"] == sum(stage["samples"] for stage in report["stages"]) > 0
    assert {phase["name"] for phase in report["phases"]} == {"gradients", "inverse", "update"}
    assert report["settings"]["num_grads"] == 16
    assert int(keras.models.load_model("p.keras").optimizer.iterations) == 2 * 4


def test_a_recipe_that_does_not_fit_ends_before_training(cli, old, monkeypatch):
    monkeypatch.setattr(keras.Model, "fit", None)
    code, _, err = cli("prune model.keras --recipe old.md --var last=4 --data data.npz --epochs 2 --out p.keras")
    assert code == 1
    assert err.startswith("keras-woodfisher: error: The recipe doesn't fit: ")
    assert "WoodFisherPruningModifier: end_epoch=3 lies after the last epoch (2)" in err
    assert not os.path.exists("p.keras")


def test_check_prints_the_plan_and_exits_with_0(cli, old):
    code, out, err = cli("check old.md model.keras --steps-per-epoch 2 --data data.npz")
    assert code == 0, err
    model = keras.models.load_model("model.keras")
    plan = kw.check_recipe(old, model, 2, data=load_data("data.npz"))
    # The times are measured anew.
    # What is measured, and what is free at the moment, isn't the same twice.
    same, again = (
        [x for x in text.splitlines() if "time" not in x and "memory plan" not in x] for text in (out, str(plan))
    )
    assert same == again
    document = json.loads(cli("check old.md bare.keras --loss mse --epochs 3 --json")[1])
    assert (document["epochs"], document["problems"]) == (3, [])
    # From 3.16 on the paths in a loaded model begin with its name.
    variables = document["modifiers"][-1]["variables"]
    assert [name.removeprefix("mlp/") for name in variables] == ["hidden/kernel", "out/kernel"]


def test_check_exits_with_1_where_there_are_problems(cli, old):
    code, out, _ = cli("check old.md model.keras --steps-per-epoch 2 --epochs 2 --var last=4 --data data.npz --json")
    assert code == 1
    (problem,) = json.loads(out)["problems"]
    assert "end_epoch=3" in problem["message"]


def test_convert_writes_what_reads_back_equal(cli, old, tmp_path):
    assert cli("convert old.md new.yaml")[:2] == (0, "Wrote new.yaml.\n")
    assert kw.load_recipe("new.yaml") == old
    written = (tmp_path / "new.yaml").read_text()
    code, _, err = cli("convert old.md new.yaml")
    assert (code, err) == (
        1,
        "keras-woodfisher: error: new.yaml exists. Give another name, or --force to overwrite it.\n",
    )
    assert cli("convert new.yaml new.yaml --force")[0] == 0
    assert (tmp_path / "new.yaml").read_text() == written
    assert "new.md must end in .yaml or .yml" in cli("convert old.md new.md")[2]


def test_wrong_recipes_are_one_line(cli, tmp_path):
    (tmp_path / "wrong.yaml").write_text(OLD.split("---")[1].replace("num_grads", "num_grad"))
    code, _, err = cli("check wrong.yaml model.keras")
    assert code == 1
    assert err.startswith("keras-woodfisher: error: wrong.yaml, line ")
    assert "num_grads" in err
    assert err.count("\n") == 1
    assert "There is no recipe file none.yaml." in cli("check none.yaml model.keras")[2]
    (tmp_path / "old.md").write_text(OLD)
    err = cli("check old.md model.keras --var gaol=1")[2]
    assert "gaol" in err and "goal" in err, "the nearest is named"


def test_a_file_that_names_the_optimizer_of_torch(tmp_path):
    # As Keras writes it there; any other backend then fails in the first step.
    model = keras.Sequential([layers.Input((3,)), layers.Dense(2)])
    model.compile(keras.optimizers.Adam(0.125), "mse", metrics=["mae"])
    model.save(tmp_path / "here.keras")
    with zipfile.ZipFile(tmp_path / "here.keras") as here, zipfile.ZipFile(tmp_path / "torch.keras", "w") as there:
        for name in here.namelist():
            content = here.read(name)
            if name == "config.json":
                config = json.loads(content)
                config["compile_config"]["optimizer"]["module"] = "keras.src.backend.torch.optimizers.torch_adam"
                content = json.dumps(config).encode()
            there.writestr(name, content)
    loaded = files.load_model(str(tmp_path / "torch.keras"))
    loaded.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    assert type(loaded.optimizer) is type(model.optimizer)
    assert loaded.optimizer.get_config()["learning_rate"] == 0.125
    assert ops.convert_to_numpy(loaded.optimizer.iterations) == 1
    assert "mae" in loaded.evaluate(np.ones((4, 3)), np.ones((4, 2)), verbose=0, return_dict=True)


def test_values_of_variables_are_numbers_lists_or_text(cli, monkeypatch):
    seen = {}
    monkeypatch.setattr(kw, "load_recipe", lambda path, variables: seen.update(variables or {}))
    files.load_recipe("data.npz", [("a", "1e-5"), ("b", "3"), ("c", "[conv1, 2]"), ("d", '["x"]'), ("e", "cubic")])
    assert seen == {"a": 1e-5, "b": 3, "c": "[conv1, 2]", "d": ["x"], "e": "cubic"}


# --- wrong usage, wrong files ------------------------------------------------------------------------------------

PRUNE = "prune model.keras --out p.keras --data data.npz"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "arguments are required: COMMAND"),
        (PRUNE, "one of the arguments --recipe --sparsity is required"),
        (f"{PRUNE} --recipe r.yaml --sparsity 0.5", "not allowed with"),
        (f"{PRUNE} --sparsity 90", r"must be a fraction in \[0, 1\), got 90: write 0.9 for 90 %"),
        (f"{PRUNE} --sparsity nan", "must be a fraction"),
        (f"{PRUNE} --sparsity much", "must be a number, got 'much'"),
        (f"{PRUNE} --sparsity 80%", r"must be a number, got '80%'\. Write 0\.8 for 80 %\."),
        (f"{PRUNE} --sparsity 0.5 --num-grads 0", "must be a whole number of at least 1, got '0'"),
        (f"{PRUNE} --sparsity 0.5 --memory-limit lots", "must be a size such as 4GiB or 500MB, got 'lots'"),
        (f"{PRUNE} --sparsity 0.5 --memory-limit 0GB", "must be a size such as 4GiB or 500MB, got '0GB'"),
        (f"{PRUNE} --sparsity 0.5 --damp 0", "must be above 0 and finite, got 0"),
        (f"{PRUNE} --sparsity 0.5 --var a=1", "--var sets a variable of a recipe: give --recipe"),
        (f"{PRUNE} --recipe r.yaml --var a", "must be NAME=VALUE, got 'a'"),
        (f"{PRUNE} --recipe r.yaml --num-grads 9", "--num-grads has no effect beside --recipe; set it in the recipe"),
        (f"{PRUNE} --recipe r.yaml --exclude a", "--exclude has no effect beside --recipe"),
        (f"{PRUNE} --sparsity 0.5 --mask-type 4:2", "must be unstructured, .* N:M such as 2:4, .*got '4:2'"),
        (f"{PRUNE} --recipe r.yaml --mask-type 2:4", "--mask-type has no effect beside --recipe"),
        (f"{PRUNE} --sparsity 0.5 --method magnitude --damp 1", "--damp has no effect beside --method magnitude"),
        (f"{PRUNE} --sparsity 0.5 --method magnitude --loss mse", "--loss has no effect: nothing takes gradients"),
        (f"{PRUNE} --sparsity 0.5 --learning-rate 1", "--learning-rate is for fine-tuning: give --epochs"),
        (f"{PRUNE} --sparsity 0.5 --batch-size 8", "--batch-size is for --epochs and --eval"),
        ("prune model.keras --out p.keras --recipe r.yaml --epochs 1", "--data is needed for training"),
        ("prune model.keras --out p.keras --sparsity 0.5", "--data is needed; only --method magnitude works without"),
        (f"{PRUNE} --sparsity 0.5 --backend numpy", "invalid choice: 'numpy'"),
        (f"{PRUNE} --sparsity 0.5 --meth magnitude", "unrecognized arguments: --meth"),
    ],
)
def test_wrong_usage_exits_with_2(cli, command, message):
    code, out, err = cli(command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("p.h5", "p.h5 must end in .keras."),
        ("model.keras", "model.keras exists. Give another name, or --force to overwrite it."),
        ("nowhere/p.keras", "The folder nowhere of nowhere/p.keras doesn't exist. Create it first."),
        ("data.npz/p.keras", "data.npz isn't a folder"),
        ("folder.keras", "folder.keras is a folder. Name a file in it."),
    ],
)
def test_an_output_that_cannot_be_written_ends_it_before_any_work(cli, monkeypatch, tmp_path, out, message):
    (tmp_path / "folder.keras").mkdir()
    monkeypatch.setattr(files, "load_model", None)
    code, _, err = cli(f"prune model.keras --data data.npz --sparsity 0.5 --out {out}")
    assert code == 1
    assert err.startswith(f"keras-woodfisher: error: {message}")
    assert err.count("\n") == 1


def test_a_full_disk_is_found_before_any_work(cli, monkeypatch, tmp_path):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device", None)

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(files, "load_model", None)
    code, _, err = cli("prune model.keras --sparsity 0.5 --method magnitude --out p.keras")
    assert code == 1
    assert re.search(r"The folder \. can't be written to \(No space left on device, .*Choose another place for p", err)
    assert not list(tmp_path.glob(".p*")), "nothing is left"


def test_a_folder_that_takes_no_file_is_found_before_any_work(cli, monkeypatch):
    # Root may write anywhere but here.
    monkeypatch.setattr(files, "load_model", None)
    code, _, err = cli("prune model.keras --sparsity 0.5 --method magnitude --out /proc/p.keras")
    assert code == 1
    assert err.startswith("keras-woodfisher: error: The folder /proc can't be written to (")
    assert err.endswith("Choose another place for p.keras.\n")


@pytest.mark.parametrize("name", ["a" * 249, "\N{SNOWMAN}" * 80])
def test_names_as_long_as_a_folder_allows(cli, name):
    assert cli(f"prune model.keras --sparsity 0.5 --method magnitude --out {name}.keras --quiet")[0] == 0
    assert zeros(f"{name}.keras") == 120
    code, _, err = cli(f"prune model.keras --sparsity 0.5 --method magnitude --out {name}too-long-by-far.keras --quiet")
    assert code == 1 and "File name too long" in err


def test_a_link_that_leads_nowhere_is_a_file_that_is_there(cli, tmp_path):
    (tmp_path / "link.keras").symlink_to("nowhere.keras")
    command = "prune model.keras --sparsity 0.5 --method magnitude --out link.keras"
    assert "link.keras exists. Give another name, or --force" in cli(command)[2]
    assert (tmp_path / "link.keras").is_symlink()
    assert cli(f"{command} --force")[0] == 0
    # What it leads to is written, as everywhere.
    assert (tmp_path / "link.keras").is_symlink() and zeros("nowhere.keras") == 120


def test_what_is_no_file_is_not_overwritten(cli, tmp_path):
    os.mkfifo(tmp_path / "pipe.keras")
    code, _, err = cli("prune model.keras --sparsity 0.5 --method magnitude --out pipe.keras --force")
    assert (code, "pipe.keras is a named pipe. Give another name." in err) == (1, True)


def test_force_overwrites(cli, tmp_path):
    (tmp_path / "p.keras").write_text("old")
    assert cli("prune model.keras --sparsity 0.5 --method magnitude --out p.keras --force")[0] == 0
    assert zeros("p.keras") == 120


@pytest.mark.parametrize(("error", "code"), [(OSError("disk full"), 1), (KeyboardInterrupt(), 130)])
def test_a_failure_while_saving_leaves_the_old_file_and_no_other(cli, monkeypatch, tmp_path, error, code):
    (tmp_path / "p.keras").write_text("old")
    before = sorted(os.listdir())

    def save(self, path):
        with open(path, "w") as file:
            file.write("half")
        raise error

    monkeypatch.setattr(keras.Model, "save", save)
    found, out, err = cli("prune model.keras --sparsity 0.5 --method magnitude --out p.keras --force --json")
    assert (found, out) == (code, "")
    assert err == f"keras-woodfisher: {'error: disk full' if code == 1 else 'interrupted'}\n"
    assert (tmp_path / "p.keras").read_text() == "old"
    assert sorted(os.listdir()) == before


X, Y = np.zeros((4, 12), "float32"), np.zeros(4, "int64")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": X, "labels": Y}, "holds images, labels. Wanted are x and y, and perhaps sample_weight"),
        ({"x": X}, "holds x. Wanted are x and y"),
        ({"x": X, "y": Y, "z": Y}, "holds x, y, z. Wanted are x and y"),
        ({"x": X, "x_b": X, "y": Y}, "holds x, x_b, y. Wanted are x and y"),
        ({"x": X, "y": Y[:3]}, "arrays of different lengths, or empty ones: x 4, y 3. Give one row an example."),
        ({"x": X[:0], "y": Y[:0]}, "or empty ones: x 0, y 0"),
        ({"x": X, "y": np.array(5)}, "x 4, y 0"),
        ({"x": X, "y": np.array([None] * 4)}, "y in bad.npz can't be read.*pickled objects are refused"),
    ],
)
def test_wrong_data_is_explained(tmp_path, monkeypatch, arrays, message):
    monkeypatch.chdir(tmp_path)
    np.savez("bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_data("bad.npz")


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "text.npz").write_text("x")
    with pytest.raises(ValueError, match=r"isn't an .npz file. Write one with numpy.savez"):
        load_data(str(tmp_path / "text.npz"))
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none.npz"):
        load_data(str(tmp_path / "none.npz"))
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(ValueError, match=r"x.npy must be a file that ends in .npz"):
        load_data(str(tmp_path / "x.npy"))


def test_images_become_floats_unscaled_and_labels_integers(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, x=np.full((2, 3), 255, "uint8"), y=np.array([1, 2], "uint8"))
    data = load_data(str(path))
    assert (data.x.dtype, data.x.max(), data.y.dtype, data.sample_weight) == (np.float32, 255.0, np.int32, None)
    np.savez(path, x_image=np.zeros((2, 3), "uint8"), x_tokens=np.ones((2, 5), "int32"), y=np.array([0.5, 1.5]))
    data = load_data(str(path))
    assert {name: array.dtype for name, array in data.x.items()} == {"image": np.float32, "tokens": np.int32}
    assert data.y.dtype == np.float64


def test_a_model_with_several_inputs(cli):
    inputs = {"a": layers.Input((3,), name="a"), "b": layers.Input((2,), name="b")}
    keras.Model(inputs, layers.Dense(1)(layers.concatenate(list(inputs.values())))).save("two.keras")
    rng = np.random.default_rng(0)
    np.savez("two.npz", x_a=rng.normal(size=(9, 3)), x_b=rng.normal(size=(9, 2)), y=rng.normal(size=(9, 1)))
    code, out, err = cli("prune two.keras --data two.npz --eval two.npz --loss mse --sparsity 0.4 --out p.keras --json")
    assert code == 0, err
    assert json.loads(out)["report"]["pruned"] == 2
    assert json.loads(out)["evaluation"]["after"].keys() == {"loss"}, "no accuracy of a regression"


class Own(layers.Dense):
    """A layer that the command can't know."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: layers.Lambda(lambda x: x + 1), "it holds a Lambda layer, whose Python code could do anything"),
        (lambda: Own(2), "it uses the class 'Own' of somebody's own, which this command can't import"),
    ],
)
def test_models_with_code_are_refused_in_one_line(cli, monkeypatch, layer, message):
    keras.Sequential([layers.Input((3,)), layer(), layers.Dense(2)]).save("own.keras")
    monkeypatch.setattr(sys.modules[__name__], "Own", None)
    code, _, err = cli("inspect own.keras")
    assert code == 1
    assert err.startswith(f"keras-woodfisher: error: own.keras can't be loaded: {message}")
    assert err.count("\n") == 1


def own_loss(y, z):
    """A loss that the command can't know."""
    return keras.ops.mean(keras.ops.square(y - z))


@pytest.mark.parametrize(("options", "code"), [("", 0), ("--loss mse --quality fast", 0), ("--quality fast", 1)])
def test_a_model_that_is_compiled_with_a_loss_of_ones_own(cli, options, code):
    model = keras.Sequential([layers.Input((3,)), layers.Dense(4), layers.Dense(2)])
    model.compile("sgd", own_loss)
    model.save("own.keras")
    rng = np.random.default_rng(0)
    np.savez("own.npz", x=rng.normal(size=(32, 3)), y=rng.normal(size=(32, 2)))
    found, _, err = cli(f"prune own.keras --data own.npz --sparsity 0.5 --out p.keras {options}")
    assert found == code, err
    assert "own.keras is compiled with the function 'own_loss' of somebody's own" in err
    assert ("needs --loss" in err) == bool(code)


def test_tokens_that_the_model_does_not_have_are_told_with_the_file(cli):
    parts = [layers.Embedding(10, 4, name="table"), layers.Flatten(), layers.Dense(2)]
    keras.Sequential([layers.Input((6,), dtype="int32"), *parts]).save("tokens.keras")
    np.savez("tokens.npz", x=np.full((8, 6), 12))
    code, _, err = cli("prune tokens.keras --data tokens.npz --sparsity 0.5 --out p.keras")
    assert code == 1 and "tokens.npz: data holds the token 12, but 'table' has 10 embeddings" in err


def test_what_comes_up_within_a_layer_is_told_in_one_line(cli):
    keras.Sequential([layers.Input((3,)), layers.Dense(4), layers.Dense(2)]).save("plain.keras")
    np.savez("nan.npz", x=np.full((8, 3), np.nan))
    code, _, err = cli("prune plain.keras --data nan.npz --sparsity 0.5 --out p.keras")
    assert code == 1 and err.splitlines()[-1].startswith("keras-woodfisher: error: What the layer of ")
    assert "Exception encountered" not in err and "\x1b" not in err


def test_files_that_are_no_models(cli, tmp_path):
    (tmp_path / "text.keras").write_text("x")
    assert "text.keras isn't a .keras file (a zip archive)" in cli("inspect text.keras")[2]
    assert "There is no file none.keras." in cli("inspect none.keras")[2]
    assert "data.npz must be a file that ends in .keras." in cli("inspect data.npz")[2]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("", "The model isn't compiled, so --data needs --loss. The usual ones: sparse_categorical_crossentropy"),
        ("--loss sparse_categorical_crosentropy", "isn't a loss of Keras. The nearest is sparse_categorical_cross"),
        ("--loss mse:from_logits", "--loss mse:from_logits: mse doesn't take logits. Leave out :from_logits."),
        (f"--loss {LOGITS}=1", "only :from_logits may follow a name"),
        ("--loss mse:logits", "only :from_logits may follow a name"),
        ("--loss mse", "got labels of shape () for outputs of shape (3,). Where labels are classes"),
        (f"--loss {LOSS}", f"they are logits. Write --loss {LOGITS}."),
    ],
)
def test_losses_are_checked_before_pruning(cli, asked, loss, message):
    code, _, err = cli(f"prune bare.keras --data data.npz --sparsity 0.5 --method woodfisher --out p.keras {loss}")
    assert code == 1
    assert message in err
    assert not asked


def test_a_loss_is_the_same_by_each_of_its_names(cli, asked):
    keras.Sequential([layers.Input((12,)), layers.Dense(1, kernel_initializer="ones")]).save("binary.keras")
    with np.load("data.npz") as file:
        np.savez("binary.npz", x=file["x"], y=file["y"][:, None] > 0)
    command = "prune {} --sparsity 0.5 --method woodfisher --out p.keras --force --loss {}"
    binary, classes = "binary.keras --data binary.npz", "bare.keras --data data.npz"
    names = {"bce": binary, "BCE": binary, "BinaryCrossentropy": binary, "SparseCategoricalCrossentropy": classes}
    for name, files_of in names.items():
        code, _, err = cli(command.format(files_of, name))
        assert (code, f"they are logits. Write --loss {name}:from_logits." in err) == (1, True), err
        code, _, err = cli(command.format(files_of, f"{name}:from_logits"))
        assert code == 0 and asked["loss"].get_config()["from_logits"], err
    for name in ("kld", "KLDivergence", "dice"):
        code, _, err = cli(command.format(binary, name))
        assert (code, f"--loss {name} takes probabilities" in err, "end the model with a softmax" in err) == (1, 1, 1)
    assert cli(command.format(binary, "mse"))[0] == 0


def test_reconstruction_needs_neither_labels_nor_a_loss(cli, tmp_path):
    with np.load(tmp_path / "data.npz") as file:
        np.savez(tmp_path / "x.npz", x=file["x"])
    code, out, err = cli("prune bare.keras --data x.npz --sparsity 0.5 --out p.keras --json --num-examples 40")
    assert code == 0, err
    report = json.loads(out)["report"]
    assert report["settings"]["method"] == "reconstruct" and report["reconstruction"]["examples"] == 40
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    for more in ("--method woodfisher", "--quality fast", "--damp 0.1", "--epochs 1"):
        code, _, err = cli(f"prune model.keras --data x.npz --sparsity 0.5 --out q.keras {more}")
        assert (code, "holds x. Wanted are x and y" in err) == (1, True), more
    code, _, err = cli("prune model.keras --data x.npz --sparsity 0.5 --out q.keras --method reconstruct --damp 0.1")
    assert code == 2 and "--damp has no effect beside --method reconstruct" in err
    code, _, err = cli("prune model.keras --sparsity 0.5 --out q.keras --method magnitude --num-examples 9")
    assert code == 2 and "--num-examples has no effect beside --method magnitude" in err


def test_labels_and_a_loss_are_asked_for_where_something_needs_them(cli, old, tmp_path):
    with np.load(tmp_path / "data.npz") as file:
        np.savez(tmp_path / "x.npz", x=file["x"])
    (tmp_path / "reconstruct.yaml").write_text("modifiers:\n  - !ReconstructionModifier {final_sparsity: 0.5}\n")
    magnitude = OLD.split("---")[1].replace("MFAC", "GM").partition("    mfac_options")[0]
    (tmp_path / "magnitude.yaml").write_text(magnitude)
    (tmp_path / "buffer.yaml").write_text(OLD.split("---")[1].replace("{num", "{use_gradient_buffering: true, num"))
    sensitivity = f"sensitivity bare.keras --data x.npz --levels 0.5 --loss {LOGITS}"
    for command in (
        "prune bare.keras --data x.npz --recipe reconstruct.yaml --out p.keras",
        "prune bare.keras --data x.npz --recipe magnitude.yaml --out q.keras",
        "check reconstruct.yaml model.keras --data x.npz",
        "check buffer.yaml model.keras --data x.npz --var goal=0.3",
        f"{sensitivity} --method reconstruct --eval held_out.npz",
    ):
        code, _, err = cli(command)
        assert code == 0, (command, err)
    for command in (
        "prune model.keras --data x.npz --recipe old.md --out r.keras",
        "prune model.keras --data x.npz --recipe reconstruct.yaml --epochs 1 --out r.keras",
        "check old.md model.keras --data x.npz",
        f"{sensitivity} --method reconstruct",
    ):
        code, _, err = cli(command)
        assert (code, "holds x. Wanted are x and y" in err) == (1, True), (command, err)
    command = "prune bare.keras --data x.npz --recipe reconstruct.yaml --eval held_out.npz --out r.keras"
    assert "so --eval needs --loss" in cli(command)[2]
    assert "they are logits" in cli(f"check old.md bare.keras --data data.npz --loss {LOSS}")[2]


def test_an_error_is_one_line_and_debug_adds_the_traceback(cli):
    command = "prune model.keras --data data.npz --sparsity 0.5 --out p.keras --num-grads 97"
    code, out, err = cli(command)
    assert (code, out) == (1, "")
    assert err.startswith("keras-woodfisher: error: num_grads=97 with grad_batch_size=1 needs 97 examples")
    assert err.count("\n") == 1
    assert "Traceback" in cli(f"{command} --debug")[2]
    err = cli("prune model.keras --data data.npz --sparsity 0.5 --out p.keras --params hiden/kernel")[2]
    assert err.startswith("keras-woodfisher: error: params names 'hiden/kernel'"), "a KeyError without its quotes"


@pytest.mark.parametrize(
    ("stream", "error", "code", "said"),
    [
        ("stdout", None, 0, ""),
        ("stdout", BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        ("stdout", OSError(errno.ENOSPC, "No space left"), 1, "the work is done, but standard output can't be written"),
        ("stderr", None, 0, ""),
        ("stderr", BrokenPipeError(errno.EPIPE, "Broken pipe"), 0, ""),
    ],
)
def test_an_answer_that_nobody_reads_is_no_failure_of_the_work(cli, monkeypatch, stream, error, code, said):
    class Closed(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, stream, error and Closed())
    more = "--quiet" if error else "--data data.npz --epochs 1"
    found, _, err = cli(f"prune model.keras --sparsity 0.5 --method magnitude --out p.keras {more}")
    assert found == code and said in err and ("error" in err) == bool(said)
    assert zeros("p.keras") == 120


def test_a_warning_is_one_line(cli):
    model = classifier()
    model.get_layer("hidden").trainable = False
    model.save("frozen.keras")
    err = cli("prune frozen.keras --sparsity 0.5 --method magnitude --out p.keras --json")[2]
    assert err.startswith("keras-woodfisher: warning: Frozen variables are left as they are: ")
    assert err.count("\n") == 1


# --- the other commands ------------------------------------------------------------------------------------------


def test_inspect_counts_zeros_and_bytes(cli):
    model = classifier()
    kernel = np.ones((16, 3), "float32")
    kernel[:10] = 0
    model.get_layer("out").kernel.assign(kernel)
    model.save("sparse.keras")
    code, out, err = cli("inspect sparse.keras --json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    _, last = document["variables"]
    assert (last["shape"], last["weights"], last["pruned"], last["sparsity"]) == ([16, 3], 48, 30, 30 / 48)
    assert last["bytes"] | {"gzip": 0} == {
        "dense": 192,
        "bitmask": 6 + 18 * 4,
        "csr": 18 * 4 + 18 * 2 + 4 * 2,
        "gzip": 0,
    }
    assert 0 < last["bytes"]["gzip"] < 192
    assert document["weights"] == 240
    for form, total in document["bytes"].items():
        assert total == sum(variable["bytes"][form] for variable in document["variables"])
    out = cli("inspect sparse.keras")[1].splitlines()
    assert out[0].split() == ["variable", "shape", "weights", "pruned", "sparsity", "dense", "bitmask", "CSR", "gzip"]
    assert out[-1].split()[:7] == ["total", "240", "30", "0.1250", "960", "870", f"{document['bytes']['csr']:,}"]


def test_inspect_of_a_model_without_kernels(cli):
    keras.Sequential([layers.Input((3,)), layers.LayerNormalization()]).save("none.keras")
    code, out, _ = cli("inspect none.keras")
    assert code == 0
    assert out.splitlines()[-1].split()[:3] == ["total", "0", "0"]


def test_demo_compares_magnitude_with_woodfisher(cli, monkeypatch):
    methods = {"magnitude": {}, "woodfisher": {"num_grads": 64}, "reconstruct": {}}
    for name, value in {"_SPARSITIES": (0.9,), "_TRAIN": 640, "_EPOCHS": 5, "_METHODS": methods}.items():
        monkeypatch.setattr(f"keras_woodfisher.cli.demo.{name}", value)
    code, out, err = cli("demo --json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    (row,) = document["rows"]
    assert row["magnitude"] < row["woodfisher"]
    # Newton steps train a little, too.
    assert abs(row["woodfisher"] - document["dense"]) < 0.05
    assert document["dense"] > 0.8


def test_demo_without_scikit_learn_names_the_extra(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, err = cli("demo")
    assert code == 1
    assert "pip install 'keras-woodfisher[demo]'" in err


# --- the process -------------------------------------------------------------------------------------------------


def start(*words, folder, **env):
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ | env, capture_output=True, text=True, check=False
    )


@pytest.mark.once
def test_backend_is_chosen_before_keras_is_imported(shelf, tmp_path):
    done = start(
        *("-m", "keras_woodfisher.cli", "prune", str(shelf / "model.keras"), "--method", "magnitude"),
        *("--sparsity", "0.5", "--backend", OTHER, "--out", "p.keras", "--json"),
        folder=tmp_path,
        KERAS_BACKEND=NAME,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == OTHER
    assert zeros(tmp_path / "p.keras") == 120


def test_another_backend_is_refused_once_keras_is_loaded(cli):
    code, _, err = cli(f"inspect model.keras --backend {OTHER}")
    assert code == 1
    assert f"--backend {OTHER} comes too late: Keras runs on {NAME} in this process." in err
    assert f"set KERAS_BACKEND={OTHER}" in err


@pytest.mark.once
def test_an_error_of_the_process(tmp_path):
    done = start("-m", "keras_woodfisher.cli", "inspect", "none.keras", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "keras-woodfisher: error: There is no file none.keras."


@pytest.mark.once
def test_help_version_and_wrong_usage_need_no_keras(tmp_path):
    code = (
        "import sys\n"
        "from keras_woodfisher.cli import main\n"
        "for words in (['--help'], ['prune', '--help'], ['--version'], ['prune', 'x']):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as end:\n        print('code', end.code, 'keras' in sys.modules)\n"
    )
    done = start("-c", code, folder=tmp_path)
    ends = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert ends == ["code 0 False"] * 3 + ["code 2 False"], done.stderr
    assert f"keras-woodfisher {kw.__version__}" in done.stdout


def test_a_framework_that_is_missing_is_named(tmp_path):
    code = (
        "import sys\n"
        f"sys.modules[{OTHER!r}] = None\n"
        "from keras_woodfisher.cli import main\n"
        f"sys.exit(main(['demo', '--backend', {OTHER!r}]))\n"
    )
    done = start("-c", code, folder=tmp_path)
    assert done.returncode == 1
    assert f"pip install 'keras-woodfisher[{OTHER}]'" in done.stderr.splitlines()[-1]


# --- compress ----------------------------------------------------------------------------------------------------


def kinds(path):
    with zipfile.ZipFile(path) as archive:
        return {entry.compress_type for entry in archive.infolist()}


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_out_is_compressed_unless_told_otherwise(cli):
    code, out, err = cli("prune model.keras --sparsity 0.9 --method magnitude --out p.keras --json")
    assert (code, kinds("p.keras")) == (0, {zipfile.ZIP_DEFLATED}), err
    assert json.loads(out)["unpacked_bytes"] == sum(map(len, contents("p.keras").values()))
    code, _, err = cli("prune model.keras --sparsity 0.9 --method magnitude --out q.keras --uncompressed")
    assert (code, kinds("q.keras")) == (0, {zipfile.ZIP_STORED}), err
    assert contents("p.keras")["model.weights.h5"] == contents("q.keras")["model.weights.h5"]
    assert os.path.getsize("p.keras") < os.path.getsize("q.keras") / 2


@pytest.mark.once
def test_compress_writes_the_same_members(cli, monkeypatch):
    monkeypatch.setattr(keras.models, "load_model", None)
    code, out, err = cli("compress model.keras small.keras")
    assert (code, err, kinds("small.keras")) == (0, "", {zipfile.ZIP_DEFLATED})
    assert contents("small.keras") == contents("model.keras")
    assert out.startswith("Wrote small.keras: ")
    size = os.path.getsize("small.keras")
    code, out, err = cli("compress small.keras small.keras --force --json")
    found = json.loads(out)
    assert (code, found["bytes"], found["out_bytes"], os.path.getsize("small.keras")) == (0, size, size, size)


@pytest.mark.once
def test_compress_refuses_what_it_cannot_do(cli, tmp_path):
    assert "exists. Give another name, or --force" in cli("compress model.keras bare.keras")[2]
    assert "small.h5 must end in .keras" in cli("compress model.keras small.h5")[2]
    whole = (tmp_path / "model.keras").read_bytes()
    (tmp_path / "flipped.keras").write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    code, _, err = cli("compress flipped.keras small.keras")
    assert code == 1 and "flipped.keras is damaged (" in err
    assert not os.path.exists("small.keras") and not [name for name in os.listdir() if name.startswith(".")]
