"""Files that are damaged, something else, or made to do harm: one line that names the file and the mend, at once."""

import io
import json
import os
import signal
import socket
import zipfile
from contextlib import contextmanager

import keras
import numpy as np
import pytest
from keras import layers

X, Y = np.ones((6, 12), "float32"), np.array([0, 1, 2] * 2)
ONE_SHOT = "--sparsity 0.5 --quality fast --num-grads 2 --out p.keras --quiet"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    np.savez(folder / "data.npz", x=X, y=Y)
    model = keras.Sequential([layers.Input((12,)), layers.Dense(3, name="out")])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.save(folder / "model.keras")
    return folder


def command(file):
    """Reads the file."""
    if file.endswith(".npz"):
        return f"prune model.keras --data {file} {ONE_SHOT}"
    return f"inspect {file}" if file.endswith(".keras") else f"check {file} model.keras"


@contextmanager
def within(seconds):
    """Ends what would wait or read for ever."""

    def late(*args):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(cli, file):
    """The one line that a file is refused with."""
    with within(20):
        code, out, err = cli(command(file))
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("keras-woodfisher: error: "), err
    assert file in err
    return err


@pytest.mark.parametrize("ending", [".npz", ".keras", ".yaml"])
def test_what_is_no_ordinary_file_is_not_opened(cli, ending, tmp_path):
    os.mkfifo(f"pipe{ending}")
    os.symlink("/dev/zero", f"zeros{ending}")
    os.mkdir(f"folder{ending}")
    os.symlink("nowhere", f"link{ending}")
    os.symlink(f"circle{ending}", f"circle{ending}")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(f"socket{ending}")
    (tmp_path / f"empty{ending}").touch()
    found = {"pipe": "is a named pipe", "zeros": "is a device", "folder": "is a folder", "socket": "is a socket"}
    found |= {"link": "is a link to nowhere, which leads to no file", "circle": "is a link to circle"}
    found |= {"empty": r"is empty (0 bytes)"}
    for name, text in found.items():
        assert f"{name}{ending} {text}" in refused(cli, f"{name}{ending}")


def npy(header, values=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + values


def saved(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def pack(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


SHAPE = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(SHAPE % "(1000000000000,)"), "should hold 4,000,000,000,000 bytes for its shape"),
        (npy(SHAPE % "(-6, 12)", bytes(288)), "should hold -288 bytes"),
        (saved(X)[:-40], "should hold 288 bytes for its shape (6, 12), but has 248. Write it anew"),
        (npy("{'descr': '<f4', 'shape': (3,"), "has no header of an array that can be read. Write it anew"),
        (npy("(" * 5000), "has no header of an array"),
        (b"abc", "has no header of an array"),
        (saved(X.astype("complex64")), "it holds complex numbers (complex64). Save plain arrays of numbers"),
        (saved(X.astype("str")), "it holds text (<U32)"),
        (saved(np.array([b"a"] * 6)), "it holds bytes (|S1)"),
        (
            saved(np.array([None] * 6)),
            "it holds Python objects (object). Save plain arrays of numbers; pickled objects",
        ),
        (saved(np.zeros(6, "M8[s]")), "it holds dates (datetime64[s])"),
        (saved(np.zeros(6, [("a", "f4")])), "it holds records"),
    ],
)
@pytest.mark.parametrize("name", ["x", "y"])
def test_arrays_are_judged_by_their_headers(cli, content, message, name):
    pack("bad.npz", {"x.npy": saved(X), "y.npy": saved(Y)} | {f"{name}.npy": content})
    err = refused(cli, "bad.npz")
    assert message in err and name in err


def test_archives_that_are_damaged(cli, tmp_path):
    pack("text.npz", {"x": b"abc", "y": b"abc"})
    assert "holds x, which isn't an array. Wanted are x and y" in refused(cli, "text.npz")
    whole = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "part.npz").write_bytes(whole[:300])
    assert "is a part of an .npz file: its end is missing" in refused(cli, "part.npz")
    (tmp_path / "end.npz").write_bytes(whole[100:])
    assert "is damaged (" in refused(cli, "end.npz")
    (tmp_path / "flipped.npz").write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    assert "is damaged (Bad CRC-32 for file 'x.npy'). Write it anew" in refused(cli, "flipped.npz")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile("twice.npz", "w") as archive:
        for _ in range(2):
            archive.writestr("x.npy", saved(X))
    assert "holds two arrays of one name. Write it anew" in refused(cli, "twice.npz")
    (tmp_path / "array.npz").write_bytes(saved(X))
    assert "is a single array (.npy)" in refused(cli, "array.npz")


