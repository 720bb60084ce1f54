"""Batches of examples, as NumPy arrays with examples along their first axis, and chunks of groups of examples."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
from keras_woodfisher_backends.nest import arrays, map_arrays, take
from keras_woodfisher_backends.protocol import Backend

Batch = tuple[Any, Any, Any]
"""(x, y, sample_weight), each an array, None, or a nest of arrays."""

_Nest = TypeVar("_Nest")

_CHUNK_BYTES = 256 * 2**20


def as_batch(item: Any) -> Batch:
    """What an iterable of batches gave, as arrays.

    Raises:
        TypeError, ValueError: If it isn't a batch.
    """
    batch = map_arrays(as_numpy, unpacked(item))
    if len(found := lengths(batch)) != 1:
        raise ValueError(
            f"The arrays of a batch in data hold {sorted(found)} examples. Give batches, with the same number of "
            "rows in x, y and sample_weight (a dataset of single examples needs `.batch(...)`)."
        )
    return batch


def unpacked(item: Any) -> Batch:
    """The parts of `(x, y, sample_weight)`, whatever kind of arrays they are; what is missing is None.

    Raises:
        ValueError: If there are other parts.
    """
    if isinstance(item, list):
        item = tuple(item)
    if isinstance(item, tuple) and not 1 <= len(item) <= 3:
        raise ValueError(
            f"data must give (x, y) or (x, y, sample_weight), got {len(item)} parts. "
            "Put several inputs into one list or dictionary x: ([x1, x2], y), or ([x1, x2],) without labels."
        )
    return keras.utils.unpack_x_y_sample_weight(item)


def lengths(batch: Batch) -> set[int]:
    """How many examples each array holds; one number where the batch is sound."""
    return {leaf.shape[0] if leaf.ndim else 0 for leaf in arrays(batch)}


def length(batch: Batch) -> int:
    """How many examples a batch holds."""
    return len(arrays(batch)[0])


def as_numpy(leaf: Any) -> np.ndarray:
    """An array of any framework.

    Raises:
        TypeError: If it isn't a dense array of numbers.
    """
    if hasattr(leaf, "detach"):  # a torch tensor, on any backend
        leaf = leaf.detach().cpu()
    if hasattr(leaf, "dense_shape") or hasattr(leaf, "row_splits"):
        raise TypeError("data holds sparse or ragged tensors. Convert them to dense ones first.")
    if isinstance(leaf, (int, float, bool)):
        raise TypeError(f"data holds the plain number {leaf!r}, perhaps within lists. Convert lists by numpy.asarray.")
    array = np.asarray(leaf)
    if array.dtype.name == "bfloat16":  # JAX's, which NumPy doesn't know
        return array.astype("float32")
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"data holds a {type(leaf).__name__} of {array.dtype}, which isn't a dense array of real numbers. "
            "Convert it first; text is to be tokenised outside the model."
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    wide = array.dtype.kind == "f" and array.dtype.itemsize >= 8
    return array.astype(keras.config.floatx()) if wide else array


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in parts of `size` examples; the last one may be smaller."""
    for start in range(0, length(batch), size):
        yield take(batch, slice(start, start + size))


def cut_evenly(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of one size, as few as fit `size` examples each; the few that are left over don't count.

    Eager frameworks compile each operation anew for another size.
    """
    number = -(-length(batch) // size)
    each = length(batch) // number
    return list(cut(take(batch, slice(0, each * number)), each))


def between(groups: Iterator[_Nest], start: int, stop: int) -> Iterator[_Nest]:
    """The groups of chunks from one place on to another."""
    place = 0
    for chunk in groups:
        number = len(arrays(chunk)[0])
        first, last = max(start - place, 0), min(stop - place, number)
        if first < last:
            yield take(chunk, slice(first, last))
        place += number
        if place >= stop:
            return


def even_chunks(groups: Iterator[Batch], size_for: Callable[[int], int]) -> Iterator[tuple[Batch, int]]:
    """Chunks of one size; one that isn't full repeats its last group: compiled samplers see one shape only."""
    rest: Batch | None = None
    for batch in groups:
        if rest is not None and not _same_shapes(rest, batch):
            yield _filled(rest, size_for)
            rest = None
        joined = batch if rest is None else map_arrays(lambda *parts: np.concatenate(parts), rest, batch)
        count, size = arrays(joined)[0].shape[0], size_for(arrays(joined)[0].shape[1])
        full = count // size * size
        for start in range(0, full, size):
            yield take(joined, slice(start, start + size)), size
        rest = take(joined, slice(full, None)) if full < count else None
    if rest is not None:
        yield _filled(rest, size_for)


def _filled(batch: Batch, size_for: Callable[[int], int]) -> tuple[Batch, int]:
    leaf = arrays(batch)[0]
    number = leaf.shape[0]
    return take(batch, np.minimum(np.arange(size_for(leaf.shape[1])), number - 1)), number


def _same_shapes(one: Batch, other: Batch) -> bool:
    return [leaf.shape[1:] for leaf in arrays(one)] == [leaf.shape[1:] for leaf in arrays(other)]


def chunk_size(backend: Backend, model: Any, values: Sequence[Any], examples: int) -> int:
    """How many groups a chunk holds: what is fast, as long as their gradients take little memory."""
    row = 4 * sum(int(np.prod(value.shape)) for value in values)
    return max(1, min(backend.chunk_groups(examples, model), _CHUNK_BYTES // max(row, 1)))
