"""One block of the inverse Fisher: every device's kernel against dense float64 definitions."""

import sys
import threading

import keras
import numpy as np
import pytest
from keras import ops
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.kernel import factors, triangular
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import NumpyOperators, host_kernel

NAME = keras.backend.backend()
DEVICES = get_backend(NAME).devices()
SHAPES = [(200, 260), (260, 200), (1, 1), (1, 7), (5, 1), (8, 8), (8, 5), (8, 40), (16, 130), (30, 29), (30, 31)]
DAMP = 1e-3


@pytest.fixture(params=DEVICES)
def kernel(request, backend):
    return backend.kernel(request.param)


def samples(m, width, seed=0):
    return np.random.default_rng(seed).normal(size=(m, width)).astype(np.float32)


def dense_fisher(grads, damp):
    grads = grads.astype(np.float64)
    return damp * np.eye(grads.shape[1]) + grads.T @ grads / len(grads)


def dense_diagonal(grads, damp):
    return np.diag(np.linalg.inv(dense_fisher(grads, damp)))


def diagonal_by_svd(grads, damp):
    """`diag(F^-1)` by singular values, which is exact where an inverse of the squared matrix isn't."""
    _, values, right = np.linalg.svd(grads.astype(np.float64), full_matrices=False)
    share = values**2 / (values**2 + len(grads) * damp)
    return (1.0 - (share[:, None] * right**2).sum(0)) / damp


def best_joint_change(grads, damp, weights, prune):
    """Minimises `1/2 delta^T F delta` with `delta_Q = -w_Q`: `F_KK delta_K = F_KQ w_Q`."""
    fisher = dense_fisher(grads, damp)
    delta = np.zeros(len(weights))
    delta[~prune] = np.linalg.solve(fisher[np.ix_(~prune, ~prune)], fisher[np.ix_(~prune, prune)] @ weights[prune])
    return delta


def sum_of_single_changes(grads, damp, weights, prune):
    """For each pruned q the best change of all weights is `-w_q F^-1 e_q / [F^-1]_qq`."""
    inverse = np.linalg.inv(dense_fisher(grads, damp))
    delta = np.zeros(len(weights))
    for q in np.flatnonzero(prune):
        delta -= weights[q] / inverse[q, q] * inverse[:, q]
    return np.where(prune, 0.0, delta)


def problem(m, width, seed=0):
    rng = np.random.default_rng(seed)
    return samples(m, width, seed), rng.normal(size=width), rng.random(width) < 0.4


@pytest.mark.parametrize("m, width", SHAPES)
def test_inverse_diagonal_is_that_of_the_dense_inverse(kernel, m, width):
    grads = samples(m, width)
    found = kernel.inverse_diagonal(grads, DAMP)
    assert found.dtype == np.float64
    assert found.shape == (width,)
    np.testing.assert_allclose(found, dense_diagonal(grads, DAMP), rtol=2e-6)


@pytest.mark.parametrize("m, width", SHAPES)
def test_joint_update_solves_the_quadratic(kernel, m, width):
    grads, weights, prune = problem(m, width)
    found = kernel.joint_update(grads, DAMP, weights, prune)
    np.testing.assert_allclose(found, best_joint_change(grads, DAMP, weights, prune), rtol=1e-6, atol=1e-9)
    assert not found[prune].any()


@pytest.mark.parametrize("m, width", SHAPES)
def test_independent_update_is_the_sum_of_single_updates(kernel, m, width):
    grads, weights, prune = problem(m, width)
    diagonal = kernel.inverse_diagonal(grads, DAMP)
    found = kernel.independent_update(grads, DAMP, weights, prune, diagonal)
    truth = sum_of_single_changes(grads, DAMP, weights, prune)
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6 * max(np.abs(truth).max(), 1e-30))
    assert not found[prune].any()


