"""Reports as pages and as data. `make test-browser` looks at pages in a browser."""

import json
import pickle
from unittest.mock import MagicMock

import keras
import numpy as np
import pytest
from pages import HISTORY, HOSTILE, PRUNING, SENSITIVITY, VARIABLES, Page

import keras_woodfisher as kw
from keras_woodfisher.model.targets import all_targets, named_targets
from keras_woodfisher.reports.html.charts import curves
from keras_woodfisher.reports.storage import target_storage

REPORTS = (PRUNING, SENSITIVITY, PRUNING.batchnorm, PRUNING.reconstruction, kw.PruningReport(()))


@pytest.mark.once
@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_pages_are_well_formed_self_contained_and_escaped(report, tmp_path):
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    for found in (Page(text), Page(report._repr_html_())):
        assert "script" not in found.tags
        assert not {"src", "href", "onload"} & {name for name, _ in found.attributes}
        assert "url(" not in found.styles
        assert "import" not in found.styles
    assert "http" not in text
    assert text.startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.once
def test_a_page_holds_the_numbers_of_its_reports(tmp_path):
    PRUNING.save(str(tmp_path / "report.HTML"), SENSITIVITY)
    found = Page((tmp_path / "report.HTML").read_text("utf-8"))
    for v in VARIABLES:
        row = found.cells.index(v.name)
        assert found.cells[row : row + 5] == [
            v.name,
            str(v.shape),
            f"{v.weights:,}",
            str(v.pruned),
            f"{v.sparsity:.4f}",
        ]
    row = found.cells.index("total")
    assert found.cells[row : row + 5] == ["total", "", "1,205", "305", "0.2531"]
    assert ["2", "0.2500", "1.5", "nan", "0.5"] in [found.cells[at : at + 5] for at in range(len(found.cells))]
    for words in (f"A note of {HOSTILE}.", "<2:4>", "zero as a whole: long/name/kernel", "0.3566", "3 MiB"):
        assert words in found.words
    for entry in SENSITIVITY.entries:
        assert f"{entry.measured:.4f}" in found.cells
    # Losses, sparsity and accuracy over time; the six most sensitive variables.
    assert found.tags.count("svg") == 4
    assert found.words.count(f"{HOSTILE}_8") == 2
    assert found.words.count(f"{HOSTILE}_0") == 1
    with pytest.raises(AssertionError):
        Page("<p><b></p>")


@pytest.mark.once
def test_data_is_json(tmp_path):
    for report in REPORTS:
        report.save(tmp_path / "report.json")
        data = json.loads((tmp_path / "report.json").read_text("utf-8"))
        assert set(data) == set(report.as_dict())
    PRUNING.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert data["history"][0] == {"epoch": 0, "sparsity": 0.0, "logs": dict(HISTORY[0].logs)}
    assert data["history"][1]["logs"]["val_loss"] is None