def test_a_bomb_is_known_by_its_headers(cli, monkeypatch):
    # 20 MB in 20 kB, of which nothing is unpacked: the labels are too few.
    pack("bomb.npz", {"x.npy": saved(np.zeros((20, 1_000_000), "uint8")), "y.npy": saved(Y)}, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    assert "arrays of different lengths, or empty ones: x 20, y 6" in refused(cli, "bomb.npz")
    monkeypatch.setattr("keras_woodfisher.cli.arrays.free_memory", lambda: 2**20)
    pack("large.npz", {"x.npy": saved(np.zeros((6, 1_000_000), "uint8")), "y.npy": saved(Y)}, zipfile.ZIP_DEFLATED)
    assert "large.npz holds 5.7 MiB, but 1.0 MiB of memory are free. Give fewer examples." in refused(cli, "large.npz")


def parts_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_models_are_judged_by_their_headers(cli, monkeypatch, tmp_path):
    parts = parts_of("model.keras")
    monkeypatch.setattr(keras.models, "load_model", None)
    pack("other.keras", {"a.txt": b"a"})
    assert "a zip archive without config.json and model.weights.h5, so it holds no model" in refused(cli, "other.keras")
    pack("zeros.keras", parts | {"model.weights.h5": bytes(5000)})
    assert "model.weights.h5 in it isn't an HDF5 file" in refused(cli, "zeros.keras")
    bomb = {"model.weights.h5": parts["model.weights.h5"][:8] + bytes(70_000_000)}
    pack("bomb.keras", parts | bomb, zipfile.ZIP_DEFLATED)
    assert "model.weights.h5 would unpack to 66.8 MiB from 0.1 MiB" in refused(cli, "bomb.keras")
    (tmp_path / "old.keras").write_bytes(parts["model.weights.h5"])
    assert "is an HDF5 file, the older format" in refused(cli, "old.keras")
    (tmp_path / "part.keras").write_bytes((tmp_path / "model.keras").read_bytes()[:3000])
    assert "is a part of a .keras file: its end is missing" in refused(cli, "part.keras")


def units(number):
    config = json.loads(parts_of("model.keras")["config.json"])
    config["config"]["layers"][1]["config"]["units"] = number
    return json.dumps(config).encode()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "it is damaged, or another release of Keras wrote it (JSONDecodeError"),
        (b"[1]", "it is damaged"),
        (b"null", "it is damaged"),
        (b"\xff\xfe{", "it is damaged"),
        (b"[" * 100_000 + b"]" * 100_000, "its config.json is nested too deeply. Save the model anew"),
        (-3, "units"),
    ],
)
def test_models_whose_configuration_is_damaged(cli, config, message):
    pack("bad.keras", parts_of("model.keras") | {"config.json": units(config) if isinstance(config, int) else config})
    err = refused(cli, "bad.keras")
    assert message in err and "bad.keras can't be loaded: " in err
    assert err.endswith("Save the model anew, or copy the file again.\n")


def test_models_whose_weights_are_damaged(cli, tmp_path):
    parts = parts_of("model.keras")
    weights = parts["model.weights.h5"]
    for bad in (weights[: len(weights) // 2], weights[:200] + bytes(1300) + weights[1500:], weights[:8]):
        pack("bad.keras", parts | {"model.weights.h5": bad})
        err = refused(cli, "bad.keras")
        assert "bad.keras can't be loaded: it is damaged" in err and "Save the model anew" in err
    whole = (tmp_path / "model.keras").read_bytes()
    middle = whole.index(weights) + len(weights) // 2
    (tmp_path / "bad.keras").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "Bad CRC-32 for file 'model.weights.h5'" in refused(cli, "bad.keras")


def test_names_that_are_no_utf8(cli, tmp_path):
    for name in ("data.npz", "model.keras"):
        os.rename(name, f"\udcff{name}")
    (tmp_path / "r\udcff.yaml").write_text("modifiers: [!EpochRangeModifier {end_epoch: 2}]")
    data = (
        "prune \udcffmodel.keras --data \udcffdata.npz --sparsity 0.5 --quality fast --num-grads 2 --out \udcff.keras"
    )
    code, out, err = cli(data)
    assert code == 0, err
    assert "Wrote \\udcff.keras" in out and os.path.exists("\udcff.keras")
    assert json.loads(cli(f"{data} --force --json")[1])["out"] == "\udcff.keras"
    assert cli("check r\udcff.yaml \udcffmodel.keras")[0] == 0
    assert "There is no file \\udcffnone.keras." in cli("inspect \udcffnone.keras")[2]


def test_arrays_of_the_other_byte_order(cli):
    pack("swapped.npz", {"x.npy": saved(X.astype(">f4")), "y.npy": saved(Y.astype(">i8"))})
    code, _, err = cli(command("swapped.npz"))
    assert code == 0, err


def test_labels_beyond_32_bits_stay_what_they_are(tmp_path):
    from keras_woodfisher.cli.arrays import load_data

    np.savez(tmp_path / "wide.npz", x=X, y=np.array([3 * 10**9] * 6))
    assert load_data(str(tmp_path / "wide.npz")).y.tolist() == [3e9] * 6


def test_a_variable_that_is_nested_deeply(cli, tmp_path):
    (tmp_path / "r.yaml").write_text("last: 2\nmodifiers: [!EpochRangeModifier {end_epoch: eval(last)}]")
    code, _, err = cli(f"check r.yaml model.keras --var last={'[' * 20_000}")
    assert (code, err.count("\n")) == (1, 1)
    assert "r.yaml, line 2" in err and len(err) < 500


@pytest.mark.parametrize(("label", "said"), [(7, "7"), (3, "3"), (-1, "-1"), (1.5, "1.5")])
def test_labels_that_are_no_class_name_the_file(cli, label, said):
    np.savez("beyond.npz", x=X, y=np.array([0, 1, 2, 0, 1, label]))
    message = f"beyond.npz: The labels hold the class {said}, but there are 3 outputs, for the classes 0 to 2."
    assert message in refused(cli, "beyond.npz")
    for words in (
        "prune model.keras --method magnitude --sparsity 0.5 --eval beyond.npz --out p.keras --quiet",
        "prune model.keras --data beyond.npz --sparsity 0.5 --epochs 1 --out p.keras --quiet",
        "sensitivity model.keras --data beyond.npz --levels 0.5",
        "sensitivity model.keras --data data.npz --eval beyond.npz --levels 0.5",
    ):
        code, _, err = cli(words)
        assert (code, message in err) == (1, True), err
