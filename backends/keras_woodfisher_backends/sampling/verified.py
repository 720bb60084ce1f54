"""Fast ways to take gradient samples, used only where they give what one backward pass a group gives."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_woodfisher_backends.nest import arrays, take
from keras_woodfisher_backends.protocol import Sampler, SlowLayers
from keras_woodfisher_backends.sampling.capture import Capture

TOLERANCE = 1e-3
"""Largest relative distance between a fast sample and the direct one."""

_FAINT = 1e-4
"""A variable with less than this part of a sample's norm may be off by TOLERANCE of this part."""

Way = Callable[[Sequence[Any], Sequence[Any], Any], list[np.ndarray]]
"""The samples of a chunk, as a `Sampler` gives them."""


class VerifiedSampler:
    """Compares the two largest samples of the first chunk, then trusts a fast way or never uses it.

    The largest, because the gradient of an example that the model is sure of is little more than rounding. A fast way
    that fails on the first chunk (a layer may do anything to its tensors) isn't used either, unless memory is full: the
    caller may try fewer groups.

    Args:
        capture: Knows the layers.
        fast: Ways to try, the fastest one first.
        direct: One backward pass a group: always right.
        is_out_of_memory: Tells whether an error means that memory is full.

    Attributes:
        trusted: Whether a fast way is used; None before the first chunk, unless a layer is known to prevent it.
        slow_layers: See `Sampler`.
    """

    def __init__(
        self, capture: Capture, fast: Sequence[Way], direct: Way, is_out_of_memory: Callable[[Exception], bool]
    ):
        self._capture = capture
        self._fast = list(fast)
        self._direct = direct
        self._is_out_of_memory = is_out_of_memory
        self._chosen = direct
        self.trusted: bool | None = None
        self.slow_layers: SlowLayers | None = None
        if capture.unknown:
            self.trusted = False
            self.slow_layers = SlowLayers(tuple(capture.unknown), "no faster way is known for layers of this kind")

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        if self.trusted is None:
            return self._choose(values, others, batch)
        return self._chosen(values, others, batch)

    def _choose(self, values: Any, others: Any, batch: Any) -> list[np.ndarray]:
        groups = arrays(batch)[0].shape[0]
        for way in self._fast:
            try:
                rows = way(values, others, batch)
            except Exception as error:  # what is wrong with the model itself, the direct way will say
                if groups > 1 and self._is_out_of_memory(error):
                    raise
                reason = f"the faster way failed with {type(error).__name__}"
                self.slow_layers = SlowLayers(tuple(dict.fromkeys(self._capture.names)), reason)
                continue
            wrong = self._wrong(rows, values, others, batch)
            if not wrong:
                self.trusted, self._chosen, self.slow_layers = True, way, None
                return rows
            names = tuple(dict.fromkeys(self._capture.names[place] for place in wrong))
            self.slow_layers = SlowLayers(names, "in one pass over many examples their gradients come out differently")
        rows = self._direct(values, others, batch)
        self.trusted = False
        return rows

    def _wrong(self, rows: list[np.ndarray], values: Any, others: Any, batch: Any) -> list[int]:
        """Places of the variables whose samples are off."""
        sizes = np.array([[np.linalg.norm(sample) for sample in row] for row in rows])
        total = np.nan_to_num(np.square(sizes).sum(0), nan=0.0, posinf=0.0)
        largest = np.argsort(total, kind="stable")[-2:]
        exact = self._direct(values, others, take(batch, largest))
        # Where a softmax has one entry only, say, the gradient before it is nothing but rounding.
        faint = _FAINT * np.sqrt(sum(np.square([np.linalg.norm(sample) for sample in row]) for row in exact))
        return [
            place
            for place, (row, truth) in enumerate(zip(rows, exact, strict=True))
            for fast, direct, rounding in zip(row[largest], truth, faint, strict=True)
            if not np.linalg.norm(fast - direct) <= TOLERANCE * max(np.linalg.norm(direct), rounding)
        ]


_sampler: Callable[..., Sampler] = VerifiedSampler
