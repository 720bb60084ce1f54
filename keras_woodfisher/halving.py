"""Gradient samples where a device's memory may be full: fewer at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras_woodfisher_backends.nest import arrays, take
from keras_woodfisher_backends.protocol import Backend, Sampler, SlowLayers


class HalvingSampler:
    """A sampler that takes a chunk in parts where it doesn't fit as a whole.

    A part that doesn't fit is halved and taken again; later chunks are taken in parts of that size from the beginning.

    Args:
        sampler: The backend's own.
        backend: Tells whether an error means that memory is full.

    Attributes:
        sampler: See above.
    """

    def __init__(self, sampler: Sampler, backend: Backend):
        self.sampler = sampler
        self._backend = backend
        self._most: int | None = None

    @property
    def slow_layers(self) -> SlowLayers | None:
        return self.sampler.slow_layers

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        number = arrays(batch)[0].shape[0]
        parts: list[list[np.ndarray]] = []
        start = 0
        while start < number:
            size = number if self._most is None else min(self._most, number)
            # Frameworks compile once a shape: the last part repeats its last group.
            part = batch if size == number else take(batch, np.minimum(np.arange(start, start + size), number - 1))
            rows = self._sample(values, others, part, size)
            if rows is not None:
                parts.append([row[: number - start] for row in rows])
                start += size
        return parts[0] if len(parts) == 1 else [np.concatenate(rows) for rows in zip(*parts, strict=True)]

    def _sample(self, values: Sequence[Any], others: Sequence[Any], part: Any, size: int) -> list[np.ndarray] | None:
        """None where there is no memory for so many; then `_most` is half of it."""
        try:
            return self.sampler(values, others, part)
        except Exception as error:
            if not self._backend.is_out_of_memory(error):
                raise
            if size == 1:
                raise MemoryError(
                    f"There is no memory for one gradient sample of {arrays(part)[0].shape[1]} examples: {error}. "
                    "Lower grad_batch_size, or choose fewer weights (params, exclude)."
                ) from error
        self._most = size // 2
        return None


_: type[Sampler] = HalvingSampler
