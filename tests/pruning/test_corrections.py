"""Corrections over all kept weights against the dense float64 definition."""

import numpy as np
import pytest
from gathering import add_rows, stored

from keras_woodfisher.memory.disk import DiskStore
from keras_woodfisher.pruning.corrections import WholeCorrection

M, D = 9, 40


def stores(grads, page):
    blocks = [slice(0, 15), slice(15, 30), slice(30, D)]
    yield stored(grads)
    disk = DiskStore(grads.shape, 4, "float32", page, blocks)
    add_rows(disk, grads, np.ones(len(grads), bool))
    disk.finish()
    yield disk
    disk.close()


def problem(seed=0):
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(M, D)).astype(np.float32)
    return grads, rng.normal(size=D).astype(np.float32), rng.random(D) < 0.4, rng.normal(size=D)


def dense_fisher(grads):
    double = grads.astype(np.float64)
    return double.T @ double / len(double)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_changes_are_those_of_the_dense_matrix(backend, device):
    grads, weights, prune, gradient = problem()
    fisher, keep = dense_fisher(grads), ~prune
    compensations, steps = [1e-3, 0.1, 5.0], [0.5, 20.0]
    for store in stores(grads, page=7):
        correction = WholeCorrection(store, backend.kernel(device), weights, prune)
        compensated, stepped = correction.compensations(compensations), correction.steps(gradient, steps)
        assert compensated.dtype == stepped.dtype == np.float32
        for change, damp in zip(compensated, compensations, strict=True):
            ridge = fisher[np.ix_(keep, keep)] + damp * np.eye(keep.sum())
            truth = np.linalg.solve(ridge, fisher[np.ix_(keep, prune)] @ weights[prune].astype(np.float64))
            np.testing.assert_allclose(change[keep], truth, rtol=1e-4, atol=1e-5 * np.abs(truth).max())
            assert (change[prune] == 0).all()
        for change, damp in zip(stepped, steps, strict=True):
            ridge = fisher[np.ix_(keep, keep)] + damp * np.eye(keep.sum())
            truth = -np.linalg.solve(ridge, gradient[keep])
            np.testing.assert_allclose(change[keep], truth, rtol=1e-4, atol=1e-5 * np.abs(truth).max())
            assert (change[prune] == 0).all()


def test_nothing_removed_needs_no_compensation(backend):
    grads, weights, prune, _ = problem(2)
    correction = WholeCorrection(stored(grads), backend.kernel("cpu"), weights, np.zeros_like(prune))
    assert (correction.compensations([0.1]) == 0).all()
