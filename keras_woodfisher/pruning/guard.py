"""Compares an update by the Fisher with plain magnitude pruning on held-out examples.

Where a net is sure of nearly all its training examples, the Fisher says little of what removing many weights does, and
a correction by it can do harm. Magnitude pruning is the limit of a ridge that grows: scores become `w^2 damp / 2`, and
corrections vanish. So this is the choice between two ridges, for the price of three losses.
"""

from collections.abc import Callable

import numpy as np
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.gradients.loss import MeanLoss
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.options.pruning_options import AUTO, CALIBRATED, PruningOptions
from keras_woodfisher.pruning.calibration import HeldOutLoss

_EXAMPLES, _FEWEST = 128, 16
"""So many examples are held out at most; with fewer than these nothing is compared."""

_SHARE = 10
"""At most one example in so many is held out."""

_MARGIN = 0.2
"""By this part the loss must rise less than by magnitude: held-out examples are training examples, on which
corrections look better than on others."""


class MagnitudeGuard:
    """Tells whether an update by the Fisher is worth it.

    Args:
        loss: On held-out examples, of all weights (N,) and the number of examples to look at at a time.
    """

    def __init__(self, loss: Callable[[np.ndarray, int], float]):
        self._loss = loss

    def prefers_magnitude(self, before: np.ndarray, magnitude: np.ndarray, corrected: np.ndarray, size: int) -> bool:
        """Whether the loss rises as little, or nearly so, by magnitude pruning as by the update; all weights (N,)."""
        dense, plain = self._loss(before, size), self._loss(magnitude, size)
        return self._loss(corrected, size) > plain - _MARGIN * abs(plain - dense)


def guard_of(
    source: SampledGradients, options: PruningOptions, backend: Backend, rows: int, update: str
) -> MagnitudeGuard | None:
    """The guard of a source's updates, whose examples no sample is taken of from now on.

    There is none where the ridge was given, where corrections are calibrated anyway, and where the number of examples
    isn't known or leaves too few beside `rows` samples.
    """
    if options.damp != AUTO or update == CALIBRATED or source.available is None:
        return None
    size = options.grad_batch_size
    held = min(_EXAMPLES, source.available * size // _SHARE, (source.available - rows) * size)
    if held < _FEWEST:
        return None
    return MagnitudeGuard(HeldOutLoss(MeanLoss(source.loss, backend.compiled), source.targets, source.hold_out(held)))
