"""Gradient samples where memory is full: fewer at a time, and the same rows."""

import numpy as np
import pytest
from exhausted import full
from keras import layers
from sampling import CAPTURES, NAME, assert_rows, chain, collect, cross_entropy, mean_square, source_of, truth_of

from keras_woodfisher.gradients.sampling import HalvingSampler


class Narrow:
    """A backend on whose device only so many groups fit."""

    slow_layers = None

    def __init__(self, backend, most, error=None):
        self.chunk_groups = backend.chunk_groups
        self.outlined = backend.outlined
        self.is_out_of_memory = backend.is_out_of_memory
        self._backend, self._most, self._error = backend, most, error or full()
        self.sizes = []

    def sampler(self, *args):
        self._sampler = self._backend.sampler(*args)
        return self

    def __call__(self, values, others, batch):
        self.sizes.append(len(batch[0]))
        if self.sizes[-1] > self._most:
            raise self._error
        return self._sampler(values, others, batch)


def narrow_source(backend, model, data, most, rows, b=1, error=None):
    source, targets = source_of(backend, model, data, rows, b=b)
    source._backend = Narrow(backend, most, error)
    return source, targets


@pytest.mark.parametrize(
    "b, rows, most, sizes", [(1, 10, 9, [10, 5, 5]), (1, 10, 3, [10, 5] + 5 * [2]), (3, 7, 1, None)]
)
def test_a_chunk_that_does_not_fit_is_taken_in_parts(backend, blobs, make_mlp, b, rows, most, sizes):
    model = make_mlp()
    source, targets = narrow_source(backend, model, blobs, most, rows, b)
    grads = collect(source, targets, rows, backend)
    assert_rows(grads, truth_of(model, targets, cross_entropy, blobs, rows, b), targets)
    assert sizes is None or source._backend.sizes == sizes
    # What didn't fit isn't tried again.
    source._backend.sizes.clear()
    again = collect(source, targets, rows, backend)
    np.testing.assert_allclose(again, grads, rtol=1e-5, atol=1e-7)
    assert max(source._backend.sizes) <= most


def test_a_part_that_is_not_full_has_the_same_shape(backend, blobs, make_mlp):
    model = make_mlp()
    source, targets = narrow_source(backend, model, blobs, 5, 11)
    grads = collect(source, targets, 11, backend)
    assert source._backend.sizes == [11, 5, 5, 5]
    assert_rows(grads, truth_of(model, targets, cross_entropy, blobs, 11), targets)


def test_one_sample_that_does_not_fit_is_an_error(backend, blobs, make_mlp):
    source, targets = narrow_source(backend, make_mlp(), blobs, 0, 4, b=2)
    with pytest.raises(MemoryError, match=r"no memory for one gradient sample of 2 examples: .*Lower grad_batch_size"):
        collect(source, targets, 4, backend)
    assert source._backend.sizes == [4, 2, 1]


def test_other_errors_are_not_tried_again(backend, blobs, make_mlp):
    source, targets = narrow_source(backend, make_mlp(), blobs, 0, 4, error=RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        collect(source, targets, 4, backend)
    assert source._backend.sizes == [4]


class Crowded(layers.Layer):
    """Has room for four examples."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x):
        self.seen.append(x.shape[0])
        if x.shape[0] is not None and x.shape[0] > 4:
            raise full()
        return x + 0.0

    def compute_output_shape(self, shape):
        return shape


def test_full_memory_is_no_reason_to_give_up_the_fast_way(backend, rng):
    crowded = Crowded()
    model = chain((3,), layers.Dense(4, "tanh"), crowded, layers.Dense(2))
    model.compile(loss="mse")
    x, y = rng.normal(size=(9, 3)).astype("float32"), rng.normal(size=(9, 2)).astype("float32")
    source, targets = source_of(backend, model, (x, y), 9)
    grads = collect(source, targets, 9, backend)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 9), targets)
    if CAPTURES:
        assert {9, 4} <= set(crowded.seen)
        assert source._sampler_of(source.loss).sampler.trusted
        assert source.slow_layers is None


def too_much():
    """More than any machine has."""
    if NAME == "torch":
        import torch

        return torch.empty(2**50)
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.zeros([2**46])
    import jax.numpy as jnp

    return jnp.zeros(2**46).block_until_ready()


def test_errors_of_full_memory_are_known(backend):
    with pytest.raises(Exception) as caught:
        too_much()
    assert backend.is_out_of_memory(caught.value)
    assert backend.is_out_of_memory(full())
    assert backend.is_out_of_memory(MemoryError())
    for error in (ValueError("x"), RuntimeError("x")):
        assert not backend.is_out_of_memory(error)


def test_it_says_what_makes_sampling_slow(backend, blobs, make_mlp):
    narrow = Narrow(backend, 1)
    narrow.slow_layers = object()
    assert HalvingSampler(None, narrow, backend).slow_layers is narrow.slow_layers
