"""Saved files are stock ones, small, and whole or not there (that they load anywhere: `callbacks/test_saving.py`)."""

import io
import os
import stat
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.deployment.saving import archive
from keras_woodfisher.deployment.saving.archive import deflate, sizes_of

WEIGHTS = "model.weights.h5"


def members(path):
    with zipfile.ZipFile(path) as file:
        return {entry.filename: (entry, file.read(entry)) for entry in file.infolist()}


@pytest.fixture
def model():
    model = keras.Sequential([layers.Input((120,)), layers.Dense(200, "relu"), layers.Dense(10)])
    model.compile(keras.optimizers.SGD(momentum=0.9), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_the_file_is_the_stock_one_deflated(model, sparsity, tmp_path):
    kw.prune(model, sparsity=sparsity, method="magnitude", verbose=0)
    kw.save(model, tmp_path / "small.keras")
    model.save(tmp_path / "stock.keras")
    small, stock = members(tmp_path / "small.keras"), members(tmp_path / "stock.keras")
    assert list(small) == list(stock)
    assert small["config.json"][1] == stock["config.json"][1]
    assert small[WEIGHTS][1] == stock[WEIGHTS][1], "weights and optimizer, to the bit"
    assert {entry.compress_type for entry, _ in small.values()} == {zipfile.ZIP_DEFLATED}
    again = keras.models.load_model(tmp_path / "small.keras")
    x = np.random.default_rng(0).normal(size=(8, 120)).astype("float32")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    # 26,210 weights and their momenta, which are zero: one that is there takes 4 bytes, and each two bits to tell.
    kept = 26_210 - round(sparsity * 26_000)
    assert sizes_of(tmp_path / "small.keras").file < 4 * kept + 2 * 26_210 / 8 + 6_000
    assert sizes_of(tmp_path / "small.keras").unpacked == sizes_of(tmp_path / "stock.keras").unpacked > 8 * 26_210


def test_a_failure_leaves_the_file_that_was_there(model, tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    kw.save(model, path)
    before = path.read_bytes()

    class Unsavable(layers.Layer):
        def save_own_variables(self, store):
            raise RuntimeError("no room")

    broken = keras.Sequential([layers.Input((3,)), Unsavable()])
    with pytest.raises(RuntimeError, match="no room"):
        kw.save(broken, path)

    def interrupted(source, target, stored):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(archive, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kw.save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.keras"], "nothing else is left"


def test_an_existing_file_keeps_its_permissions_and_a_link_stays_one(model, tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real.keras", tmp_path / "link.keras"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    kw.save(model, str(link))
    assert link.is_symlink() and zipfile.is_zipfile(real)
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    kw.save(model, tmp_path / "new.keras")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "new.keras").stat().st_mode == (tmp_path / "plain").stat().st_mode, "as any other new file"


def test_overwrite_asks_as_keras_does(model, tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    path.write_bytes(b"old")
    asked = []

    def answer(question):
        asked.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", answer)
    kw.save(model, path, overwrite=False)
    model.save(path, overwrite=False)
    assert asked == [asked[0]] * 2 and str(path) in asked[0], "in its own words"
    assert path.read_bytes() == b"old"
    monkeypatch.setattr("builtins.input", lambda question: "y")
    kw.save(model, path, overwrite=False)
    assert zipfile.is_zipfile(path)
    monkeypatch.undo()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(FileExistsError, match="no terminal to ask"):
        kw.save(model, path, overwrite=False)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("model.weights.h5", ValueError, r"must end in \.keras.* model\.save_weights\(filepath\) writes weights alone"),
        ("model.weights.json", ValueError, r"save_weights\(filepath, max_shard_size"),
        ("model.h5", ValueError, "the older format, which has no compression"),
        ("folder", ValueError, r"must end in \.keras.*got filepath=folder\.$"),
        ("gs://bucket/model.keras", ValueError, "copy the file there"),
        ("hf://me/model", ValueError, "copy the file there"),
        ("none/model.keras", FileNotFoundError, "doesn't exist. Create it first"),
        ("file.txt/model.keras", NotADirectoryError, "isn't a folder"),
        ("folder.keras", FileExistsError, "is a folder"),
        (io.BytesIO(), TypeError, "got BytesIO. For an open file"),
        (b"model.keras", TypeError, "got bytes"),
    ],
)
def test_other_paths_are_refused(model, path, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.keras").mkdir()
    (tmp_path / "file.txt").write_bytes(b"")
    monkeypatch.setattr(type(model), "save", None)
    with pytest.raises(error, match=message):
        kw.save(model, path)
    with pytest.raises(TypeError, match="takes a Keras model, got Dense"):
        kw.save(layers.Dense(3), "model.keras")


@pytest.mark.once
def test_what_would_be_taken_for_a_bomb_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_SMALL", 10_000)
    noise, zeros = np.random.default_rng(0).bytes(20_000), bytes(500_000)
    with zipfile.ZipFile(tmp_path / "stock.zip", "w") as file:
        file.mkdir("assets")
        for name, content in (("zeros", zeros), ("noise", noise), ("few", bytes(9_000)), ("half", noise + zeros)):
            file.writestr(f"assets/{name}", content)
    deflate(tmp_path / "stock.zip", tmp_path / "small.zip")
    stock, small = members(tmp_path / "stock.zip"), members(tmp_path / "small.zip")
    assert {name: content for name, (_, content) in stock.items()} == {n: c for n, (_, c) in small.items()}
    kinds = {name.partition("/")[2]: entry.compress_type for name, (entry, _) in small.items()}
    deflated = zipfile.ZIP_DEFLATED
    assert kinds | {"": 0} == {"": 0, "zeros": zipfile.ZIP_STORED, "noise": deflated, "few": deflated, "half": deflated}


@pytest.mark.once
def test_keras_takes_nothing_smaller_for_a_bomb():
    own = keras.src.saving.saving_lib
    # Keras 3.12 doesn't look.
    assert getattr(own, "_ZIP_MEMBER_MAX_EXPANSION", 100) >= archive._EXPANSION
    for name in ("_ZIP_MEMBER_BOMB_FLOOR_BYTES", "_ZIP_EXTRACT_BOMB_FLOOR_BYTES"):
        assert getattr(own, name, archive._SMALL) >= archive._SMALL