@pytest.mark.parametrize("panel", [1, 7, 32, 64, 65])
def test_panels_change_nothing(backend, panel):
    grads, weights, prune = problem(12, 64, seed=1)
    prune[14:28] = True  # whole panels without a kept weight,
    prune[35:49] = False  # and without a pruned one
    operators = backend.kernel("cpu:0").operators
    for kernel in (BlockKernel(NumpyOperators(), panel=panel), BlockKernel(operators, panel=panel)):
        diagonal = kernel.inverse_diagonal(grads, DAMP)
        np.testing.assert_allclose(diagonal, dense_diagonal(grads, DAMP), rtol=2e-6)
        joint = kernel.joint_update(grads, DAMP, weights, prune)
        np.testing.assert_allclose(joint, best_joint_change(grads, DAMP, weights, prune), rtol=1e-6, atol=1e-9)
        single = kernel.independent_update(grads, DAMP, weights, prune, diagonal)
        np.testing.assert_allclose(single, sum_of_single_changes(grads, DAMP, weights, prune), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("m, width", [(6, 20), (20, 6)])
def test_all_pruned_or_none_changes_no_weight(kernel, m, width):
    grads, weights, _ = problem(m, width)
    diagonal = dense_diagonal(grads, DAMP)
    for prune in (np.ones(width, bool), np.zeros(width, bool)):
        assert not kernel.joint_update(grads, DAMP, weights, prune).any()
        assert not kernel.independent_update(grads, DAMP, weights, prune, diagonal).any()


def nearly_equal(m, width):
    rng = np.random.default_rng(3)
    return (rng.normal(size=(1, width)) + 1e-3 * rng.normal(size=(m, width))).astype(np.float32)


def one_strong_column(m, width):
    grads = samples(m, width)
    grads[:, 1:] *= 1e-4
    return grads * np.float32(3.0)


@pytest.mark.parametrize("panel", [32, 1000])
@pytest.mark.parametrize("make", [nearly_equal, one_strong_column])
def test_extreme_leverage_keeps_its_digits(backend, monkeypatch, make, panel):
    grads, damp = make(64, 200), 1e-7
    truth = diagonal_by_svd(grads, damp)
    assert (damp * truth).min() < 1.0 - factors.RISKY_LEVERAGE or make is nearly_equal
    for device in DEVICES:
        kernel = BlockKernel(backend.kernel(device).operators, panel=panel)
        np.testing.assert_allclose(kernel.inverse_diagonal(grads, damp), truth, rtol=5e-6)
    # Without the computation in float64 it isn't so.
    monkeypatch.setattr(factors, "RISKY_LEVERAGE", np.inf)
    monkeypatch.setattr(factors, "RISKY_ERROR", np.inf)
    careless = host_kernel().inverse_diagonal(grads, damp)
    assert np.abs(careless / truth - 1).max() > 1e-5


def test_ordinary_columns_arent_computed_twice(monkeypatch):
    def fail(*_):
        raise AssertionError("float64 redo of a column that needs none")

    kernel = host_kernel()
    monkeypatch.setattr(kernel.operators, "leverage_float64", fail)
    kernel.inverse_diagonal(samples(64, 300), 1e-5)


def test_diagonal_stays_positive_beyond_float64(kernel):
    # 1 - leverage is about 1e-16 here, no more than its rounding; `1 / F_jj` is a bound that needs no difference.
    for seed in range(20):
        grads = samples(8, 20, seed)
        grads[:, 3] *= 1e8
        try:
            found = kernel.inverse_diagonal(grads, 1e-9)
        except np.linalg.LinAlgError:
            continue  # the other honest answer: for some draws not even the factor exists
        lowest = 1.0 / np.diag(dense_fisher(grads, 1e-9))
        assert (found >= lowest * (1 - 1e-6)).all()
        assert np.isfinite(found).all()


@pytest.mark.parametrize("m, width", [(12, 40), (40, 12)])
def test_the_order_of_samples_is_irrelevant(kernel, m, width):
    grads, weights, prune = problem(m, width)
    other = grads[np.random.default_rng(5).permutation(m)]
    np.testing.assert_allclose(kernel.inverse_diagonal(other, DAMP), kernel.inverse_diagonal(grads, DAMP), rtol=2e-6)
    np.testing.assert_allclose(
        kernel.joint_update(other, DAMP, weights, prune),
        kernel.joint_update(grads, DAMP, weights, prune),
        rtol=1e-6,
        atol=1e-12,
    )


@pytest.mark.parametrize("m, width", [(12, 40), (40, 12)])
def test_inputs_are_left_unchanged_and_may_be_strided(kernel, m, width):
    wide = samples(m, 3 * width)
    before = wide.copy()
    view = wide[:, width : 2 * width]
    _, weights, prune = problem(m, width)
    arguments = weights.copy(), prune.copy()
    contiguous = np.ascontiguousarray(view)
    diagonal = kernel.inverse_diagonal(view, DAMP)
    kept = diagonal.copy()
    np.testing.assert_allclose(diagonal, kernel.inverse_diagonal(contiguous, DAMP), rtol=1e-9)
    joint = kernel.joint_update(view, DAMP, weights, prune)
    np.testing.assert_allclose(joint, kernel.joint_update(contiguous, DAMP, weights, prune), rtol=1e-9)
    kernel.independent_update(view, DAMP, weights, prune, diagonal)
    np.testing.assert_array_equal(wide, before)
    np.testing.assert_array_equal(weights, arguments[0])
    np.testing.assert_array_equal(prune, arguments[1])
    np.testing.assert_array_equal(diagonal, kept)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("m, width", [(6, 20), (20, 6)])
def test_gradients_that_arent_finite_are_an_error(kernel, m, width, value):
    grads, weights, prune = problem(m, width)
    grads[2, 1] = value
    prune[1] = False
    with np.errstate(invalid="ignore"):
        with pytest.raises(np.linalg.LinAlgError, match=r"isn't positive definite with damp=0.001.*larger damp"):
            kernel.inverse_diagonal(grads, DAMP)
        with pytest.raises(np.linalg.LinAlgError, match="isn't positive definite"):
            kernel.joint_update(grads, DAMP, weights, prune)


def test_a_ridge_below_rounding_is_an_error(kernel):
    # Two equal samples of size 1e6: the Gram matrix is singular in float64, and the ridge is far below its rounding.
    grads = np.full((2, 8), 1e6, np.float32)
    grads[1] *= -1.0
    with pytest.raises(np.linalg.LinAlgError, match="damp=1e-12"):
        kernel.inverse_diagonal(grads, 1e-12)


def test_memory_of_the_host_is_not_the_frameworks_to_tell(backend):
    assert backend.free_memory("cpu") is None
    assert backend.peak_memory("cpu") is None


@pytest.mark.parametrize("name", ["numpy", "openvino", "jaxx"])
def test_backends_without_gradients_are_refused(name):
    with pytest.raises(RuntimeError, match=f"needs a Keras backend that computes gradients.*{name}"):
        get_backend(name)


def has_float64():
    """JAX has it only where it is enabled."""
    return ops.ones(1, "float64").dtype in (np.float64, getattr(sys.modules.get("torch"), "float64", None))


def test_float32_precision_is_full_inside_and_put_back(backend, precision):
    kernel, before = backend.kernel("cpu:0"), has_float64()
    with kernel.operators.scope():
        assert precision.read() == precision.strict
        assert has_float64()
    assert precision.read() == precision.loose
    assert has_float64() == before == (NAME != "jax")
    with pytest.raises(np.linalg.LinAlgError):
        kernel.inverse_diagonal(np.full((2, 9), np.nan, np.float32), 1e-3)
    assert precision.read() == precision.loose


def test_float32_precision_holds_until_the_last_thread_leaves(backend, precision):
    operators = backend.kernel("cpu:0").operators
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first():
        with operators.scope():
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    def second():
        first_is_in.wait(10)
        with operators.scope():
            second_is_in.set()
            first_is_out.wait(10)
            seen.append((precision.read(), has_float64()))

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(precision.strict, True)]
    assert precision.read() == precision.loose


