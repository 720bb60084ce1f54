"""One batch of examples: what `fit` takes, as NumPy arrays with examples along their first axis."""

from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.nest import arrays, map_arrays

Batch = tuple[Any, Any, Any]
"""(x, y, sample_weight), each an array, None, or a nest of arrays."""


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
            "Put several inputs into one list or dictionary x."
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
    if array.dtype.kind in "OSU":
        raise TypeError(
            f"data holds a {type(leaf).__name__} of {array.dtype}, which isn't a dense array of numbers. "
            "Convert it first; text is to be tokenised outside the model."
        )
    return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array
