"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib
import inspect
from pathlib import Path

import keras
import keras_woodfisher_backends
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw


def examples_of(package):
    """The docstrings of a package that have examples; modules without any aren't imported."""
    folder = Path(package.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        if ">>>" in path.read_text("utf-8"):
            dotted = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
            module = importlib.import_module(dotted)
            yield from (test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples)


FOUND = [test for package in (kw, keras_woodfisher_backends) for test in examples_of(package)]


@pytest.fixture
def names(rng, tmp_path, monkeypatch):
    """What examples may use: `keras`, `kw`, `np`, a classifier `model` of points in the plane, its data `x` and `y`."""
    monkeypatch.chdir(tmp_path)
    x = rng.normal(size=(240, 2)).astype("float32")
    y = (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0)
    model = keras.Sequential(
        [
            layers.Input((2,)),
            layers.Dense(16, activation="relu", name="hidden"),
            layers.BatchNormalization(),
            layers.Dense(3, name="out"),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return {"keras": keras, "kw": kw, "np": np, "model": model, "x": x, "y": y}


@pytest.mark.parametrize("test", FOUND, ids=lambda test: test.name)
def test_the_example_runs(test, names):
    test.globs.update(names)
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
    assert outcome.failed == 0
    assert not any(doctest.SKIP in example.options for example in test.examples)


@pytest.mark.parametrize("name", kw.__all__)
def test_every_public_name_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(kw, name))
