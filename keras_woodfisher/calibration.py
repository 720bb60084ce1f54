"""Chooses among corrections by the loss on held-out examples."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from keras import ops

from keras_woodfisher.evaluation import mean_loss_at
from keras_woodfisher.examples import Batch
from keras_woodfisher.gradients import ModelLoss
from keras_woodfisher.report import CalibrationReport
from keras_woodfisher.targets import Target

COMPENSATIONS = (1e-3, 1e-2, 1e-1)
"""Dampings of the compensation, as parts of the Fisher's mean diagonal."""

STEPS = tuple(10.0 ** (exponent / 2) for exponent in range(10, 3, -1))
"""Dampings of the Newton step, as multiples of the Fisher's mean diagonal, the shortest step first."""


class HeldOutLoss:
    """The mean loss on held-out examples, as a function of all chosen weights.

    Args:
        loss: The loss of the model.
        targets: The variables it is a function of.
        batches: Held-out examples, leaves (n, ...).
    """

    def __init__(self, loss: ModelLoss, targets: Sequence[Target], batches: Sequence[Batch]):
        self._loss = loss
        self._targets = list(targets)
        self._edges = np.cumsum([target.size for target in targets])[:-1]
        self._batches = batches

    def __call__(self, weights: np.ndarray) -> float:
        """The loss with `weights` (N,) in weight order; infinite where it isn't a number."""
        parts = np.split(weights, self._edges)
        pairs = zip(self._targets, parts, strict=True)
        values = [ops.convert_to_tensor(t.unflatten(part), dtype=t.variable.dtype) for t, part in pairs]
        value = mean_loss_at(self._loss, values, self._batches)
        return value if math.isfinite(value) else math.inf


def calibrate(
    changes: tuple[np.ndarray, np.ndarray],
    loss: Callable[[np.ndarray], float],
    dampings: tuple[Sequence[float], Sequence[float]],
) -> tuple[np.ndarray, CalibrationReport]:
    """The change with the lowest loss of: none, one of the compensations, and that with one of the steps.

    Steps become longer while that helps.

    Args:
        changes: Compensations (k, d) and Newton steps (l, d), one for each damping.
        loss: The held-out loss after a change (d,) of the unpruned weights and the removal.
        dampings: Of the compensation, and of the Newton step from the largest one on.

    Returns:
        The change (d,) float32, and what was chosen.
    """
    compensations, steps = dampings
    compensated, stepped = changes
    best = np.zeros_like(compensated[0])
    lowest = removed = loss(best)
    chosen: list[float | None] = [None, None]
    for damp, change in zip(compensations, compensated, strict=True):
        if (value := loss(change)) < lowest:
            best, lowest, chosen[0] = change, value, damp
    start = best
    for damp, step in zip(steps, stepped, strict=True):
        if not (value := loss(start + step)) < lowest:
            break
        best, lowest, chosen[1] = start + step, value, damp
    return best, CalibrationReport(chosen[0], chosen[1], removed, lowest)
