"""Devices: their names, several at once, and what happens where one is full."""

import threading
import time

import keras
import numpy as np
import pytest
from exhausted import full
from gathering import stored
from keras import ops
from keras_woodfisher_backends import devices, get_backend
from keras_woodfisher_backends.kernel import panels
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import NumpyOperators
from keras_woodfisher_backends.kernel.stacking import Stacking

import keras_woodfisher as kw
from keras_woodfisher.pruning import workspace as workspace_module
from keras_woodfisher.pruning.fisher import BlockFisher, block_slices

NAME = keras.backend.backend()
DAMP = 1e-3


def test_device_names(backend):
    for name in backend.devices():
        backend.kernel(name)
    listed = ", ".join(backend.devices()[:2])
    for wrong in ("cuda:77", "cpu:9", "gpu:x", "tpu:0", "nonsense", "cpu:-1"):
        with pytest.raises(ValueError, match=f"no device '{wrong}' here. Devices that exist: {listed}"):
            backend.kernel(wrong)


def test_aliases_of_device_names():
    assert [devices.resolve(name, 2, 1) for name in ("cuda", "gpu", "cuda:1", "GPU:1", " cpu ", "cpu:0")] == [
        ("gpu", 0),
        ("gpu", 0),
        ("gpu", 1),
        ("gpu", 1),
        ("cpu", -1),
        ("cpu", 0),
    ]
    with pytest.raises(ValueError, match="Devices that exist: cpu, cpu:0, gpu:0, gpu:1"):
        devices.resolve("gpu:2", 2, 1)


def test_all_devices():
    assert devices.expand(["all"], ["cpu", "cpu:0", "gpu:0", "gpu:1"]) == ("gpu:0", "gpu:1")
    assert devices.expand(["ALL"], ["cpu", "cpu:0"]) == ("cpu",)
    assert devices.expand([], ["cpu", "cpu:0", "gpu:0"]) == ("cpu",)
    assert devices.expand(["cuda:1", "cpu"], ["cpu", "cuda:0", "cuda:1"]) == ("cuda:1", "cpu")
    with pytest.raises(ValueError, match="must be 'all' or name devices, got both"):
        devices.expand(["all", "cpu"], ["cpu"])
    with pytest.raises(ValueError, match=r"names a device twice: \['cpu:0', 'CPU:0'\]. Name each once"):
        devices.expand(["cpu:0", "CPU:0"], ["cpu", "cpu:0"])


def stacking(operators, lanes):
    return BlockKernel(operators, lanes=lanes, stacking=Stacking(operators))


class Accelerators:
    """Stands in for GPUs: names, places on the host's processor, and memory of a chosen size."""

    def __init__(self, free=None):
        self.free = free
        self.used = []

    def backend(self):
        """The adapter of the backend under test, with two of these."""
        if NAME == "torch":
            from keras_woodfisher_backends.torch.backend import TorchBackend

            return TorchBackend(self)
        adapter = get_backend(NAME)
        kernel, seen = adapter.kernel, {"gpu:0": "cpu:0", "gpu:1": "cpu:1"}

        def seen_as_gpu(name):
            self.used.append(int(name[-1]))
            found = kernel(seen[name])
            # On a CPU, threads in JAX's triangular solves of stacks may wait for each other forever.
            return found if NAME == "jax" else stacking(found.operators, devices.LANES)

        adapter.devices = lambda: ["cpu", *seen]
        adapter.kernel = seen_as_gpu
        adapter.free_memory = lambda name: self.free
        adapter.peak_memory = lambda name: 0
        return adapter

    def count(self):
        return 2

    def place(self, index):
        import torch

        self.used.append(index)
        return torch.device("cpu")

    def free_memory(self, index):
        return self.free

    def peak_memory(self, index):
        return 0


def prune(make_mlp, blobs, **kwargs):
    keras.utils.set_random_seed(0)
    model = make_mlp(units=64)
    kw.prune(model, blobs, 0.6, quality="fast", num_grads=16, verbose=0, fisher_block_size=100, **kwargs)
    return model.get_weights()


