"""Several processes: what they prune together is what one prunes, and what happens to one of them happens to all."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import processes
import pytest

import keras_woodfisher as kw

BACKEND = keras.backend.backend()
ROOT = Path(__file__).parents[2]
ODD = (
    *("raises", "empty", "weights", "zeros", "batches", "options", "data", "interrupt", "write"),
    *("loss", "later", "callback", "batchnorm"),
)
SAME = ("updates", "others", "training", "stream")
GROUPS = {
    # The same processes, one after the other.
    "torch": {
        "three": (3, "plain", "updates"),
        "two": (2, "data_parallel", *SAME, "parting", "statistics", *ODD, "killed"),
    },
    "jax": {
        "two": (2, "data_parallel", *SAME, "parting", *ODD),
        "parted": (2, "model_parallel", "updates", "training", "raises", "write", "later", "killed"),
    },
    "tensorflow": {},
}[BACKEND]
WITH_ODD = [group for group, (_, *wanted) in GROUPS.items() if set(wanted) & {*ODD, "killed"}]

pytestmark = pytest.mark.skipif(not GROUPS, reason="TensorFlow trains on several devices in one process")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What comes out of each process of each group, and of one alone."""
    folder = tmp_path_factory.mktemp("processes")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    # One device a process.
    flags = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=2", "")
    settings = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags}
    groups = [f"{name}:{n}:{free_port()}:{engine}:{','.join(w)}" for name, (n, engine, *w) in GROUPS.items()]
    started = []
    for rank in range(max(size for size, *_ in GROUPS.values())):
        log = folder / f"{rank}.log"
        with open(log, "w") as output:
            command = [sys.executable, processes.__file__, str(rank), str(folder), *groups]
            started.append((subprocess.Popen(command, env=settings, stdout=output, stderr=output), log))
    alone = processes.Scenarios()
    for scenario in SAME:
        getattr(alone, scenario)()
    ends = [process.wait(timeout=300) for process, _ in started]
    # One of two is killed at the end.
    assert ends == [0, -signal.SIGKILL, 0][: len(ends)], "\n".join(log.read_text()[-3000:] for _, log in started)
    found = {"alone": alone.found, "folder": folder}
    for group, (size, *_) in GROUPS.items():
        found[group] = []
        for rank in range(size):
            with np.load(folder / f"{group}{rank}.npz") as data:
                found[group].append(dict(data))
    return found


def told(found, name):
    return found[name].tobytes().decode()