def test_precision_chosen_by_the_newer_interface_of_torch_is_kept(backend):
    if NAME != "torch":
        assert backend.name == NAME  # the interface is torch's own
        return
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with backend.kernel("cpu:0").operators.scope():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("panel", [7, 4096])
@pytest.mark.parametrize("m, width", [(12, 40), (40, 12)])
def test_products_over_some_columns(kernel, m, width, panel):
    in_one_thread = BlockKernel(kernel.operators, panel=panel, lanes=2, on_host=True)
    grads, _, prune = problem(m, width)
    prune[:7] = True  # a whole panel
    kept = grads[:, ~prune].astype(np.float64)
    rng = np.random.default_rng(4)
    for shape in ((), (3,)):
        dual, coefficients = rng.normal(size=(m, *shape)), rng.normal(size=(width, *shape))
        coefficients[14:21] = 0.0
        for one in (in_one_thread, in_one_thread.sharing()):
            out = np.full((*shape, width), 7.0)
            one.project(grads, ~prune, dual, out)
            np.testing.assert_allclose(out[..., ~prune], (kept.T @ dual).T, rtol=1e-10, atol=1e-12)
            assert (out[..., prune] == 7.0).all()
            np.testing.assert_allclose(one.gram(grads, ~prune), kept @ kept.T, rtol=1e-12, atol=1e-12)
            found = one.combine(grads, coefficients)
            np.testing.assert_allclose(found, grads.astype(np.float64) @ coefficients, rtol=1e-10, atol=1e-12)


def test_light_compilation_is_put_back():
    if NAME != "jax":
        assert NAME in ("torch", "tensorflow")  # these compile nothing where a model is loaded
        return
    import jax
    from keras_woodfisher_backends.jax.backend import light_compilation

    with pytest.raises(ZeroDivisionError), light_compilation():
        assert jax.config.read("jax_disable_most_optimizations")
        raise ZeroDivisionError
    assert not jax.config.read("jax_disable_most_optimizations")


@pytest.mark.once
@pytest.mark.parametrize("size", [127, 128, 129, 300])
def test_the_zero_quarter_of_a_large_triangle_is_left_alone(size):
    """What is never read may be anything."""
    rng = np.random.default_rng(size)
    left, lower = rng.normal(size=(5, size)), np.tril(rng.normal(size=(size, size)))
    out, other = np.empty((5, size)), np.empty((size, 5))
    spoilt = lower.copy()
    if size >= 128:
        spoilt[: size // 2, size // 2 :] = np.nan
    triangular._times_lower(left, spoilt, out)
    np.testing.assert_allclose(out, left @ lower, rtol=1e-12, atol=1e-10)
    triangular._times_upper(left, spoilt.T, out)
    np.testing.assert_allclose(out, left @ lower.T, rtol=1e-12, atol=1e-10)
    triangular._lower_times(spoilt, left.T, other)
    np.testing.assert_allclose(other, lower @ left.T, rtol=1e-12, atol=1e-10)
