"""Groups of examples, however they arrive, in chunks of one size."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from keras_woodfisher_backends.nest import arrays, map_arrays, take
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.examples import Batch

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
