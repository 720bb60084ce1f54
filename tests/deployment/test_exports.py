"""Each format by its own runtime: `make test-exports`, in an environment with the extras."""

import json
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_woodfisher as kw
from keras_woodfisher.cli import main
from keras_woodfisher.deployment.exporting.formats import FORMATS

pytestmark = pytest.mark.exports
NAME = keras.backend.backend()
# What a backend can't do is refused: `test_exporting.py`.
PATHS = {"onnx": "m.onnx", "litert": "m.tflite", "tf_saved_model": "m", "openvino": "m.xml"}
HERE = [name for name, entry in FORMATS.items() if NAME in entry.backends]


@pytest.fixture(scope="module")
def net():
    """A small net whose kernels are pruned to 0.8, as a file and as a model, with examples and a dense twin."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.Conv2D(32, 1, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    dense = keras.models.clone_model(model)
    kw.prune(model, sparsity=0.8, method="magnitude", global_sparsity=False, verbose=0)
    return model, dense, np.random.default_rng(0).normal(size=(12, 8, 8, 3)).astype("float32")


def counts(model):
    kernels = [ops.convert_to_numpy(layer.kernel) for layer in model.layers if hasattr(layer, "kernel")]
    return sum(k.size for k in kernels), sum(int((k == 0).sum()) for k in kernels)


@pytest.mark.parametrize("name", HERE)
def test_the_file_computes_what_the_model_does(name, net, tmp_path):
    model, _, x = net
    wanted = ops.convert_to_numpy(model(x))
    labels = wanted.argmax(1)
    labels[:3] = (labels[:3] + 1) % 10
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = kw.export(model, tmp_path / PATHS[name], x, labels)
    assert report.difference < 1e-5 * report.scale and report.scale == pytest.approx(np.abs(wanted).max())
    assert (report.agreement, report.file.accuracy, report.keras_accuracy) == (1.0, 0.75, 0.75)
    # Keras writes the variables of a SavedModel twice.
    times = 2 if name == "tf_saved_model" and NAME == "tensorflow" else 1
    assert (report.file.weights, report.file.zeros) == tuple(times * n for n in counts(model))
    # It is whole where it is now.
    run = FORMATS[name].handler.load(str(tmp_path / PATHS[name]))
    np.testing.assert_allclose(run([x])[0], wanted, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == (2 if name == "openvino" else 1)


@pytest.mark.parametrize("name", [name for name in HERE if FORMATS[name].sparse])
def test_zeros_are_left_out_where_the_format_can(name, net, tmp_path):
    model, dense, x = net
    before = kw.export(dense, tmp_path / f"d{PATHS[name]}", x)
    full = kw.export(model, tmp_path / f"f{PATHS[name]}", x, sparse=False)
    small = kw.export(model, tmp_path / PATHS[name], x, sparse=True, dense=tmp_path / f"d{PATHS[name]}")
    assert before.file.sparse_tensors == full.file.sparse_tensors == 0 < small.file.sparse_tensors
    assert small.file.zeros == full.file.zeros == counts(model)[1]
    assert small.file.bytes < full.file.bytes - 1000
    assert small.dense == before.file and small.latency_ratio > 0


if "litert" in HERE:

    def test_int8_and_what_its_runtime_does_not_run(net, tmp_path):
        model, dense, x = net
        full = kw.export(dense, tmp_path / "f.tflite", x)
        report = kw.export(model, tmp_path / "q.tflite", x, quantize="int8", sparse=False)
        assert report.file.bytes < full.file.bytes and 0 < report.difference < 0.1 * report.scale
        assert report.file.zeros >= counts(model)[1]
        # XNNPACK doesn't run sparse int8 in fully connected layers.
        auto = kw.export(model, tmp_path / "a.tflite", x, quantize="int8")
        assert auto.file.sparse_tensors == 0 and "zeros are kept in full: the runtime doesn't run" in auto.notes[0]
        with pytest.raises(RuntimeError, match=r"doesn't run the file with sparse tensors.*Give sparse=False"):
            kw.export(model, tmp_path / "s.tflite", x, quantize="int8", sparse=True)
        assert not (tmp_path / "s.tflite").exists()


def test_several_inputs_and_outputs_keep_their_order(tmp_path):
    a, b = layers.Input((3,), name="z"), layers.Input((5,), name="a")
    model = keras.Model([a, b], [layers.Dense(4)(a), layers.Dense(2)(layers.Concatenate()([a, b]))])
    rng = np.random.default_rng(0)
    report = kw.export(model, tmp_path / "m.onnx", [rng.normal(size=(6, n)) for n in (3, 5)])
    assert report.difference < 1e-5 and report.agreement is None


def test_what_keras_cannot_export_says_why(tmp_path):
    class Odd(layers.Layer):
        def call(self, x):
            return ops.convert_to_tensor(ops.convert_to_numpy(x) + 1)

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    model = keras.Sequential([layers.Input((3,)), Odd()])
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(
        (RuntimeError, ValueError),
        match=r"couldn't export the model to onnx|differ from the Keras|The file takes 0 inputs",
    ):
        kw.export(model, path, np.random.default_rng(0).normal(size=(4, 3)).astype("float32"))
    assert path.read_bytes() == b"old"


def test_the_command_line_exports_and_inspects(net, tmp_path, monkeypatch, capsys):
    model, _, x = net
    monkeypatch.chdir(tmp_path)
    kw.save(model, "m.keras")
    np.savez("x.npz", x=x)
    assert main(["export", "m.keras", "m.onnx", "--data", "x.npz", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)["report"]
    assert main(["export", "m.keras", "m.onnx", "--data", "x.npz"]) == 1
    assert "m.onnx exists. Give another name, or --force" in capsys.readouterr().err
    assert main(["inspect", "m.onnx", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        (found["weights"], found["zeros"]) == (exported["file"]["weights"], exported["file"]["zeros"]) == counts(model)
    )
    assert sum(t["sparse"] for t in found["tensors"]) == exported["file"]["sparse_tensors"] > 0
    assert found["file_bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert main(["inspect", "m.onnx"]) == 0
    assert "sparse" in capsys.readouterr().out
    (tmp_path / "bad.onnx").write_bytes(b"no such thing")
    assert main(["inspect", "bad.onnx"]) == 1
    assert "bad.onnx can't be read as onnx" in capsys.readouterr().err
