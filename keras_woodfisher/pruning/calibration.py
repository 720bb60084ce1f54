"""Chooses among corrections by the loss on held-out examples."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.gradients.loss import MeanLoss
from keras_woodfisher.model.batches import Batch, cut
from keras_woodfisher.model.targets import Target, tensors_of

COMPENSATIONS = (1e-3, 1e-2, 1e-1)
"""Dampings of the compensation, as parts of the Fisher's mean diagonal."""

STEPS = tuple(10.0 ** (exponent / 2) for exponent in range(10, 1, -1))
"""Dampings of the Newton step, as multiples of the Fisher's mean diagonal, the shortest step first."""


class HeldOutLoss:
    """The mean loss on held-out examples, as a function of all chosen weights.

    Args:
        loss: The mean loss of the model.
        targets: The variables it is a function of.
        batches: Held-out examples, leaves (n, ...).
    """

    def __init__(self, loss: MeanLoss, targets: Sequence[Target], batches: Sequence[Batch]):
        self._loss = loss
        self._targets = list(targets)
        self._batches = batches

    def check(self, weights: np.ndarray, size: int) -> None:
        """Finds out whether corrections can be chosen by it.

        Raises:
            ValueError: If the loss isn't finite with weights that are.
        """
        if not math.isfinite(self(weights, size)):
            raise ValueError(
                "The loss on the examples that are held out to calibrate by isn't finite, so nothing can be chosen by "
                "it. Look for NaN in data (or in calibration), or use update='joint', which needs no such examples."
            )

    def __call__(self, weights: np.ndarray, size: int) -> float:
        """The loss with other weights; infinite where it isn't a number.

        Args:
            weights: (N,) in weight order.
            size: Examples to look at at a time, which bounds the memory of the outputs of layers.
        """
        parts = (part for batch in self._batches for part in cut(batch, size))
        # Processes that prune together may hold out other examples each, and have to choose the same.
        value = current_ranks().mean(self._loss(tensors_of(self._targets, weights), parts))
        return value if math.isfinite(value) else math.inf


def best_of(changes: np.ndarray, loss: Callable[[np.ndarray], float], lowest: float) -> tuple[int | None, float]:
    """The place of the change, one of (k, d), with the lowest loss (None if it isn't below `lowest`), and the loss.

    `loss` gives the held-out loss after a change (d,); `lowest` is the loss without one.
    """
    best = None
    for place, change in enumerate(changes):
        if (value := loss(change)) < lowest:
            best, lowest = place, value
    return best, lowest


def longest_that_helps(
    steps: np.ndarray, loss: Callable[[np.ndarray], float], lowest: float, start: int | None = None
) -> tuple[int | None, float]:
    """A step with a low loss, of steps that become longer; as few losses as the search allows are computed.

    Without a place to start at, every second step is tried while it helps, then the neighbours of the last that did.
    Where the shortest one doesn't help there is none: longer ones that do are rare, and no better on other examples.
    With one (`start`), neighbours are tried from there on as long as they are better. Steps (k, d) begin with the
    shortest; `lowest` is the loss without one. Returns what `best_of` does.
    """
    if start is not None:
        return _best_near(start, steps, loss, lowest)
    best = None
    for place in range(0, len(steps), 2):
        if not (value := loss(steps[place])) < lowest:
            break
        best, lowest = place, value
    for place in () if best is None else (best - 1, best + 1):
        if 0 <= place < len(steps) and (value := loss(steps[place])) < lowest:
            best, lowest = place, value
    return best, lowest


def _best_near(
    start: int, steps: np.ndarray, loss: Callable[[np.ndarray], float], lowest: float
) -> tuple[int | None, float]:
    """Downhill from one step: to longer ones while they are better, else to shorter ones (until one helps at all)."""
    best = None
    for place in range(start, len(steps)):
        if not (value := loss(steps[place])) < lowest:
            break
        best, lowest = place, value
    if best is None or best == start:
        for place in range(start - 1, -1, -1):
            if (value := loss(steps[place])) < lowest:
                best, lowest = place, value
            elif best is not None:
                break
    return best, lowest
