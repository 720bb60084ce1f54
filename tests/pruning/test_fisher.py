"""Blocks over all chosen weights: how they are cut, dealt out to devices, and put together."""

import threading

import keras
import numpy as np
import pytest
from gathering import stored
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import NumpyOperators, host_kernel
from keras_woodfisher_backends.kernel.threads import host_threads

from keras_woodfisher.pruning.fisher import BlockFisher, block_slices

DAMP = 1e-3


def draws(number):
    rng = np.random.default_rng(7)
    for _ in range(number):
        yield rng.integers(0, 12, rng.integers(1, 6)).tolist(), int(rng.integers(1, 15))


def test_blocks_cover_each_column_once_and_never_span_two_variables():
    for kept, size in draws(200):
        edges = np.cumsum([0, *kept])
        blocks = block_slices(kept, size)
        columns = [column for block in blocks for column in range(block.start, block.stop)]
        assert columns == list(range(sum(kept)))
        assert all(0 < block.stop - block.start <= size for block in blocks)
        owner = np.repeat(np.arange(len(kept)), kept)
        assert all(len(set(owner[block])) == 1 for block in blocks)
        # As few as possible: only the last block of a variable is smaller.
        assert len(blocks) == sum(-(-width // size) for width in kept)
        assert {block.start for block in blocks} >= {int(edges[i]) for i, width in enumerate(kept) if width}


def test_no_size_is_one_block_over_everything():
    assert block_slices([5, 0, 2], None) == [slice(0, 7)]
    assert block_slices([0, 0], None) == block_slices([0, 0], 3) == block_slices([], None) == []


def problem(m=10, kept=(7, 0, 23, 1), size=6):
    rng = np.random.default_rng(2)
    d = sum(kept)
    grads = rng.normal(size=(m, d)).astype(np.float32)
    return grads, block_slices(kept, size), rng.normal(size=d), rng.random(d) < 0.5


def dense(grads, blocks):
    """`F` as one dense matrix, zero outside the blocks."""
    full = DAMP * np.eye(grads.shape[1])
    for block in blocks:
        part = grads[:, block].astype(np.float64)
        full[block, block] += part.T @ part / len(grads)
    return full


def kernels_of(backend):
    names = {"torch": ["cpu", "cpu:0", "cpu:0"]}.get(backend.name, ["cpu", "cpu:0", "cpu:1"])
    return [backend.kernel(name) for name in names]


@pytest.mark.parametrize("size", [1, 6, 100, None])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_number_of_devices_gives_the_dense_result(backend, number, size):
    grads, _, weights, prune = problem()
    blocks = block_slices([7, 0, 23, 1], size)
    fisher = BlockFisher(stored(grads), blocks, DAMP, kernels_of(backend)[:number])
    inverse = np.linalg.inv(dense(grads, blocks))
    diagonal = fisher.inverse_diagonal()
    np.testing.assert_allclose(diagonal, np.diag(inverse), rtol=2e-6)
    full = dense(grads, blocks)
    keep = ~prune
    joint = np.zeros(weights.shape)
    joint[keep] = np.linalg.solve(full[np.ix_(keep, keep)], full[np.ix_(keep, prune)] @ weights[prune])
    np.testing.assert_allclose(fisher.update(weights, prune, diagonal, True), joint, rtol=1e-5, atol=1e-7)
    single = -inverse[:, prune] @ (weights[prune] / np.diag(inverse)[prune])
    single[prune] = 0.0
    np.testing.assert_allclose(fisher.update(weights, prune, diagonal, False), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [1, 3])
def test_progress_counts_the_blocks_that_are_worked_on(backend, number):
    grads, blocks, weights, prune = problem()
    lock, done = threading.Lock(), []

    def advance():
        with lock:
            done.append(1)

    fisher = BlockFisher(stored(grads), blocks, DAMP, kernels_of(backend)[:number])
    diagonal = fisher.inverse_diagonal(advance)
    assert len(done) == len(blocks)
    done.clear()
    prune[blocks[1]] = False
    fisher.update(weights, prune, diagonal, True, advance)
    assert len(done) == sum(prune[block].any() for block in blocks) < len(blocks)


def test_a_block_without_pruned_weights_isnt_touched():
    grads, blocks, weights, prune = problem()
    prune[:] = False
    prune[blocks[0].start] = True
    change = BlockFisher(stored(grads), blocks, DAMP, [host_kernel()]).update(
        weights, prune, np.ones(len(weights)), True
    )
    assert change[blocks[0]].any()
    assert not change[blocks[0].stop :].any()


class Failing(BlockKernel):
    def __init__(self):
        super().__init__(NumpyOperators())

    def inverse_diagonal(self, grads, damp):
        raise MemoryError("this device is full")


class Waiting(BlockKernel):
    """Works on a block only when another worker has failed."""

    def __init__(self, failed):
        super().__init__(NumpyOperators())
        self.failed = failed
        self.done = 0

    def inverse_diagonal(self, grads, damp):
        self.failed.wait(10)
        self.done += 1
        return super().inverse_diagonal(grads, damp)


@pytest.mark.parametrize("first", [True, False])
def test_a_failing_device_ends_the_work(first):
    failed = threading.Event()

    class FailingLoudly(Failing):
        def inverse_diagonal(self, grads, damp):
            # Long enough after the failure for the others to be told.
            threading.Timer(0.3, failed.set).start()
            return super().inverse_diagonal(grads, damp)

    waiting = Waiting(failed)
    kernels = [FailingLoudly(), waiting] if first else [waiting, FailingLoudly()]
    grads = np.random.default_rng(0).normal(size=(4, 60)).astype(np.float32)
    blocks = block_slices([60], 3)
    with pytest.raises(MemoryError, match="this device is full"):
        BlockFisher(stored(grads), blocks, DAMP, kernels).inverse_diagonal()
    assert waiting.done <= 1


def test_workers_share_the_blocks_and_the_cores():
    seen = []

    class Watching(BlockKernel):
        def inverse_diagonal(self, grads, damp):
            together.wait(10)
            seen.append((threading.get_ident(), host_threads()))
            return super().inverse_diagonal(grads, damp)

    grads, blocks, _, _ = problem()
    alone = BlockFisher(stored(grads), blocks, DAMP, [BlockKernel(NumpyOperators())]).inverse_diagonal()
    together = threading.Barrier(2)
    before = host_threads()
    for kept in (blocks[:4], blocks[:2]):
        seen.clear()
        width = kept[-1].stop
        shared = BlockFisher(
            stored(grads[:, :width]), kept, DAMP, [Watching(NumpyOperators(), lanes=2, on_host=True)]
        ).inverse_diagonal()
        np.testing.assert_allclose(shared, alone[:width], rtol=1e-12)
        assert len({thread for thread, _ in seen}) == 2
        assert {threads for _, threads in seen} == {max(1, before // 2)}
        assert host_threads() == before


def test_one_block_has_all_threads_of_blas():
    grads, _, _, _ = problem()
    seen = []

    class Watching(BlockKernel):
        def inverse_diagonal(self, grads, damp):
            seen.append((self.panels.shared, host_threads()))
            return super().inverse_diagonal(grads, damp)

    before = host_threads()
    BlockFisher(
        stored(grads), block_slices([31], None), DAMP, [Watching(NumpyOperators(), lanes=4, on_host=True)]
    ).inverse_diagonal()
    assert seen == [(True, before)]


def test_gradients_are_left_unchanged(backend):
    grads, blocks, weights, prune = problem()
    before = grads.copy(), weights.copy(), prune.copy()
    fisher = BlockFisher(stored(grads), blocks, DAMP, kernels_of(backend))
    diagonal = fisher.inverse_diagonal()
    fisher.update(weights, prune, diagonal, False)
    for now, then in zip((grads, weights, prune), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert keras.backend.backend() == backend.name
