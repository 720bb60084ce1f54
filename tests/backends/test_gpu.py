"""The kernel and a whole prune on a GPU, where the machine has one that the backend sees."""

import keras
import numpy as np
import pytest
from exhausted import full
from keras_woodfisher_backends import get_backend
from sampling import assert_rows, cross_entropy, sample, truth_of

import keras_woodfisher as kw

DAMP = 1e-5
GPUS = [device for device in get_backend(keras.backend.backend()).devices() if not device.startswith("cpu")]

pytestmark = pytest.mark.skipif(not GPUS, reason="the backend sees no GPU")


def worst(value, truth):
    return float(np.max(np.abs(value - truth)) / np.max(np.abs(truth)))


@pytest.mark.parametrize("shape", [(64, 700), (300, 200)])
def test_inverse_and_solve_agree_with_float64(backend, rng, shape):
    """Gradients of very different sizes, and some weights that never had one."""
    grads = rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape[1]))
    grads = (grads * (rng.random(shape[1]) < 0.8) * 1e-2).astype(np.float32)
    double = grads.astype(np.float64)
    inverse = np.linalg.inv(DAMP * np.eye(shape[1]) + double.T @ double / shape[0])
    kernel = backend.kernel(GPUS[0])
    diagonal = kernel.inverse_diagonal(grads, DAMP)
    assert np.max(np.abs(diagonal / np.diag(inverse) - 1.0)) < 2e-6
    weights = rng.normal(size=shape[1])
    for share in (0.3, 0.9):
        prune = rng.random(shape[1]) < share
        kept = ~prune
        multipliers = np.linalg.solve(inverse[np.ix_(prune, prune)], weights[prune])
        truth = -inverse[np.ix_(kept, prune)] @ multipliers
        change = kernel.joint_update(grads, DAMP, weights, prune)
        assert worst(change[kept], truth) < 2e-6


def test_samples_of_convolutions_are_exact_and_fast(backend, rng, precision):
    """Though the user's own setting rounds the factors of products, to TF32 for one."""
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 6)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(24, 3, strides=2, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = rng.normal(size=(20, 8, 8, 6)).astype("float32"), rng.integers(0, 5, 20).astype("int32")
    grads, targets, trusted = sample(backend, model, data, 20)
    precision.write(precision.strict)
    assert_rows(grads, truth_of(model, targets, cross_entropy, data, 20), targets)
    assert trusted in (True, None)


def test_a_prune_on_the_gpu_is_that_on_the_host(make_mlp, blobs):
    weights = []
    for devices in ([], "all", [GPUS[0]]):
        keras.utils.set_random_seed(0)
        model = make_mlp(units=64)
        report = kw.prune(
            model,
            blobs,
            0.6,
            quality="fast",
            num_grads=32,
            fisher_block_size=100,
            available_gpus=devices,
            verbose=0,
        )
        weights.append(model.get_weights())
        assert report.sparsity == pytest.approx(0.6, abs=0.01)
    for chosen in weights[1:]:
        for one, other in zip(chosen, weights[0], strict=True):
            np.testing.assert_array_equal(one == 0.0, other == 0.0)
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_framework_tells_of_the_memory(backend):
    free = backend.free_memory(GPUS[0])
    # TensorFlow doesn't tell it.
    assert (free is None) == (backend.name == "tensorflow")
    assert free is None or free > 2**28
    backend.kernel(GPUS[0]).inverse_diagonal(np.ones((64, 2000), np.float32), DAMP)
    assert backend.peak_memory(GPUS[0]) > 64 * 2000 * 4


def test_a_full_gpu_says_so(backend):
    kernel = backend.kernel(GPUS[0])
    assert kernel.operators.is_out_of_memory(full())
    with kernel.operators.scope(), pytest.raises(Exception) as raised:
        # 8 TB: no device has so much.
        kernel.operators.gram(_tall(kernel.operators, 10**6), None)
    assert kernel.operators.is_out_of_memory(raised.value)


def _tall(operators, rows):
    return operators.load(np.ones((rows, 1), np.float32))
