"""One suite for every backend: run it once with each KERAS_BACKEND (`make test` does)."""

import gc
import os
from pathlib import Path

# Two logical CPU devices, so that tests deal out blocks, and quick compilation: tests compile much and compute little.
# Must be set before a framework starts.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)
# Many tests train the same small nets: what one has compiled the others load.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tests run in two processes: threads of BLAS that wait by spinning take the other one's core.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# GPUs round the factors of products to TF32 by default; what tests compare is computed in full float32.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import keras
import numpy as np
import pytest
from keras_woodfisher_backends import get_backend
from precision import Precision

if keras.backend.backend() == "torch":
    import torch

    torch.backends.cudnn.allow_tf32 = False
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )

    # An iterator that is collected waits for the thread that tunes it: of hundreds of fits, for 40 s at once.
    _UNTUNED = tf.data.Options()
    _UNTUNED.autotune.enabled = False
    _iterate = tf.data.Dataset.__iter__
    tf.data.Dataset.__iter__ = lambda self: _iterate(self.with_options(_UNTUNED))


def pytest_collection_modifyitems(config, items):
    if "exports" not in config.option.markexpr:
        exports = [item for item in items if item.get_closest_marker("exports")]
        items[:] = [item for item in items if not item.get_closest_marker("exports")]
        config.hook.pytest_deselected(items=exports)
    if keras.backend.backend() == "torch":
        return
    once = [item for item in items if item.get_closest_marker("once")]
    items[:] = [item for item in items if not item.get_closest_marker("once")]
    config.hook.pytest_deselected(items=once)


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Each collection of garbage would look again at a million objects that frameworks keep for good."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session(free_memory=False)


@pytest.fixture(scope="session")
def backend():
    """The adapter of the backend under test; a missing framework is a failure, not a skip."""
    return get_backend(keras.backend.backend())


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def precision():
    """The framework's settings for float32 products, loose for the test."""
    setting = Precision()
    before = setting.read()
    setting.write(setting.loose)
    yield setting
    setting.write(before)


@pytest.fixture
def blobs(rng):
    """A small classification task: 96 points in 12 dimensions, 3 classes."""
    y = rng.integers(0, 3, 96)
    x = rng.normal(size=(96, 12)) + 2.0 * np.eye(3, 12)[y]
    return x.astype("float32"), y.astype("int32")


@pytest.fixture
def make_mlp(blobs):
    """Builds a compiled two-layer network for `blobs`."""

    def make(optimizer="sgd", units=16, compile=True, **kwargs):
        model = keras.Sequential(
            [
                keras.layers.Input((12,)),
                keras.layers.Dense(units, activation="relu", name="hidden"),
                keras.layers.Dense(3, name="out"),
            ]
        )
        if compile:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer, loss, **kwargs)
        return model

    return make


@pytest.fixture
def cli(capsys, shelf, tmp_path, monkeypatch):
    """Runs a command among the files of the module's `shelf`; gives its exit code, stdout and stderr."""
    from keras_woodfisher.cli import main

    monkeypatch.chdir(tmp_path)
    for file in shelf.iterdir():
        (tmp_path / file.name).symlink_to(file)

    def run(command):
        capsys.readouterr()
        try:
            code = main(command.split())
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
