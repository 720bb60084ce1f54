"""Updates under a memory limit: the same pruning wherever gradients are, and nothing left behind."""

import tempfile

import keras
import numpy as np
import pytest
from exhausted import full
from gathering import GivenGradients
from keras import ops
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.kernel.panels import PANEL
from keras_woodfisher_backends.kernel.threads import blas_threads

import keras_woodfisher as kw
from keras_woodfisher.gradients.footprint import PassBytes, buffered_footprint, counted_outputs, is_plain
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.memory.limits import Limit
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.workspace import Workspace, _block_bytes
from keras_woodfisher.recipe.dry_run.costs import passes_of

WIDE = 60
WEIGHTS = 12 * WIDE + WIDE * WIDE + 7 * WIDE
ROWS = 64


@pytest.fixture
def wide(rng):
    """A net of 4,740 weights and examples for it; two lanes, however many cores there are."""
    model = keras.Sequential(
        [
            keras.layers.Input((12,)),
            keras.layers.Dense(WIDE, activation="relu", name="one"),
            keras.layers.Dense(WIDE, activation="relu", name="two"),
            keras.layers.Dense(7, name="out"),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = rng.normal(size=(ROWS, 12)).astype("float32"), rng.integers(0, 7, ROWS).astype("int32")
    with blas_threads(2):
        yield model, data


def device():
    return "cpu:0" if keras.backend.backend() == "torch" else "cpu:1"


def pruned(wide, **kwargs):
    """The weights after one shot, and the plan."""
    model, data = wide
    before = model.get_weights()
    plans = []
    real = Workspace.plan

    def planning(self, *args):
        plans.append(real(self, *args))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "plan", planning)
        kw.prune(model, data, 0.6, quality="fast", num_grads=ROWS, verbose=0, **kwargs)
    after = model.get_weights()
    model.set_weights(before)
    (plan,) = plans
    return after, plan


def limit_for(storage, model, data, rows=ROWS, **kwargs):
    """The largest limit (in steps) at which gradients are kept there."""
    pruner = Pruner(model, PruningOptions(verbose=0, **kwargs))
    if data is None:
        footprint = buffered_footprint(pruner.targets, rows)
    else:
        source = SampledGradients(model, pruner.targets, PruningOptions(verbose=0), pruner.backend, open_examples(data))
        footprint = source.footprint(rows)
    uses = [(rows, sum(t.size for t in pruner.targets))]
    limit = pruner.workspace.plan(footprint, uses).total
    while limit > 0:
        limit -= 20_000
        pruner = Pruner(model, PruningOptions(verbose=0, memory_limit=limit, **kwargs))
        if pruner.workspace.plan(footprint, uses).storage == storage:
            return limit
    raise AssertionError(f"never {storage}")


def same(one, other):
    return all((a == b).all() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [900, None])
def test_every_place_gives_the_same_bits(wide, size, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # So many samples at a time take less than the gradients: there is a limit at which only these must go.
    monkeypatch.setattr(
        type(get_backend(keras.backend.backend())), "chunk_groups", lambda self, examples, model=None: 32
    )
    # One block over everything is wide by this measure.
    monkeypatch.setattr("keras_woodfisher.pruning.workspace.PANEL", 1000)
    truth, full = pruned(wide, fisher_block_size=size)
    assert (full.storage, full.reason) == ("memory", "a quarter of what is free")
    for place in ("disk", device()):
        after, plan = pruned(wide, fisher_block_size=size, grads_device=place)
        assert plan.storage == place
        assert same(after, truth)
    model, data = wide
    limit = limit_for("disk", model, data, fisher_block_size=size)
    after, plan = pruned(wide, fisher_block_size=size, memory_limit=limit)
    assert (plan.storage, plan.chunk) == ("disk", full.chunk)
    # A lane that shares one block has a copy of its columns.
    assert plan.lanes == (full.lanes if size else 1)
    assert same(after, truth)
    monkeypatch.setattr("keras_woodfisher.pruning.workspace.disk_room", lambda folder: 0)
    limit = limit_for("recomputed", model, data, fisher_block_size=size)
    with monkeypatch.context() as counting:
        fill, passes = SampledGradients.fill, []
        counting.setattr(SampledGradients, "fill", lambda *args: passes.append(args) or fill(*args))
        after, plan = pruned(wide, fisher_block_size=size, memory_limit=limit)
    assert plan.storage == "recomputed" and plan.pages > 1
    # Whether the first ridge was good enough, or shrinkage was asked, too.
    assert len(passes) in [passes_of(plan, size or WEIGHTS, shrinks) for shrinks in (False, True)]
    # Fewer samples at a time, so frameworks add in another order.
    for one, other in zip(after, truth, strict=True):
        assert ((one == 0) != (other == 0)).mean() < 1e-3
        np.testing.assert_allclose(one, np.where(one == 0, 0, other), rtol=1e-2, atol=1e-3)
    assert list(tmp_path.iterdir()) == []


def test_float16_prunes_nearly_the_same(wide):
    truth, _ = pruned(wide)
    for place in ("cpu", "disk"):
        after, plan = pruned(wide, grads_dtype="float16", grads_device=place)
        assert (plan.dtype, plan.gradients + plan.stored) == ("float16", 2 * ROWS * WEIGHTS)
        assert not same(after, truth)
        masks = [(a == 0) == (b == 0) for a, b in zip(after, truth, strict=True)]
        assert np.mean(np.concatenate([m.ravel() for m in masks])) > 0.99
    assert same(pruned(wide, grads_dtype="float16")[0], after)


def test_pages_of_one_block_when_asked_for(wide):
    truth, _ = pruned(wide, fisher_block_size=None)
    after, plan = pruned(wide, fisher_block_size=None, num_pages=5)
    assert (plan.storage, plan.pages, plan.page) == ("disk", 5, 948)
    for one, other in zip(after, truth, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_behind_by_an_error(wide, error, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = []
    from keras_woodfisher.memory.disk import DiskStore

    real, calls = DiskStore.columns, []

    def failing(self, columns):
        files.append(self._spool._file)
        calls.append(1)
        if len(calls) == 3:
            raise error("in the middle")
        return real(self, columns)

    monkeypatch.setattr(DiskStore, "columns", failing)
    with pytest.raises(error, match="in the middle"):
        pruned(wide, grads_device="disk")
    assert all(file.closed for file in files)
    assert list(tmp_path.iterdir()) == []
    model, (x, y) = wide
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="No usable gradient sample"):
        kw.prune(
            model,
            (x, y),
            0.5,
            loss=lambda y, p: 0.0 * ops.mean(p),
            quality="fast",
            num_grads=20,
            grads_device="disk",
            verbose=0,
        )
    assert list(tmp_path.iterdir()) == []


def test_without_a_seed_each_pass_takes_the_same_samples(wide, monkeypatch):
    monkeypatch.setattr("keras_woodfisher.pruning.workspace.disk_room", lambda folder: 0)
    model, data = wide
    limit = limit_for("recomputed", model, data, fisher_block_size=900)
    _, plan = pruned(wide, seed=None, memory_limit=limit, fisher_block_size=900)
    assert plan.storage == "recomputed" and plan.pages > 1


def test_rows_that_are_dropped_are_the_same_in_each_pass(wide, monkeypatch):
    model, (x, y) = wide
    x = x.copy()
    x[::7] = 0.0  # no bias yet: their gradients are zero but for the last layer's, which is left out
    options = {"exclude": ["out/kernel"], "fisher_block_size": 900}
    messages, results = [], []
    for storage in ("memory", "recomputed"):
        limit = None
        if storage == "recomputed":
            monkeypatch.setattr("keras_woodfisher.pruning.workspace.disk_room", lambda folder: 0)
            limit = limit_for(storage, model, (x, y), **options)
        with pytest.warns(UserWarning, match="gradient samples are zero or not finite") as warned:
            results.append(pruned((model, (x, y)), memory_limit=limit, **options))
        messages.append([text for text in (str(w.message) for w in warned) if "gradient samples" in text])
    assert [len(listed) for listed in messages] == [1, 1]
    assert messages[0] == messages[1]
    assert (results[0][1].storage, results[1][1].storage) == ("memory", "recomputed")
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert ((one == 0) != (other == 0)).mean() < 1e-3


def test_a_limit_above_what_is_free_is_what_is_free(wide, monkeypatch):
    model, data = wide
    free = limit_for("disk", model, data)
    monkeypatch.setattr("keras_woodfisher.pruning.workspace.tightest_limit", lambda: Limit(free, ""))
    _, plan = pruned(wide, memory_limit="1 TiB")
    assert (plan.limit, plan.storage) == (free, "disk")
    assert plan.reason == "all that is free, which is less than memory_limit"
    _, plan = pruned(wide, memory_limit=free - 1)
    assert (plan.limit, plan.reason) == (free - 1, "memory_limit")


def test_the_plan_is_shown_once_with_advice(wide, capsys, monkeypatch):
    monkeypatch.setattr("keras_woodfisher.pruning.workspace.advice", lambda: "BLAS could be faster.")
    model, data = wide
    callback = kw.WoodFisherPruning(0.6, end_epoch=2, data=data, num_grads=20, verbose=1)
    model.fit(*data, epochs=2, batch_size=32, verbose=0, callbacks=[callback])
    out = capsys.readouterr().out
    assert out.count("memory plan:") == out.count("BLAS could be faster.") == 1
    assert "gradients, 20 x 4,740 float32: 0.4 MiB in memory" in out
    callback = kw.WoodFisherPruning(0.9, end_epoch=2, data=data, num_grads=20, verbose=0)
    model.fit(*data, epochs=2, batch_size=32, verbose=0, callbacks=[callback])
    out = capsys.readouterr().out
    assert "memory plan:" not in out
    assert "BLAS" not in out


def test_more_than_was_foreseen_is_planned_anew(capsys):
    model = keras.Sequential([keras.layers.Input((30,)), keras.layers.Dense(20)])
    pruner = Pruner(model, PruningOptions(fisher_block_size=50, verbose=2))
    source = GivenGradients(np.random.default_rng(0).normal(size=(40, 600)).astype(np.float32))
    pruner.workspace.plan(source.footprint(10), [(10, 600), (20, 100)])
    pruner.update([0.1], source, 10)
    assert (pruner.memory.samples, pruner.memory.most) == (10, 20)
    pruner.update([0.2], source, 40)
    assert pruner.memory.samples == 40
    assert capsys.readouterr().out.count("memory plan:") == 2


def test_a_run_that_can_not_fit_is_refused_before_training(wide):
    model, data = wide
    before = model.get_weights()
    for source in (data, None):
        callback = kw.WoodFisherPruning(
            0.6, end_epoch=3, start_epoch=1, data=source, num_grads=10, memory_limit="100 KB", verbose=0
        )
        with pytest.raises(MemoryError, match=r"num_grads=10 for 4,740 weights needs at least .*0\.1 MiB may be used"):
            model.fit(*data, epochs=3, batch_size=5, verbose=0, callbacks=[callback])
        assert same(model.get_weights(), before)
        assert not any("gradients" in v.name for v in model.optimizer.variables)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_buffered_gradients_under_a_limit(wide, place):
    model, data = wide
    weights = model.get_weights()
    results = []
    limit = limit_for("disk", model, None, rows=12)
    for options in ({}, {"grads_device": place, "memory_limit": limit}):
        model.set_weights(weights)
        keras.utils.set_random_seed(1)
        callback = kw.WoodFisherPruning(0.6, end_epoch=1, num_grads=12, verbose=0, **options)
        model.fit(*data, epochs=1, batch_size=5, verbose=0, shuffle=False, callbacks=[callback])
        plan = callback.run.pruner.memory
        assert plan.ring == 4 * 12 * WEIGHTS
        results.append((model.get_weights(), plan))
    assert [plan.storage for _, plan in results] == ["memory", "disk"]
    assert same(results[0][0], results[1][0])


def test_devices_that_do_not_exist(wide):
    model, data = wide
    with pytest.raises(ValueError, match=r"grads_device: There is no device 'cuda:9' here.*cpu.* kept on \"disk\""):
        kw.prune(model, data, 0.5, grads_device="cuda:9", verbose=0)


def test_the_footprint_counts_what_layers_put_out(wide, backend):
    model, data = wide
    with counted_outputs(model) as passed:
        model(data[0][:3])
    assert passed == PassBytes(outputs=4 * 3 * (WIDE + WIDE + 7), widest=0, predictions=4 * 3 * 7)
    assert not any("call" in vars(layer) for layer in [model, *model.layers])
    pruner = Pruner(model, PruningOptions(verbose=0))
    source = SampledGradients(model, pruner.targets, PruningOptions(verbose=0), backend, open_examples(data))
    source.check(ROWS)
    found = source.footprint(ROWS)
    assert found.chunk == min(ROWS, backend.chunk_groups(1))
    assert found.sample == 4 * (2 * WEIGHTS + 2 * WIDE * WIDE) + int(2.5 * 4 * (2 * WIDE + 7)) + 4 * 4 * 7
    assert found.reading == 2 * ROWS * (12 + 1) * 4


def test_the_footprint_counts_operations_activations_and_shifted_copies():
    given = keras.Input((6, 5, 2))
    conv = keras.layers.Conv2D(3, (4, 2), padding="same", activation="swish")(given)  # 90 numbers, kept twice
    gate = keras.ops.sigmoid(conv)  # 90, and no layer
    added = conv * gate + 1.0  # 90 each
    inner = keras.Sequential([keras.Input((6, 5, 3)), keras.layers.Flatten(), keras.layers.Dense(4, "relu")])
    model = keras.Model(given, inner(added))
    with counted_outputs(model) as passed:
        model(np.ones((2, 6, 5, 2), "float32"))
    outputs = 2 * 90 + 90 + 90 + 90 + 90 + 4
    # A kernel of 2 columns makes 2 shifted copies of the 60 numbers of an input.
    assert passed == PassBytes(outputs=4 * 2 * outputs, widest=4 * 2 * 2 * 60, predictions=4 * 2 * 4)
    assert passed.total == int(2.5 * passed.outputs) + passed.widest + 4 * passed.predictions
    passed.plain = False
    assert passed.total == int(2.5 * passed.outputs) + passed.widest + 8 * passed.predictions
    assert not any("call" in vars(part) for part in [model, *model.operations, *inner.layers])


def test_losses_of_few_steps():
    def own(y, p):
        return keras.ops.mean(keras.ops.square(y - p))

    for plain in (["mse"], [keras.losses.SparseCategoricalCrossentropy()], [keras.losses.mean_squared_error, "mae"]):
        assert is_plain(plain)
    for other in (
        [],
        ["mse", own],
        ["mse", "binary_focal_crossentropy"],
        [keras.losses.CategoricalFocalCrossentropy()],
    ):
        assert not is_plain(other)


class Full(MemoryError):
    """As NumPy raises."""


@pytest.mark.parametrize("error", [Full("Unable to allocate 2.05 GiB"), full(), MemoryError()])
def test_memory_that_runs_out_in_spite_of_the_plan_has_a_mend(wide, monkeypatch, error):
    model, data = wide
    before = model.get_weights()

    def fails(*args):
        raise error

    monkeypatch.setattr("keras_woodfisher.pruning.workspace.open_store", fails)
    with pytest.raises(MemoryError, match=r"There isn't memory enough: .* were planned, of .*smaller memory_limit"):
        kw.prune(model, data, 0.5, quality="fast", num_grads=8, verbose=0)
    assert same(before, model.get_weights())
    with pytest.raises(MemoryError, match="There isn't memory enough"):
        kw.sensitivity(model, data, levels=(0.5,), num_grads=8, verbose=0)
    callback = kw.WoodFisherPruning(0.5, end_epoch=1, data=data, num_grads=8, verbose=0)
    with pytest.raises(MemoryError, match="There isn't memory enough"):
        model.fit(*data, verbose=0, callbacks=[callback])


def test_no_limit_is_proposed_that_there_is_no_memory_for(wide, monkeypatch):
    model, data = wide
    monkeypatch.setattr("keras_woodfisher.pruning.workspace.tightest_limit", lambda: Limit(2**16, "`ulimit -v`"))
    with pytest.raises(MemoryError, match=r"may be used \(a quarter of what is free within `ulimit -v`\)") as caught:
        kw.prune(model, data, 0.5, quality="fast", num_grads=ROWS, verbose=0)
    assert "memory_limit=" not in str(caught.value)


@pytest.mark.once
def test_bytes_on_the_host_of_blocks_that_a_device_works_on():
    class Kernel:
        lanes = 3

        def memory(self, rows, width, group):
            return rows * width + group

        def staged(self, rows, width, columns):
            return 100 * rows + 10 * width + columns

    def found(device, lanes, group):
        return _block_bytes(device, Kernel(), 64, (200, 900), lanes, group)

    assert found("cpu:0", 2, 5) == 2 * (64 * 200 + 5) and found("cpu", 9, 1) == 3 * (64 * 200 + 1)
    assert found("cuda:0", 1, 1) == 6400 + 2000 and found("cuda:0", 2, 1) == 2 * (6400 + 2000 + 900)
    # Of groups twice 8 bytes for each of their weights, or each sample, by a panel, the block or the group itself.
    assert found("cuda:0", 1, 5) == 6400 + 2000 + 16 * 200 * 5 and found("cuda:0", 1, 70) == 8400 + 16 * 200 * 64
    assert found("cuda:0", 1, 300) == 8400 + 16 * 300 * 64
    wide = _block_bytes("cuda:0", Kernel(), 64, (PANEL + 8, PANEL + 8), 1, 2)
    assert wide == 6400 + 10 * (PANEL + 8) + 16 * PANEL * 2


@pytest.mark.parametrize("mask", ["unstructured", "2:4", "channel"])
def test_panels_are_fitted_to_what_each_device_has_free(wide, monkeypatch, mask):
    model, _ = wide
    workspace = Pruner(model, PruningOptions.of(mask_type=mask, verbose=0)).workspace
    told = []

    class Kernel:
        lanes = 2

        def fit(self, *args):
            told.append(args)

    workspace.devices, workspace.kernels = ["cuda:0", "cpu"], [Kernel(), Kernel()]
    monkeypatch.setattr(type(workspace.backend), "free_memory", lambda self, name: 1000 if name == "cuda:0" else None)
    workspace.fit(64)
    # Four fifths, for each of two lanes; a channel of the middle layer is the largest group.
    assert told == [(64, WEIGHTS, 400, {"unstructured": 1, "2:4": 4, "channel": WIDE}[mask])]
