import json
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.reports.pruning_report import combined

VARIABLES = (
    kw.VariableReport("a/kernel", (3, 400), 1200, 300),
    kw.VariableReport("long/name/kernel", (5,), 5, 5),
)
PHASES = (kw.PhaseReport("gradients", 1.234, 3 * 2**20), kw.PhaseReport("inverse", 0.5, None))


def test_the_table():
    report = kw.PruningReport(VARIABLES, PHASES, samples=64, notes=("One more thing.",))
    assert str(report).splitlines() == [
        "variable          shape     weights  pruned  sparsity",
        "-----------------------------------------------------",
        "a/kernel          (3, 400)    1,200     300    0.2500",
        "long/name/kernel  (5,)            5       5    1.0000",
        "-----------------------------------------------------",
        "total                         1,205     305    0.2531",
        "zero as a whole: long/name/kernel",
        "gradients: 1.23 s, 3 MiB at its peak",
        "inverse: 0.50 s",
        "One more thing.",
    ]


def test_totals():
    report = kw.PruningReport(VARIABLES)
    assert (report.weights, report.pruned) == (1205, 305)
    assert report.sparsity == 305 / 1205
    assert VARIABLES[0].sparsity == 0.25
    assert kw.PruningReport(()).sparsity == 0.0


def test_as_dict_is_json():
    report = kw.PruningReport(VARIABLES, PHASES, samples=64, notes=("n",))
    data = json.loads(json.dumps(report.as_dict()))
    assert data == report.as_dict()
    assert data["variables"][0] == {
        "name": "a/kernel",
        "shape": [3, 400],
        "weights": 1200,
        "pruned": 300,
        "sparsity": 0.25,
    }
    assert data["phases"][1] == {"name": "inverse", "seconds": 0.5, "peak_bytes": None}
    assert (data["weights"], data["pruned"], data["samples"]) == (1205, 305, 64)


def test_several_reports_as_one():
    first = kw.PruningReport(VARIABLES[:1], PHASES[:1], 4, ("n",), (kw.StageReport(0.1, 4, epoch=1.0),), {"damp": 1e-5})
    second = kw.PruningReport(VARIABLES[1:], PHASES, 6, ("n", "m"), (kw.StageReport(0.2, 6),), {"damp": 1e-4})
    both = combined([first, second], VARIABLES)
    assert both.variables == VARIABLES
    assert both.phases == (kw.PhaseReport("gradients", 2.468, 3 * 2**20), PHASES[1])
    assert (both.samples, both.notes) == (10, ("n", "m"))
    assert both.stages == first.stages + second.stages
    assert both.settings == {"1.damp": 1e-5, "2.damp": 1e-4}
    assert combined([first], VARIABLES[:1]) == first
    table = [line.split() for line in str(both).splitlines()]
    assert ["stage", "epoch", "sparsity", "samples", "damp"] in table
    assert ["2", "0.2000", "6", "-"] in table


def model_with_zeros():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(3, name="dense"),
        ],
        name="m",
    )
    kernel = np.ones((3, 3, 2, 4), "float32")
    kernel[0, 0] = 0.0  # 8 of 72
    model.get_layer("conv").kernel.assign(kernel)
    model.get_layer("dense").kernel.assign(np.ones((64, 3)))
    return model


def test_sparsity_report_counts_the_zeros_of_kernels():
    report = kw.sparsity_report(model_with_zeros())
    assert [(v.name, v.shape, v.weights, v.pruned) for v in report.variables] == [
        ("m/conv/kernel", (3, 3, 2, 4), 72, 8),
        ("m/dense/kernel", (64, 3), 192, 0),
    ]
    assert report.phases == ()
    json.dumps(report.as_dict())


def test_sparsity_report_of_named_variables():
    model = model_with_zeros()
    assert [v.weights for v in kw.sparsity_report(model, ["dense.weight", "conv/bias"]).variables] == [4, 192]
    assert [v.name for v in kw.sparsity_report(model, "re:dense").variables] == ["m/dense/kernel", "m/dense/bias"]
    with pytest.raises(KeyError, match=r"params names 'dens/kernel', which no variable has\. .*dense/kernel"):
        kw.sparsity_report(model, ["dens/kernel"])
    with pytest.raises(ValueError, match="isn't a regular expression"):
        kw.sparsity_report(model, "re:(")
    with pytest.raises(TypeError, match="params must be a name or a list of names, got 3"):
        kw.sparsity_report(model, 3)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("params", ["__ALL_PRUNABLE__", ["conv/kernel", "dense/kernel"]])
def test_frozen_variables_are_counted(params):
    model = model_with_zeros()
    model.trainable = False
    assert kw.sparsity_report(model, params).pruned == 8


def test_a_model_without_kernels():
    model = keras.Sequential([keras.Input((3,)), layers.LayerNormalization()])
    report = kw.sparsity_report(model)
    assert (report.weights, report.sparsity) == (0, 0.0)
    assert "total" in str(report)


def test_a_model_that_is_not_built():
    with pytest.raises(ValueError, match=r"'fresh' isn't built, so it has no weights yet.*Call it on a batch"):
        kw.sparsity_report(keras.Sequential([layers.Dense(2)], name="fresh"))


@pytest.fixture
def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_plot_shows_one_bar_a_variable(pyplot):
    # Two variables of the same name must not fall on one bar.
    report = kw.PruningReport((*VARIABLES, kw.VariableReport("a/kernel", (2,), 2, 1)))
    axes = report.plot()
    assert [bar.get_width() for bar in axes.patches] == [0.25, 1.0, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a/kernel", "long/name/kernel", "a/kernel"]
    heights = [axes.transData.transform((0, bar.get_y()))[1] for bar in axes.patches]
    assert heights == sorted(heights, reverse=True), "the first variable is on top"
    assert axes.get_xlim() == (0, 1)
    assert axes.get_legend().get_texts()[0].get_text() == f"total {report.sparsity:.4f}"


def test_plot_draws_where_it_is_told(pyplot):
    _, axes = pyplot.subplots()
    assert kw.PruningReport(VARIABLES).plot(ax=axes) is axes
    assert len(pyplot.get_fignums()) == 1


def test_plot_without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib.*pip install 'keras-woodfisher\[plot\]'"):
        kw.PruningReport(VARIABLES).plot()