@pytest.mark.parametrize("free", [10**10, 20_000])
def test_all_accelerators_share_the_blocks(monkeypatch, make_mlp, blobs, free):
    plain = prune(make_mlp, blobs)
    monkeypatch.setattr(devices, "LANES", 2)  # there are few blocks
    accelerators = Accelerators(free)
    monkeypatch.setattr(workspace_module, "get_backend", lambda name: accelerators.backend())
    widths, loads, stacked, threads = set(), [], [], set()
    operators = type(get_backend(NAME).kernel("cpu:0").operators)
    loading, loading_stacks = operators.load, operators.load_stack

    def load(self, panel):
        loads.append(panel.shape[-1])
        threads.add(threading.get_ident())
        return loading(self, panel)

    def load_stack(self, shape, parts):
        stacked.append(shape[0])
        loads.append(shape[2])
        threads.add(threading.get_ident())
        return loading_stacks(self, shape, parts)

    monkeypatch.setattr(operators, "load", load)
    monkeypatch.setattr(operators, "load_stack", load_stack)
    original = BlockKernel.fit
    monkeypatch.setattr(
        BlockKernel, "fit", lambda self, *args: (original(self, *args), widths.add(self.panels.width))[0]
    )
    dealt = prune(make_mlp, blobs, available_gpus="all")
    assert sorted(accelerators.used) == [0, 1]
    assert len(threads) >= 2
    for one, other in zip(dealt, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    if free == 10**10:
        assert widths == {panels.PANEL}
        assert max(loads) == 100
        assert NAME == "jax" or max(stacked) > 1
    else:
        # 12 bytes a column and sample, and the matrices: 64 columns are the fewest that are tried.
        assert widths == {64}
        assert max(loads) == 64


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_full_device_takes_half_as_much_at_a_time(backend, monkeypatch, device):
    error = MemoryError("no room") if device == "cpu" else full()
    operators = backend.kernel(device).operators
    original, widths = operators.load, []

    def load(panel):
        widths.append(panel.shape[1])
        if panel.shape[1] > 90:
            raise error
        return original(panel)

    monkeypatch.setattr(operators, "load", load)
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(12, 300)).astype(np.float32)
    double = grads.astype(np.float64)
    fisher = DAMP * np.eye(300) + double.T @ double / 12
    kernel = BlockKernel(operators, panel=256)
    np.testing.assert_allclose(kernel.inverse_diagonal(grads, DAMP), np.diag(np.linalg.inv(fisher)), rtol=2e-6)
    assert widths[:4] == [256, 128, 64, 64]
    monkeypatch.setattr(operators, "load", lambda panel: (_ for _ in ()).throw(error))
    with pytest.raises(MemoryError, match=r"no room for the inverse Fisher of a block, 64 columns .*Lower num_grads"):
        kernel.inverse_diagonal(grads, DAMP)


def test_other_errors_are_not_taken_for_a_full_device(backend):
    for device in ("cpu", "cpu:0"):
        operators = backend.kernel(device).operators
        for error in (ValueError("x"), RuntimeError("x"), np.linalg.LinAlgError("x")):
            assert not operators.is_out_of_memory(error)
    assert NumpyOperators().is_out_of_memory(MemoryError())


def test_one_block_is_shared_among_the_lanes_of_a_device(backend):
    rng = np.random.default_rng(0)
    grads, weights = rng.normal(size=(12, 300)).astype(np.float32), rng.normal(size=300)
    prune = rng.random(300) < 0.5
    for device in ("cpu", "cpu:0"):
        operators = backend.kernel(device).operators
        alone = BlockKernel(operators, panel=32)
        shared = BlockKernel(operators, panel=32, lanes=3, on_host=True).sharing()
        diagonal = alone.inverse_diagonal(grads, DAMP)
        np.testing.assert_allclose(shared.inverse_diagonal(grads, DAMP), diagonal, rtol=1e-9)
        np.testing.assert_allclose(
            shared.joint_update(grads, DAMP, weights, prune),
            alone.joint_update(grads, DAMP, weights, prune),
            rtol=1e-9,
        )


