"""Stacks of blocks of one width, against dense float64 definitions."""

import itertools

import keras
import numpy as np
import pytest
from exhausted import full
from gathering import stored
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.kernel import factors
from keras_woodfisher_backends.kernel import stacking as stacks
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import NumpyOperators, host_kernel
from keras_woodfisher_backends.kernel.operators import fill_stack
from keras_woodfisher_backends.kernel.stacking import Stack, Stacking

from keras_woodfisher.pruning import fisher as fisher_module
from keras_woodfisher.pruning.fisher import BlockFisher, block_slices

DAMP = 1e-3
DEVICES = [device for device in get_backend(keras.backend.backend()).devices() if device != "cpu"]
SHAPES = [(1, 1), (5, 1), (8, 8), (12, 40), (40, 12), (30, 31), (33, 70)]


def stacking(operators, kind=BlockKernel, lanes=2):
    return kind(operators, lanes=lanes, stacking=Stacking(operators))


@pytest.fixture(params=DEVICES)
def kernel(request, backend):
    return stacking(backend.kernel(request.param).operators)


@pytest.fixture(autouse=True)
def one_thread_on_jax(monkeypatch):
    """On a CPU, two threads in JAX's triangular solves of stacks may wait for each other forever (jaxlib 0.10.2)."""
    if keras.backend.backend() == "jax":

        def deal(lanes, take, work, cores):
            for lane in itertools.cycle(lanes):
                try:
                    work(lane, take(lane))
                except StopIteration:
                    return

        monkeypatch.setattr(fisher_module, "deal", deal)


def room_for(kernel, number, m, width):
    """A `STACK` in which so many blocks fit."""
    _, rows, columns = kernel.operators.padded((1, m, width))
    return number * rows * columns


