"""Bytes of sparse formats: truth by hand, from SciPy's own CSR and from zlib."""

import zlib

import keras
import numpy as np
import pytest
import scipy.sparse
from keras import layers

from keras_woodfisher.model.targets import all_targets
from keras_woodfisher.reports.storage import Storage, matrix_storage, target_matrix, target_storage

# Random starting values would be compiled on JAX, for each shape anew.
ZEROS = {"kernel_initializer": "zeros"}


def sparse(rng, rows, columns, density, dtype="float32"):
    values = rng.integers(1, 100, (rows, columns)).astype(dtype)
    return np.where(rng.random((rows, columns)) < density, values, 0).astype(dtype)


def test_a_small_matrix_by_hand():
    matrix = np.zeros((3, 5), "float32")
    matrix[0, 1], matrix[0, 4], matrix[2, 0], matrix[2, 2] = 1.5, -2.0, 3.0, -0.0
    found = matrix_storage(matrix)
    assert found.dense == 15 * 4
    assert found.bitmask == 2 + 3 * 4, "15 bits take 2 bytes; -0.0 is a zero"
    assert found.csr == 3 * 4 + 3 * 2 + 4 * 2, "values, column indices, row pointers"


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 11), (64, 33)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8"])
def test_csr_and_bitmask_from_their_definitions(rng, shape, density, dtype):
    matrix = sparse(rng, *shape, density, dtype)
    wide = scipy.sparse.csr_matrix(matrix.astype("float64"))  # SciPy's CSR knows no float16
    assert matrix_storage(matrix).csr == wide.nnz * matrix.itemsize + 2 * wide.indices.size + 2 * wide.indptr.size
    bits = np.packbits(matrix.ravel() != 0)
    assert matrix_storage(matrix).bitmask == bits.nbytes + matrix[matrix != 0].nbytes


@pytest.mark.parametrize(("columns", "width"), [(2**16, 2), (2**16 + 1, 4)])
def test_column_indices_take_what_the_largest_needs(columns, width):
    matrix = np.zeros((1, columns), "int8")
    matrix[0, -1] = 1
    assert matrix_storage(matrix).csr == 1 + width + 2 * 2


@pytest.mark.parametrize(("nonzero", "width"), [(2**16 - 1, 2), (2**16, 4)])
def test_row_pointers_take_what_the_count_of_nonzeros_needs(nonzero, width):
    matrix = np.zeros((2, 2**15 + 1), "int8")
    matrix.ravel()[:nonzero] = 1
    assert matrix_storage(matrix).csr == nonzero * (1 + 2) + 3 * width


def test_gzip_is_what_deflate_makes_of_the_bytes_row_by_row(rng):
    matrix = sparse(rng, 40, 30, 0.2)
    deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = deflate.compress(matrix.tobytes()) + deflate.flush()
    assert zlib.decompress(packed, -zlib.MAX_WBITS) == matrix.tobytes()
    assert matrix_storage(matrix).gzip == len(packed) + 18, "10 bytes of header, 8 of checksum and length"
    assert matrix_storage(np.asfortranarray(matrix)) == matrix_storage(matrix)


def test_storages_add_up():
    assert Storage(1, 2, 3, 4) + Storage(10, 20, 30, 40) == Storage(11, 22, 33, 44)


def target_of(layer, shape, name="kernel"):
    model = keras.Sequential([keras.Input(shape), layer])
    return next(t for t in all_targets(model) if t.variable.name == name)


@pytest.mark.parametrize(
    ("layer", "shape", "outputs"),
    [
        (lambda: layers.Dense(5, **ZEROS), (7,), lambda k: [k[:, o] for o in range(5)]),
        (
            lambda: layers.Conv2D(5, (3, 2), **ZEROS),
            (8, 8, 4),
            lambda k: [np.moveaxis(k[..., o], 2, 0) for o in range(5)],
        ),
        (
            lambda: layers.Conv1DTranspose(5, 3, **ZEROS),
            (8, 4),
            lambda k: [np.moveaxis(k[:, o], 1, 0) for o in range(5)],
        ),
        (
            lambda: layers.DepthwiseConv2D((3, 2), depth_multiplier=2, depthwise_initializer="zeros"),
            (8, 8, 4),
            lambda k: [k[..., c, m] for c in range(4) for m in range(2)],
        ),
        (
            lambda: layers.EinsumDense("abc,cde->abde", (None, 3, 2), **ZEROS),
            (6, 4),
            lambda k: [k[:, d, e] for d in range(3) for e in range(2)],
        ),
        (
            lambda: layers.EinsumDense("abde,dec->abc", (None, 5), **ZEROS),
            (6, 3, 2),
            lambda k: [k[:, :, c] for c in range(5)],
        ),
    ],
)
def test_a_row_is_an_output_unit(layer, shape, outputs):
    target = target_of(layer(), shape)
    kernel = np.arange(1.0, target.size + 1, dtype="float32").reshape(target.variable.shape)
    target.variable.assign(kernel)
    expected = np.stack([np.ravel(row) for row in outputs(kernel)])
    np.testing.assert_array_equal(target_matrix(target), expected)
    assert target_storage(target) == matrix_storage(expected)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_weights_count_in_their_own_dtype(dtype, itemsize):
    layer = layers.Dense(6, dtype=dtype, **ZEROS)
    target = target_of(layer, (10,))
    layer.kernel.assign(np.tile([0.0, 0.5], 30).reshape(10, 6))
    found = target_storage(target)
    assert found.dense == 60 * itemsize
    assert found.bitmask == 8 + 30 * itemsize
    assert found.csr == 30 * itemsize + 30 * 2 + 7 * 2