def test_a_gpu_differentiates_more_examples_at_a_time(backend, monkeypatch):
    few = backend.chunk_groups(1)
    assert [backend.chunk_groups(examples) for examples in (4, 10**4)] == [few // 4, 1]
    if NAME == "torch":
        backend = Accelerators().backend()
    elif NAME == "jax":
        monkeypatch.setattr("keras_woodfisher_backends.jax.backend._gpus", lambda: ["gpu"])
    else:
        monkeypatch.setattr("keras_woodfisher_backends.tensorflow.backend._logical", lambda kind: [kind])
    assert [backend.chunk_groups(examples) for examples in (1, 4, 10**4)] == [512, 128, 1]


def test_only_tensorflow_lets_one_thread_at_a_time_begin(backend):
    entered = threading.Event()

    def enter():
        with backend.in_turn():
            entered.set()

    thread = threading.Thread(target=enter)
    with backend.in_turn(), backend.in_turn():
        thread.start()
        assert entered.wait(0.2) == (NAME != "tensorflow")
    assert entered.wait(10)
    thread.join()


def test_threads_begin_operations_of_tensorflow_in_turn(backend, monkeypatch):
    """Else they get each other's numbers now and then."""
    if NAME != "tensorflow":
        assert backend.name == NAME
        return
    import tensorflow as tf

    inside, most = [], []

    def watched(original):
        def watching(*args, **kwargs):
            inside.append(1)
            most.append(len(inside))
            time.sleep(1e-4)
            inside.pop()
            return original(*args, **kwargs)

        return watching

    used = [(tf, "cast"), (tf, "matmul"), (tf, "square"), (tf, "reduce_sum"), (tf, "convert_to_tensor"), (tf, "eye")]
    used += [(tf.linalg, name) for name in ("cholesky", "set_diag", "triangular_solve", "cholesky_solve")]
    for module, name in used:
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    rng = np.random.default_rng(0)
    grads, weights = rng.normal(size=(6, 240)).astype(np.float32), rng.normal(size=240)
    blocks = block_slices([240], 20)
    kernels = [stacking(backend.kernel(name).operators, 2) for name in ("cpu:0", "cpu:1")]
    plain = BlockKernel(backend.kernel("cpu:1").operators, panel=8, lanes=2)
    for prune in (rng.random(240) < 0.3, rng.random(240) < 0.9):
        for devices_of, cut in ((kernels, blocks), ([plain, *kernels], blocks), ([plain], [slice(0, 240)])):
            fisher = BlockFisher(stored(grads), cut, DAMP, devices_of)
            fisher.update(weights, prune, fisher.inverse_diagonal(), joint=True)
            fisher.group_costs(weights, np.arange(240) // 5, 48)
    assert len(most) > 1000 and max(most) == 1


def test_one_device_under_two_names_is_named_twice():
    for twice in (["cuda", "gpu:0"], ["CUDA:1", "gpu:1"], ["cpu:0", "CPU:0"]):
        with pytest.raises(ValueError, match="names a device twice"):
            devices.expand(twice, ["cpu", "cpu:0", "gpu:0", "gpu:1"])


def test_a_panel_that_is_halved_meanwhile_skips_no_column():
    kernel = BlockKernel(NumpyOperators(), panel=64)
    found = []
    for part in kernel.panels.parts(200):
        found += range(part.start, part.stop)
        kernel.panels.columns.now = 16
    assert found == list(range(200))


def test_what_lanes_share_is_finished_before_another_reads_it(monkeypatch):
    """On a GPU each lane has a stream of its own, and nothing else makes one wait for another."""
    operators = NumpyOperators()
    kernel = BlockKernel(operators, panel=32, lanes=2).sharing()
    pending: dict[int, int] = {}
    gram, finish = operators.gram, operators.finish

    def launching(panel, total):
        pending[threading.get_ident()] = 1
        return gram(panel, total)

    def finishing():
        pending[threading.get_ident()] = 0
        finish()

    monkeypatch.setattr(operators, "gram", launching)
    monkeypatch.setattr(operators, "finish", finishing)
    grads = np.random.default_rng(0).normal(size=(8, 128)).astype("float32")
    found = kernel.gram(grads, np.ones(128, bool))
    assert len(pending) >= 2 and not any(pending.values())
    np.testing.assert_allclose(found, grads.astype("float64") @ grads.T.astype("float64"), rtol=1e-12)


def test_panels_become_narrow_for_wide_matrices_too():
    kernel = BlockKernel(NumpyOperators())
    matrices = 4 * 8 * 1024**2
    kernel.fit(1024, 10_000, matrices + 3 * 1024 * 8 * 256)
    assert panels.SMALLEST_PANEL < kernel.panels.width < panels.PANEL
    assert kernel.memory(1024, 10_000) <= matrices + 3 * 1024 * 8 * 256


@pytest.mark.parametrize("name", ["CPU", " cpu "])
def test_the_host_has_one_name(make_mlp, blobs, name):
    report = kw.prune(make_mlp(), blobs, 0.5, grads_device=name, quality="fast", num_grads=16, verbose=0)
    assert report.samples == 16


@pytest.mark.skipif(NAME != "jax", reason="JAX_PLATFORMS is JAX's")
def test_jax_may_be_told_to_leave_the_processor_alone(backend, monkeypatch):
    import jax

    def listed(backend=None):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu. Available backends are ['cuda'].")
        return []

    monkeypatch.setattr(jax, "local_devices", listed)
    assert backend.devices() == ["cpu"]
    assert backend.kernel("cpu").on_host


def test_a_dry_call_tells_shapes_and_has_values_where_they_are_looked_at(backend):
    seen, read = [], []

    def shapes(x):
        seen.append((tuple(x["a"].shape), hasattr(x["a"], "aval")))

    def values(x):
        seen.append(tuple(x["a"].shape))
        if ops.max(x["a"]) > 0:
            read.append(float(ops.max(x["a"])))

    x = {"a": np.array([[1.0, 2.0]], "float32")}
    backend.dry_call(shapes, x)
    assert seen == [((1, 2), keras.backend.backend() == "jax")]
    backend.dry_call(values, x)
    assert read == [2.0]
