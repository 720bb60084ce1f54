"""Examples that are looked at again and again: read once, kept, and given batch by batch."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from keras_woodfisher_backends.nest import arrays, map_arrays, take
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.data.batch import Batch, length
from keras_woodfisher.data.examples import Examples
from keras_woodfisher.options.checks import count


def read_batches(examples: Examples, num_examples: int | None, batch_size: int, seed: Any) -> list[Batch]:
    """Some of the examples, the same at each look even if reading shuffles or augments them.

    Args:
        examples: Where to read; labels may be missing.
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


_CHUNK_BYTES = 256 * 2**20


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


def chunk_size(backend: Backend, values: Sequence[Any], examples: int) -> int:
    """How many groups a chunk holds: what is fast, as long as their gradients take little memory."""
    row = 4 * sum(int(np.prod(value.shape)) for value in values)
    return max(1, min(backend.chunk_groups(examples), _CHUNK_BYTES // max(row, 1)))