@pytest.mark.parametrize("group", GROUPS)
def test_updates_are_those_of_one_process_to_the_bit(outcomes, group):
    alone, several = outcomes["alone"], outcomes[group]
    kinds = ("fast", "ggn", "ridge", "2:4", "filter", "few", "still sampled", "ring", "stream")
    names = [name for name in alone if name.startswith(kinds) and name in several[0]]
    assert len(names) >= 24
    for name in names:
        for found in several:
            np.testing.assert_array_equal(found[name], alone[name], err_msg=name)


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_rounded_otherwise_has_the_same_zeros(outcomes, group):
    alone, several = outcomes["alone"], outcomes[group]
    kinds = ("calibrated", "reconstruct", "refit", "still buffered", "moving", "sensitivity", "errors")
    for name in (n for n in alone if n.startswith(kinds) and n in several[0]):
        np.testing.assert_array_equal(several[0][name] == 0, alone[name] == 0, err_msg=name)
        np.testing.assert_allclose(several[0][name], alone[name], atol=1e-4, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("group", GROUPS)
def test_processes_are_equal_to_the_bit_and_report_the_same(outcomes, group):
    first, *rest = outcomes[group]
    own = (
        "own mean",
        "warned",
        "files",
        *(f"{kind} {what}" for kind in (*ODD, "killed") for what in ("text", "seconds")),
    )
    for found in rest:
        for name in found.keys() - set(own):
            np.testing.assert_array_equal(found[name], first[name], err_msg=name)
        assert told(found, "warned") == "[]" if "warned" in found else "killed" in GROUPS[group]


def test_examples_are_shared_and_one_process_writes(outcomes):
    alone, first = outcomes["alone"], outcomes["two"][0]
    assert outcomes["two"][1].get("files", 0) == 0 and first["resumed"].all() and alone["resumed"].all()
    assert first["examples"] == alone["examples"] and first["files"] == alone["files"] == 1
    assert told(first, "samples") == told(alone, "samples") == "64"


def test_training_goes_on_with_another_number_of_processes(outcomes):
    folder, several = outcomes["folder"], outcomes["two"][0]
    alone = processes.Scenarios()
    # The class of the model, on torch, is one of its own.
    custom = {"Parallel": keras.Sequential}
    made = keras.models.load_model(folder / "parted0of2.keras", custom_objects=custom)
    alone.fit(made, alone.parted(), kw.BackupPruning(folder / "states"), first=1, epochs=3)
    alone.note("parted", made)
    # The name of the whole model isn't in those of a model that was loaded.
    for name, expected in ((name.replace(" ", " net/"), array) for name, array in alone.found.items()):
        np.testing.assert_array_equal(several[name] == 0, expected == 0, err_msg=name)
        np.testing.assert_allclose(several[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.skipif(BACKEND != "torch", reason="JAX has them in common")
def test_statistics_that_differ_are_averaged_and_the_report_says_so(outcomes):
    first, second = outcomes["two"]
    assert not np.array_equal(first["own mean"], second["own mean"])
    np.testing.assert_allclose(first["shared mean"], (first["own mean"] + second["own mean"]) / 2, rtol=1e-6)
    assert "moving statistics of 1 BatchNorm layers differed between processes" in told(first, "notes")


@pytest.mark.parametrize(
    ("kind", "mine", "others"),
    [
        ("raises", "RuntimeError: broken on purpose", "RuntimeError: Process 1 of 2 failed: broken on purpose"),
        (
            "empty",
            "data gives no group of",
            "ValueError: Process 1 of 2 failed: data gives no group of grad_batch_size=1",
        ),
        ("zeros", "process 1 has other zeros than process 0", "process 1 has other zeros than process 0"),
        ("batches", "process 1 has steps_per_epoch=4, and process 0 8", "process 1 has steps_per_epoch=4, and"),
        ("weights", "process 1 has other weights than process 0", "process 1 has other weights than process 0"),
        ("options", "process 1 has damp=0.25, and process 0 None", "process 1 has damp=0.25, and process 0 None"),
        ("data", "process 1 has other data than process 0", "process 1 has other data than process 0"),
        ("interrupt", "KeyboardInterrupt: ", "KeyboardInterrupt: Process 1 of 2 failed: KeyboardInterrupt"),
        ("write", "OSError: can't write", "OSError: Process 1 of 2 failed: can't write"),
        ("loss", "OwnError: too far off", "ValueError: Process 1 of 2 failed: OwnError: too far off"),
        ("later", "IndexError: no such file", "IndexError: Process 1 of 2 failed: no such file"),
        ("callback", "KeyError: \"params names 'nothing'", "KeyError: \"Process 1 of 2 failed: params names 'nothing'"),
        ("batchnorm", "IndexError: no such file", "IndexError: Process 1 of 2 failed: no such file"),
    ],
)
def test_what_fails_on_one_process_fails_on_all(outcomes, kind, mine, others):
    for group in (group for group in WITH_ODD if kind in GROUPS[group]):
        first, last = outcomes[group]
        assert others in told(first, f"{kind} text")
        assert mine in told(last, f"{kind} text") and last[f"{kind} untouched"]
        assert first[f"{kind} untouched"] and first[f"{kind} seconds"] < 60


def test_a_process_that_is_killed_is_told_of(outcomes):
    first = next(outcomes[group][0] for group in WITH_ODD if "killed" in GROUPS[group])
    text = told(first, "killed text")
    assert "LostProcessError: Process 0 of 2 has lost the others" in text and first["killed untouched"]
    assert first["killed seconds"] < 60
