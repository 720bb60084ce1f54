"""How many bytes a pruned variable takes: dense, as a bitmask, in CSR, and compressed with gzip.

Keras stores every zero. These figures tell what a format for sparse weights would save; `keras_woodfisher.save` comes
near to the last one.
"""

import gzip
from dataclasses import astuple, dataclass
from typing import Any
from weakref import ref

import keras
import numpy as np
from keras import ops

from keras_woodfisher.model.axes import axis_roles
from keras_woodfisher.model.quantized import holds_integers, integers_of, mode_of
from keras_woodfisher.model.targets import Target

_GZIP_LEVEL = 6


@dataclass(frozen=True)
class Storage:
    """Bytes of one variable, or of several together.

    Attributes:
        dense: Every weight: `rows * columns * itemsize`.
        bitmask: One bit a weight, rounded up to bytes, and the weights that aren't zero.
        csr: Compressed sparse rows: the weights that aren't zero, a column index each, and `rows + 1` row
            pointers. Indices and pointers each take the smallest of uint16, uint32 and uint64 that holds the
            largest of them.
        gzip: The dense bytes, row by row, after gzip at level 6.
    """

    dense: int
    bitmask: int
    csr: int
    gzip: int

    def __add__(self, other: "Storage") -> "Storage":
        return Storage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def matrix_storage(matrix: np.ndarray, stored: np.ndarray | None = None) -> Storage:
    """The bytes of a matrix (rows, columns), of any type of number.

    Args:
        matrix: Its entries.
        stored: The array that holds them, if another one, perhaps two in a byte.
    """
    rows, columns = matrix.shape
    nonzero = int(np.count_nonzero(matrix))
    dense = matrix if stored is None else stored
    values = -(-nonzero // 2) if dense.size < matrix.size else nonzero * dense.itemsize
    indices = nonzero * _index_bytes(columns - 1)
    pointers = (rows + 1) * _index_bytes(nonzero)
    return Storage(
        dense=dense.nbytes,
        bitmask=-(-matrix.size // 8) + values,
        csr=values + indices + pointers,
        gzip=len(gzip.compress(np.ascontiguousarray(dense).tobytes(), _GZIP_LEVEL, mtime=0)),
    )


def target_storage(target: Target) -> Storage:
    """The bytes of a variable as a matrix in weight order: one row an output unit, in the variable's own dtype.

    Integers of 4 bits that are packed two in a byte take half a byte each.

    Raises:
        ValueError: If the integers of a quantised layer can't be read.
    """
    if holds_integers(target.layer, target.variable) and mode_of(target.layer) != "int8":
        integers = integers_of(target.layer, target.variable)
        if integers is None:
            raise ValueError(f"The integers of {target.name!r} ({mode_of(target.layer)}) can't be read.")
        # A row of an embedding is an output unit already.
        by_output = integers.T if target.variable.name == "kernel" else integers
        return matrix_storage(by_output, ops.convert_to_numpy(target.variable))
    return matrix_storage(target_matrix(target))


class StoredVariable:
    """Measures the bytes of a variable when they are first asked for: compression takes 0.1 s a megabyte.

    It keeps no variable alive. Written to a file (pickled), it knows what was asked for before.

    Args:
        target: The variable.
        pruned: How many of its weights were zero.
    """

    def __init__(self, target: Target, pruned: int):
        self._parts: tuple[Any, ...] | None = (ref(target.variable), ref(target.layer), target.aliases, target.order)
        self._pruned = pruned
        self._found: Storage | None = None

    def __call__(self) -> Storage | None:
        """The bytes; None where the variable is gone, or has another number of zeros now."""
        if self._found is None and self._parts is not None:
            variable, layer, aliases, order = self._parts
            if variable() is not None and layer() is not None:
                target = Target(variable(), layer(), aliases, order)
                if _zeros_of(target) == self._pruned:
                    self._found = target_storage(target)
        return self._found

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_parts": None}


def _zeros_of(target: Target) -> int | None:
    values = (
        integers_of(target.layer, target.variable)
        if holds_integers(target.layer, target.variable)
        else ops.convert_to_numpy(target.variable)
    )
    return None if values is None else values.size - int(np.count_nonzero(values))


def target_matrix(target: Target) -> np.ndarray:
    """A variable's weights (output units, inputs x kernel positions), in the variable's own dtype."""
    variable = target.variable
    # Frameworks may hand out bfloat16 as float32.
    values = ops.convert_to_numpy(variable).astype(np.dtype(keras.backend.standardize_dtype(variable.dtype)))
    roles = axis_roles(target.layer, variable.name, len(variable.shape))
    return target.flatten(values).reshape(int(np.prod([variable.shape[axis] for axis in roles.outputs])), -1)


def _index_bytes(largest: int) -> int:
    return next(size for size in (2, 4, 8) if largest < 2 ** (8 * size))
