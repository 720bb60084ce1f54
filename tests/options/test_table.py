"""The table of options, against everything that is made from it or has to agree with it."""

import inspect
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

import keras_woodfisher as kw
from keras_woodfisher.cli import arguments
from keras_woodfisher.cli.prune import options_of as passed_on
from keras_woodfisher.oneshot.presets import CHOSEN, PRESETS
from keras_woodfisher.options import pruning_options, table
from keras_woodfisher.options.kinds import COUNT, whole_text
from keras_woodfisher.options.option import CALLBACK, PRUNE, SENSITIVITY, UPDATE, option, options_of
from keras_woodfisher.options.pruning_options import PruningOptions

README = Path(__file__).parents[2] / "README.md"
RAMP = {"params": "__ALL__", "init_sparsity": 0.1, "final_sparsity": 0.5, "update_frequency": 1.0}
WRITTEN = RAMP | {"start_epoch": 0.0, "end_epoch": 1.0}


@pytest.mark.parametrize(
    ("caller", "function"), [(CALLBACK, kw.WoodFisherPruning), (PRUNE, kw.prune), (SENSITIVITY, kw.sensitivity)]
)
def test_public_signatures_agree_with_the_table(caller, function):
    written = {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "model"}
    rows = {row.name_in(caller): row.default_in(caller) for row in table.OPTIONS if caller in row.callers}
    assert written == {name: inspect.Parameter.empty if value is ... else value for name, value in rows.items()}


def test_presets_agree_with_the_table():
    rows = {row.name: row for row in table.OPTIONS}
    assert rows["quality"].choices_in(PRUNE) == tuple(PRESETS)
    by_quality = {row.name_in(PRUNE) for row in table.on_command_line(PRUNE) if row.default_in(PRUNE) is None}
    assert set(CHOSEN) <= by_quality


def test_the_documentation_has_the_table(tmp_path):
    text = README.read_text("utf-8")
    assert f"\n\n{table.documentation()}\n" in text, "python -m keras_woodfisher.options.table README.md"
    copy = tmp_path / "README.md"
    copy.write_text(text.replace("| `damp` |", "| `dump` |"), "utf-8")
    table.refresh(copy)
    assert copy.read_text("utf-8") == text


@dataclass(frozen=True, kw_only=True)
class WithHaste(PruningOptions):
    haste: int = option(3, COUNT, "how *hasty* `it` is", group=UPDATE, commands=(PRUNE,), second_order=True)


@pytest.fixture
def haste(monkeypatch):
    """An option that the table has for a while."""
    monkeypatch.setattr(pruning_options, "PruningOptions", WithHaste)
    monkeypatch.setattr(table, "OPTIONS", (*table.OPTIONS, options_of(WithHaste)[-1]))


def test_a_new_option_is_checked(haste):
    assert (WithHaste().haste, WithHaste(haste=5).haste) == (3, 5)
    with pytest.raises(ValueError, match="haste must be at least 1, got 0"):
        WithHaste(haste=0)


@pytest.mark.parametrize(("least", "text"), [(0, "0"), (1, "1"), (1, "12")])
def test_whole_numbers_begin_with_the_least(least, text):
    assert whole_text(least)(text) == int(text)


def test_a_new_option_is_on_the_command_line(haste, capsys):
    command = ["prune", "m.keras", "--out", "p.keras", "--haste", "4"]
    args = arguments.parse([*command, "--sparsity", "0.5", "--data", "d.npz"])
    assert passed_on(args) == {"haste": 4, "seed": 0}
    for wrong, message in (
        (["--sparsity", "0.5", "--haste", "0"], "argument --haste: must be a whole number of at least 1, got '0'"),
        (["--sparsity", "0.5", "--method", "magnitude"], "--haste has no effect beside --method magnitude"),
        (["--recipe", "r.yaml"], "--haste has no effect beside --recipe"),
    ):
        with pytest.raises(SystemExit):
            arguments.parse([*command, *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        arguments.parse(["prune", "--help"])
    assert "--haste N" in (said := capsys.readouterr().out)
    assert "how *hasty* it is (default 3)" in said


def test_a_new_option_is_documented(haste):
    assert table.documentation().endswith("| `haste` | 3 | how *hasty* `it` is |\n")


def test_a_new_option_is_a_field_of_recipes(haste, monkeypatch):
    monkeypatch.setattr(kw, "recipe", import_module("keras_woodfisher.recipe"))
    for name in [name for name in sys.modules if name.startswith("keras_woodfisher.recipe")]:
        monkeypatch.delitem(sys.modules, name)
    recipe = import_module("keras_woodfisher.recipe")
    for tag in ("WoodFisherPruningModifier", "OBSPruningModifier"):
        field = recipe.recipe_schema()["$defs"][tag]["properties"]["haste"]
        assert (field["default"], field["description"]) == (3, "How *hasty* it is.")
        loaded = recipe.load_recipe({"modifiers": [{tag: WRITTEN | {"haste": 5.0}}]})
        assert loaded.modifiers[0].haste == 5
        assert "haste: 5\n" in str(loaded)
        with pytest.raises(ValueError, match=f"{tag}.haste: haste must be at least 1, got 0"):
            recipe.load_recipe({"modifiers": [{tag: WRITTEN | {"haste": 0}}]})
    passed = import_module("keras_woodfisher.recipe.callbacks").pruning_arguments(loaded.modifiers[0])
    assert passed["haste"] == 5