@pytest.mark.once
def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"saved as \.html or \.json, got 'report\.pdf'"):
        PRUNING.save("report.pdf")
    with pytest.raises(ValueError, match="would hold one report, got 2"):
        PRUNING.save(tmp_path / "report.json", SENSITIVITY)
    with pytest.raises(TypeError, match="Only reports can stand on the same page, got 3"):
        PRUNING.save(tmp_path / "report.html", 3)
    with pytest.raises(FileNotFoundError):
        PRUNING.save(tmp_path / "nowhere" / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_curves_go_where_the_points_are():
    drawn = Page(curves({"a": [(0.0, 0.0), (1.0, 10.0), (2.0, float("inf")), (3.0, 5.0)]}, "t", "x"))
    places = [
        [float(v) for v in pair.split(",")]
        for key, line in drawn.attributes
        if key == "points"
        for pair in line.split()
    ]
    (x0, y0), (x1, y1), (x3, y3) = places
    assert (x1 - x0) / (x3 - x0) == pytest.approx(1 / 3, abs=1e-3)
    assert (y0 - y3) / (y0 - y1) == pytest.approx(1 / 2, abs=1e-3)
    assert drawn.tags.count("polyline") == 2, "what isn't finite interrupts a curve"
    assert curves({"a": [(0.0, float("nan"))]}, "t", "x") == ""
    assert "5" in Page(curves({"a": [(1.0, 5.0)]}, "t", "x")).words


def test_bytes_are_those_of_the_model_while_it_is_as_reported(tmp_path, make_mlp):
    model = make_mlp(compile=False)
    report = kw.prune(model, sparsity=0.5, method="magnitude", verbose=0)
    targets = named_targets(all_targets(model), "__ALL_PRUNABLE__")
    late = kw.sparsity_report(model)
    assert [v.storage for v in report.variables] == [target_storage(target) for target in targets]
    report.save(tmp_path / "report.html")
    found = Page((tmp_path / "report.html").read_text("utf-8"))
    for target in targets:
        size = target_storage(target)
        rows = [found.cells[at : at + 5] for at in range(len(found.cells))]
        assert [target.name, *(f"{n:,}" for n in (size.dense, size.bitmask, size.csr, size.gzip))] in rows
    targets[0].variable.assign(np.zeros(targets[0].variable.shape))
    assert report.variables[0].storage is not None, "it was measured before"
    assert late.variables[0].storage is None
    assert pickle.loads(pickle.dumps(report)).variables == report.variables
    assert "1 variables have changed since" in late.sections(whole=True)[3].body


def test_training_is_told_epoch_by_epoch_and_variable_by_variable(tmp_path, make_mlp, blobs):
    model = make_mlp()
    pruner = kw.WoodFisherPruning(0.75, end_epoch=2, method="magnitude", verbose=0, log_variables=True)
    assert kw.WoodFisherPruning.from_config(pruner.get_config()).get_config()["log_variables"] is True
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=False)
    # TensorBoard itself isn't installed for tests; Keras's callback hands it numbers through this module.
    board._summary_module = MagicMock()
    history = model.fit(*blobs, epochs=2, callbacks=[pruner, board], verbose=0).history
    report = pruner.report()
    assert [entry.sparsity for entry in report.history] == history["sparsity"]
    assert [entry.logs["loss"] for entry in report.history] == history["loss"]
    assert set(report.history[0].logs) == {"loss", "sparsity"}
    for v in report.variables:
        assert history[f"sparsity/{v.name}"][-1] == v.sparsity
    told = {call.args: call.kwargs["step"] for call in board.summary.scalar.call_args_list}
    assert all(told[f"epoch_sparsity/{v.name}", v.sparsity] == 1 for v in report.variables)

    holding = kw.KeepZeros(log_variables=True)
    history = model.fit(*blobs, callbacks=[holding], verbose=0).history
    assert [history[f"sparsity/{v.name}"] for v in report.variables] == [[v.sparsity] for v in report.variables]
    assert not any(
        key.startswith("sparsity/") for key in model.fit(*blobs, callbacks=[kw.KeepZeros()], verbose=0).history
    )
    with pytest.raises(TypeError, match="log_variables must be True or False, got 1"):
        kw.KeepZeros(log_variables=1)


def test_a_dry_run_is_a_page_too(make_mlp):
    recipe = kw.load_recipe(
        {
            "modifiers": [
                {"GMPruningModifier": {"start_epoch": 0.0, "end_epoch": 4.0, "update_frequency": 0.5}
                 | {"init_sparsity": 0.05, "final_sparsity": 0.875, "params": "__ALL_PRUNABLE__"}},
                {"ConstantPruningModifier": {"params": ["hiden/kernel"]}},
            ]
        }
    )  # fmt: skip
    check = kw.check_recipe(recipe, make_mlp(), 10, verbose=0)
    found = Page(check._repr_html_())
    assert all(str(problem) in found.words for problem in check.problems)
    assert all(f"{update.sparsity:.4f}" in found.cells for update in check.modifiers[0].updates)
    callbacks = recipe.callbacks if not check.problems else kw.Recipe(recipe.modifiers[:1]).callbacks
    assert callbacks(make_mlp(), log_variables=True)[0].get_config()["log_variables"] is True