def problem(m, width, number=5, seed=0):
    """Gradients of very different sizes; all weights but one stay, few stay, none goes, all go."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(m, number * width)) * np.exp(rng.normal(size=number * width))
    prune = rng.random((number, width)) < np.array([0.1, 0.9, 0.5, 0.0, 1.0])[:number, None]
    return grads.astype(np.float32), rng.normal(size=(number, width)), prune


def stack_of(grads, number, joined=True):
    width = grads.shape[1] // number
    blocks = [slice(place * width, (place + 1) * width) for place in range(number)]
    return Stack(lambda block: grads[:, block], blocks, len(grads), joined)


def dense(samples, damp=DAMP):
    double = samples.astype(np.float64)
    return damp * np.eye(double.shape[1]) + double.T @ double / len(double)


def best_joint_change(fisher, weights, prune):
    delta = np.zeros(len(weights))
    delta[~prune] = np.linalg.solve(fisher[np.ix_(~prune, ~prune)], fisher[np.ix_(~prune, prune)] @ weights[prune])
    return delta


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("m, width", SHAPES)
def test_each_block_of_a_stack_is_that_of_the_definition(kernel, m, width, joined):
    grads, weights, prune = problem(m, width)
    stack = stack_of(grads, 5, joined)
    fishers = [dense(stack[place]) for place in range(5)]
    diagonals = kernel.inverse_diagonals(stack, DAMP)
    np.testing.assert_allclose(diagonals, [np.diag(np.linalg.inv(fisher)) for fisher in fishers], rtol=2e-6)
    joint = kernel.joint_updates(stack, DAMP, weights, prune)
    for found, *args in zip(joint, fishers, weights, prune, strict=True):
        truth = best_joint_change(*args)
        np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-8 * max(np.abs(truth).max(), 1e-30))
    single = kernel.independent_updates(stack, DAMP, weights, prune, np.stack(diagonals))
    for found, fisher, w, gone in zip(single, fishers, weights, prune, strict=True):
        inverse = np.linalg.inv(fisher)
        truth = np.where(gone, 0.0, -inverse[:, gone] @ (w[gone] / np.diag(inverse)[gone]))
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5 * max(np.abs(truth).max(), 1e-30))


def test_extreme_leverage_keeps_its_digits_in_a_stack(kernel, monkeypatch):
    rng = np.random.default_rng(3)
    width, damp = 200, 1e-7
    grads = rng.normal(size=(64, 3 * width))
    # One strong column, ordinary ones, and samples that are nearly equal.
    grads[:, 1:width] *= 1e-4
    grads[:, 2 * width :] = grads[:1, 2 * width :] + 1e-3 * grads[:, 2 * width :]
    grads = grads.astype(np.float32)
    stack = stack_of(grads, 3)
    truth = []
    for place in range(3):
        _, values, right = np.linalg.svd(stack[place].astype(np.float64), full_matrices=False)
        share = values**2 / (values**2 + 64 * damp)
        truth.append((1.0 - (share[:, None] * right**2).sum(0)) / damp)
    np.testing.assert_allclose(kernel.inverse_diagonals(stack, damp), truth, rtol=5e-6)
    monkeypatch.setattr(factors, "RISKY_LEVERAGE", np.inf)
    monkeypatch.setattr(factors, "RISKY_ERROR", np.inf)
    careless = np.stack(kernel.inverse_diagonals(stack, damp)) / truth
    assert np.abs(careless - 1.0).max() > 1e-5


@pytest.mark.parametrize("m, width", [(6, 20), (20, 6)])
def test_a_block_that_is_not_finite_is_an_error(kernel, m, width):
    grads, weights, prune = problem(m, width, 3)
    grads[1, width + 1] = np.nan
    with pytest.raises(np.linalg.LinAlgError, match=r"isn't positive definite with damp=0.001"):
        kernel.inverse_diagonals(stack_of(grads, 3), DAMP)
    with pytest.raises(np.linalg.LinAlgError, match=r"isn't positive definite with damp=0.001"):
        kernel.joint_updates(stack_of(grads, 3), DAMP, weights, np.zeros_like(prune))


def test_a_full_device_takes_smaller_stacks(kernel, monkeypatch):
    grads, _, _ = problem(6, 20)
    sizes, original = [], kernel.operators.load_stack

    def load_stack(shape, parts):
        if shape[0] > 1:  # GPUs load single panels in the same way
            sizes.append(shape[0])
        if shape[0] > 2:
            raise full()
        return original(shape, parts)

    monkeypatch.setattr(kernel.operators, "load_stack", load_stack)
    monkeypatch.setattr(stacks, "STACK", room_for(kernel, 4, 6, 20))
    found = kernel.inverse_diagonals(stack_of(grads, 5), DAMP)
    assert sizes == [4, 2, 2]  # and the last one by itself
    truth = [np.diag(np.linalg.inv(dense(grads[:, start : start + 20]))) for start in range(0, 100, 20)]
    np.testing.assert_allclose(found, truth, rtol=2e-6)
    assert kernel.together(6, 20) == 2  # from now on
    kernel.fit(6, 20, 10**9)
    assert kernel.together(6, 20) == 4


def test_a_device_that_is_too_full_for_stacks_takes_single_blocks(kernel, monkeypatch):
    """With panels as wide as before."""
    grads, weights, prune = problem(6, 20)
    original, wide = kernel.operators.load_stack, kernel.panels.width

    def load_stack(shape, parts):
        if shape[0] > 1:
            raise full()
        return original(shape, parts)

    monkeypatch.setattr(kernel.operators, "load_stack", load_stack)
    found = kernel.inverse_diagonals(stack_of(grads, 5), DAMP)
    truth = [np.diag(np.linalg.inv(dense(grads[:, start : start + 20]))) for start in range(0, 100, 20)]
    np.testing.assert_allclose(found, truth, rtol=2e-6)
    kernel.joint_updates(stack_of(grads, 5), DAMP, weights, prune)
    assert kernel.together(6, 20) == 1
    assert kernel.panels.width == wide


def test_a_host_beside_a_gpu_takes_block_after_block(kernel):
    grads, _, _ = problem(6, 100, 3)
    blocks = block_slices([300], 30)

    class Host(BlockKernel):
        def inverse_diagonals(self, stack, damp):
            assert len(stack) == 1
            return super().inverse_diagonals(stack, damp)

    kernels = [kernel, Host(NumpyOperators(), on_host=True)]
    found = BlockFisher(stored(grads), blocks, DAMP, kernels).inverse_diagonal()
    np.testing.assert_allclose(
        found, BlockFisher(stored(grads), blocks, DAMP, [host_kernel()]).inverse_diagonal(), rtol=2e-6
    )


def test_the_users_own_settings_of_torch_change_nothing(kernel):
    if keras.backend.backend() != "torch":
        assert not kernel.on_host
        return
    import torch

    grads, _, _ = problem(6, 20)
    plain = kernel.inverse_diagonals(stack_of(grads, 5), DAMP)
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(kernel.inverse_diagonals(stack_of(grads, 5), DAMP), plain)
        with torch.device("meta"):
            np.testing.assert_array_equal(kernel.inverse_diagonals(stack_of(grads, 5), DAMP), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_blocks_of_one_width_are_dealt_out_together(kernel, monkeypatch):
    """Whatever lies between them; and each lane gets some."""
    grads, weights, prune = problem(6, 100, 3)
    weights, prune = weights.ravel(), prune.ravel()
    blocks = block_slices([70, 100, 130], 30)  # widths 30 30 10, 30 30 30 10, 30 30 30 30 10
    plain = BlockFisher(stored(grads), blocks, DAMP, [host_kernel()])
    sizes = []

    class Watching(BlockKernel):
        def inverse_diagonals(self, stack, damp):
            sizes.append((stack.width, len(stack)))
            return super().inverse_diagonals(stack, damp)

    stacked = BlockFisher(stored(grads), blocks, DAMP, [stacking(kernel.operators, Watching)])
    np.testing.assert_allclose(stacked.inverse_diagonal(), plain.inverse_diagonal(), rtol=2e-6)
    assert sorted(sizes) == [(10, 1), (10, 2), (30, 4), (30, 5)]
    for joint in (True, False):
        args = weights, prune, plain.inverse_diagonal(), joint
        np.testing.assert_allclose(stacked.update(*args), plain.update(*args), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(stacks, "STACK", room_for(kernel, 4, 6, 30))
    sizes.clear()
    BlockFisher(stored(grads), blocks, DAMP, [stacking(kernel.operators, Watching)]).inverse_diagonal()
    assert sorted(sizes) == [(10, 1), (10, 2), (30, 1), (30, 4), (30, 4)]


def test_blocks_are_read_one_after_the_other_or_with_their_neighbours(kernel):
    grads, _, _ = problem(6, 20)
    blocks = [slice(start, start + 20) for start in (0, 20, 60, 80)]
    for joined, wanted in ((False, blocks), (True, [slice(0, 40), slice(60, 100)])):
        read = []
        stack = Stack(lambda block: read.append(block) or grads[:, block], blocks, 6, joined)  # noqa: B023
        found = kernel.inverse_diagonals(stack, DAMP)
        assert read == wanted
        truth = [np.diag(np.linalg.inv(dense(grads[:, block]))) for block in blocks]
        np.testing.assert_allclose(found, truth, rtol=2e-6)


def test_a_stack_stays_within_its_room(kernel):
    shapes = ((64, 2000), (512, 2000), (512, 512), (1024, 50), (4096, 4096), (10, 5000), (512, 4), (65, 2100))
    most = kernel.memory(512, 2000)
    for m, width in shapes:
        number = kernel.together(m, width)
        padded = kernel.operators.padded((number, m, width))
        # Whatever the widest block is.
        assert number == 1 or 16 * np.prod(padded) + 32 * number * min(padded[1:]) ** 2 <= most
        assert number == 1 or 4 * np.prod(padded) <= kernel.staged(m, width, 10**8)
        assert kernel.memory(m, width) >= kernel.with_lanes(1).memory(m, width)
    assert kernel.together(512, 2000) == 16
    assert kernel.memory(512, 2000, blocks=2) < kernel.memory(512, 2000, blocks=8) < kernel.memory(512, 2000)
    before = kernel.memory(512, 2000)
    kernel.fit(512, 2000, before // 4)
    assert kernel.memory(512, 2000) <= before // 4
    assert kernel.together(512, 2000) < 16
    # A single lane means that the host's memory is scarce.
    alone = kernel.with_lanes(1)
    assert alone.together(512, 2000) == 1
    assert alone.staged(512, 2000, 0) == 4 * 512 * 2000 < kernel.staged(512, 2000, 10**6) == 4 * stacks.STACK


def test_a_host_takes_blocks_one_by_one():
    assert host_kernel().together(8, 8) == 1
    grads, weights, prune = problem(6, 20)
    stack, host = stack_of(grads, 5), host_kernel()
    diagonals = host.inverse_diagonals(stack, DAMP)
    np.testing.assert_array_equal(diagonals[2], host.inverse_diagonal(stack[2], DAMP))
    joint = host.joint_updates(stack, DAMP, weights, prune)
    np.testing.assert_array_equal(joint[2], host.joint_update(stack[2], DAMP, weights[2], prune[2]))
    args = DAMP, weights, prune, np.stack(diagonals)
    single = host.independent_updates(stack, *args)
    np.testing.assert_array_equal(
        single[2], host.independent_update(stack[2], DAMP, weights[2], prune[2], diagonals[2])
    )


def test_parts_lie_one_after_the_other():
    parts = [np.arange(12.0).reshape(3, 4), np.arange(100.0, 106.0).reshape(3, 2)]
    stack = np.full((3, 3, 2), -1.0)
    fill_stack(stack, iter(parts))
    np.testing.assert_array_equal(stack, np.stack([parts[0][:, :2], parts[0][:, 2:], parts[1]]))
