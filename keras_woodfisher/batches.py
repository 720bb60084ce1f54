"""Examples that are looked at again and again: read once, kept, and given batch by batch."""

import sys
from collections.abc import Iterator
from typing import Any

from keras_woodfisher_backends.nest import arrays, map_arrays, take

from keras_woodfisher.checks import count
from keras_woodfisher.examples import Batch, open_examples


def read_batches(data: Any, num_examples: int | None, batch_size: int, seed: Any) -> list[Batch]:
    """Some of the examples, the same at each look even if reading shuffles or augments them.

    Args:
        data: Whatever `fit` takes; labels may be missing.
        num_examples: The most to read, or None for all: of arrays drawn with the seed, else the first ones.
        batch_size: Examples of one batch at most.
        seed: Of the choice from arrays.

    Returns:
        (x, y, sample_weight) each, leaves (n, ...).

    Raises:
        ValueError: If there is no example.
    """
    most = sys.maxsize if num_examples is None else count("num_examples", num_examples, "None means all.")
    size = count("batch_size", batch_size)
    examples = open_examples(data)
    if examples.available is not None:
        most = min(most, examples.available)
    batches: list[Batch] = []
    for groups in examples.groups(most, 1, seed):
        batches += cut(map_arrays(lambda array: array[:, 0], groups), size)
    if not batches:
        raise ValueError("data holds no example (a callable must return a fresh iterator at each call).")
    return batches


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in parts of `size` examples; the last one may be smaller."""
    for start in range(0, length(batch), size):
        yield take(batch, slice(start, start + size))


def length(batch: Batch) -> int:
    """How many examples a batch holds."""
    return len(arrays(batch)[0])
