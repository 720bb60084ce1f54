"""Takes gradient samples as an update does, and the same by plain autodiff, one group at a time."""

import keras
import numpy as np
from autodiff import plain_gradients
from gathering import gathered
from keras import layers, ops, tree

from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.model.targets import find_targets
from keras_woodfisher.options.pruning_options import PruningOptions

NAME = keras.backend.backend()
CAPTURES = NAME != "jax"  # on JAX there is one way only
SEED = 0


def source_of(backend, model, data, count, b=1, loss=None, **others):
    options = PruningOptions(num_grads=count, grad_batch_size=b, verbose=0, **{"seed": SEED, **others})
    targets = find_targets(model, options.params)
    return SampledGradients(model, targets, options, backend, open_examples(data), loss), targets


def collect(source, targets, count, backend, draw=0):
    source.check(count)
    kept = [np.ones(t.size, bool) for t in targets]
    return gathered(source, kept, count, draw)


def sample(backend, model, data, count, **kwargs):
    source, targets = source_of(backend, model, data, count, **kwargs)
    grads = collect(source, targets, count, backend)
    return grads, targets, getattr(source._sampler_of(source.loss).sampler, "trusted", None)


def truth_of(model, targets, loss_of_output, data, count, b=1):
    """The samples by definition: group i holds the examples `permutation[i b : (i + 1) b]`."""
    length = len(tree.flatten(data[0])[0])
    order = np.random.default_rng(SEED).permutation(length)[: count * b].reshape(count, b)
    groups = [tree.map_structure(lambda array, chosen=chosen: array[chosen], list(data)) for chosen in order]
    return rows_of(model, targets, loss_of_output, groups)


def rows_of(model, targets, loss_of_output, groups):
    gradients = plain_gradients(model, [t.variable for t in targets], loss_of_output)
    rows = [[t.flatten(g) for t, g in zip(targets, gradients(*group), strict=True)] for group in groups]
    return np.array([np.concatenate(row) for row in rows])


def assert_rows(grads, truth, targets, tolerance=1e-5):
    assert grads.dtype == np.float32
    assert grads.shape == truth.shape
    edges = np.cumsum([t.size for t in targets])[:-1]
    for target, found, right in zip(targets, np.split(grads, edges, 1), np.split(truth, edges, 1), strict=True):
        distance = np.linalg.norm(found - right, axis=1)
        assert np.linalg.norm(right) > 0, target.name
        assert (distance <= tolerance * np.linalg.norm(right, axis=1)).all(), (target.name, distance)


def mean_square(output, y):
    return ops.mean(ops.square(output - y))


def cross_entropy(output, y):
    picked = ops.take_along_axis(ops.log_softmax(output), ops.cast(y, "int32")[:, None], axis=1)
    return -ops.mean(picked)


def chain(shape, *parts, dtype=None):
    inputs = layers.Input(shape, dtype=dtype)
    x = inputs
    for part in parts:
        x = part(x)
    return keras.Model(inputs, layers.Flatten()(x))
