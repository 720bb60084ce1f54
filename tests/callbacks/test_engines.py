"""Several devices of one process: what is pruned there is what one device prunes, and lives where the weights live."""

import os
import subprocess
import sys
from pathlib import Path

import engines
import keras
import numpy as np
import pytest
from keras import layers

from keras_woodfisher.callbacks.mask_callback import check_trainable_here

BACKEND = keras.backend.backend()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What comes out on each engine, and on one device."""
    folder = tmp_path_factory.mktemp("engines")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    command, started = [sys.executable, engines.__file__], {}
    for engine in engines.ENGINES[BACKEND]:
        files = [str(folder / f"{engine}.npz"), str(folder / f"{engine}.log")]
        with open(files[1], "w") as log:
            process = subprocess.Popen(
                [*command, engine, files[0]], env=os.environ | {"PYTHONPATH": paths}, stdout=log, stderr=log
            )
        started[engine] = (process, *files)
    found = {"alone": engines.results()}
    for engine, (process, file, log) in started.items():
        assert process.wait(timeout=300) == 0, Path(log).read_text()[-2000:]
        with np.load(file) as data:
            found[engine] = dict(data)
    return found


@pytest.mark.parametrize("engine", engines.ENGINES[BACKEND])
def test_what_is_pruned_on_several_devices_is_what_one_prunes(outcomes, engine):
    alone, several = outcomes["alone"], outcomes[engine]
    assert several.keys() - {"page"} == alone.keys() and alone["resumed"].all() and alone["thawed"].all()
    rounded = {name for name in alone if name.startswith(("buffered", "rows", "mask devices"))}
    for name in alone.keys() - rounded:
        np.testing.assert_array_equal(several[name], alone[name], err_msg=name)
    # Gradients of a step are rounded otherwise where devices add up their parts.
    np.testing.assert_allclose(several["rows"], alone["rows"], atol=1e-6)
    assert int(several["seen"]) == 4
    for name in (n for n in rounded if n.startswith("buffered")):
        np.testing.assert_array_equal(several[name] == 0, alone[name] == 0, err_msg=name)
        np.testing.assert_allclose(several[name], alone[name], atol=1e-4, err_msg=name)
    # Each replica has its own masks; where weights are parted, masks are, too.
    parts = 2 if engine == "model_parallel" else 1
    np.testing.assert_array_equal(several["mask devices"], [[2, size // parts] for _, size in alone["mask devices"]])


@pytest.mark.skipif(not engines.ENGINES[BACKEND], reason="torch has no such engine")
def test_the_page_on_devices(outcomes):
    assert outcomes[engines.ENGINES[BACKEND][0]]["page"] == pytest.approx(0.9, abs=0.01)


@pytest.mark.skipif(BACKEND == "jax", reason="all of JAX's are followed")
def test_what_is_not_followed_is_refused(monkeypatch):
    model = keras.Sequential([layers.Input((5,)), layers.Dense(3)])
    model.compile("sgd", "sparse_categorical_crossentropy")
    if BACKEND == "torch":
        spread = type("Variable", (), {"value": type("DTensor", (), {})()})()
        monkeypatch.setattr(keras.Sequential, "variables", property(lambda model: [spread]))
    else:
        strategy = type("TPUStrategy", (), {"num_replicas_in_sync": 2})()
        monkeypatch.setattr(type(model), "distribute_strategy", strategy)
    name = {"torch": "variables of which each process holds a part", "tensorflow": "TPUStrategy"}[BACKEND]
    with pytest.raises(ValueError, match=f"training with {name}.* isn't supported. Train with torch's Distributed"):
        check_trainable_here(model)
