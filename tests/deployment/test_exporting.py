"""What is refused before any export, and how files are compared; exports themselves are `test_exports.py`'s."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.deployment.exporting import checking, formats
from keras_woodfisher.deployment.exporting.checking import Examples
from keras_woodfisher.deployment.exporting.tensors import bytes_of, files_of, is_weight, of_array

X = np.zeros((4, 6), "float32")


@pytest.fixture
def model():
    return keras.Sequential([layers.Input((6,)), layers.Dense(3)])


@pytest.fixture
def installed(monkeypatch):
    """As if every package were there."""
    monkeypatch.setattr(formats, "find_spec", lambda name: True)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("m.h5", {}, r"must end as one of the formats does: onnx \(\.onnx\), litert"),
        ("m.onnx", {"format": "torch"}, "format must be one of onnx"),
        ("m.tflite", {"format": "onnx"}, r"'onnx' must end in \.onnx"),
        ("m.onnx", {"format": "tf_saved_model"}, "must end in nothing, as a folder"),
        ("m.onnx", {"quantize": "int4"}, 'quantize must be None or "int8"'),
        ("m.onnx", {"quantize": "int8"}, "quantize='int8' is for litert; onnx has no such files"),
        ("m.xml", {"sparse": True}, "sparse=True is for onnx and litert; openvino has no such files"),
        ("m.onnx", {"dense": "none.onnx"}, "dense must be a file that was exported to onnx before"),
        ("m.onnx", {"examples": np.zeros((0, 6))}, r"one example a row, got shapes \[\(0, 6\)\]"),
        ("m.onnx", {"examples": [X, X[:2]]}, "one example a row"),
        ("m.onnx", {"labels": [0, 1]}, "the class of each of the 4 examples"),
        ("m.onnx", {"labels": [0.5, 0, 0, 0]}, "as whole numbers or one-hot"),
    ],
)
def test_wrong_arguments_are_refused(model, path, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        kw.export(model, path, **{"examples": X} | options)
    assert not list(tmp_path.iterdir())


def test_models_and_places_are_looked_at_first(model, tmp_path, installed):
    with pytest.raises(ValueError, match="takes a built Keras model"):
        kw.export(keras.Sequential([layers.Dense(3)]), tmp_path / "m.onnx", X)
    with pytest.raises(FileNotFoundError, match="doesn't exist"):
        kw.export(model, tmp_path / "none" / "m.onnx", X)
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        kw.export(model, tmp_path / "m.onnx", X)
    two = keras.Model(model.inputs, [model.outputs[0], model.outputs[0]])
    with pytest.raises(ValueError, match=r"labels need one output of shape \(N, classes\)"):
        kw.export(two, tmp_path / "n.onnx", X, [0, 1, 2, 0])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_what_a_backend_cannot_do_says_which_can(name, model, tmp_path, installed):
    backends, here = formats.FORMATS[name].backends, keras.backend.backend()
    if here in backends:
        formats.check_available(name)
        return
    path = tmp_path / f"m{formats.FORMATS[name].ending}"
    with pytest.raises(RuntimeError, match=f"Keras exports {name} from {' or '.join(backends)}, not from {here}"):
        kw.export(model, path, X)


def test_what_is_not_installed_is_named_with_its_extra(model, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else True)
    message = r"onnx needs onnxruntime, which isn't installed: pip install 'keras-woodfisher\[onnx\]'"
    with pytest.raises(ImportError, match=message):
        kw.export(model, tmp_path / "m.onnx", X)


@pytest.mark.once
def test_every_extra_is_one_of_the_package():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for entry in formats.FORMATS.values():
        extras = {entry.extra, *(extra for needs in entry.backends.values() for _, extra in needs)}
        assert extras <= set(project["optional-dependencies"])


def test_a_file_that_computes_something_else_is_not_written(model, tmp_path, installed, monkeypatch):
    """With a stand-in for a format, whose file holds the outputs that it gives."""

    class Handler:
        off = 0.0

        def write(self, model, path, request):
            with open(path, "w") as file:
                json.dump((checking.outputs_of_model(model, X)[0] + self.off).tolist(), file)

        def load(self, path):
            with open(path) as file:
                rows = np.array(json.load(file), "float32")
            return lambda inputs: [rows[: len(inputs[0])]]

        def tensors(self, path):
            return [of_array("kernel", np.eye(6, 3))]

    handler = Handler()
    monkeypatch.setattr(formats.Format, "handler", property(lambda self: handler))
    path = tmp_path / "m.onnx"
    report = kw.export(model, path, X, [0, 0, 0, 0])
    assert (report.file.weights, report.file.zeros, report.difference, report.agreement) == (18, 15, 0.0, 1.0)
    assert report.file.accuracy == report.keras_accuracy == 1.0
    assert report.file.bytes == path.stat().st_size and report.dense is report.latency_ratio is None
    before = path.read_bytes()
    handler.off = 0.1
    with pytest.raises(ValueError, match=r"differ from the Keras model's by up to 0\.1, .* so it isn't written"):
        kw.export(model, path, X)
    handler.off = np.nan
    with pytest.raises(ValueError, match="by up to nan"):
        kw.export(model, path, X)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    handler.off = 0.0
    again = kw.export(model, path, X, dense=path)
    assert again.dense.bytes == again.file.bytes and 0.2 < again.latency_ratio < 5
    assert "of the dense file's" in str(again) and json.dumps(again.as_dict())


@pytest.mark.once
def test_outputs_are_compared_by_their_definitions(model):
    a, b = np.array([[1.0, 2, 3], [3, 2, 1]]), np.array([[1.0, 2, 3.5], [1, 2, 0]])
    assert checking.differences([a], [b]) == (2.0, 3.5)
    assert checking.agreement_of([a], [b]) == 0.5
    assert checking.accuracy_of([a], np.array([2, 1])) == 0.5
    assert checking.agreement_of([a[:, :1]], [b[:, :1]]) is None, "one score: no classes"
    with pytest.raises(ValueError, match="outputs of shapes"):
        checking.differences([a], [b[:1]])
    found = Examples.of(model, X.astype("uint8"), np.eye(4))
    np.testing.assert_array_equal(found.labels, np.arange(4))
    assert found.given.dtype == found.inputs[0].dtype == "float32"


@pytest.mark.once
def test_bytes_and_weights_of_files(tmp_path):
    (tmp_path / "m.xml").write_bytes(b"graph")
    (tmp_path / "m.bin").write_bytes(bytes(1000))
    (tmp_path / "other.bin").write_bytes(b"1")
    assert [file.name for file in files_of(tmp_path / "m.xml")] == ["m.xml", "m.bin"]
    size, compressed = bytes_of(files_of(tmp_path / "m.xml"))
    assert size == 1005 and compressed < 100
    assert bytes_of(files_of(tmp_path))[0] == 1006
    kinds = [np.zeros((3, 3), dtype) for dtype in ("float32", "int8", "int64")]
    bias = np.zeros((1, 8, 1, 1), "float32")
    assert [is_weight(array) for array in [*kinds, np.zeros(3, "float32"), bias]] == [True, True, False, False, False]
    assert is_weight(np.zeros((8, 1), "float32")) and is_weight(np.zeros((3, 1, 8, 1), "float32"))
