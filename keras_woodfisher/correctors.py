"""How the weights that stay are corrected once it is known which ones go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from keras_woodfisher_backends.kernel import BlockKernel

from keras_woodfisher.calibration import COMPENSATIONS, STEPS, HeldOutLoss, calibrate
from keras_woodfisher.correction import WholeCorrection
from keras_woodfisher.fisher import BlockFisher
from keras_woodfisher.memory_plan import MemoryPlan
from keras_woodfisher.meter import Meter
from keras_woodfisher.report import CalibrationReport
from keras_woodfisher.sources import SampledGradients
from keras_woodfisher.stores.store import GradientStore


@dataclass(frozen=True)
class Removal:
    """Which weights an update removes, and what it knows of them.

    Attributes:
        grads: The samples (m, d) of the unpruned weights.
        blocks: Their blocks.
        kernels: One kernel a device.
        weights: (N,) all chosen weights, pruned ones too.
        keep: (N,) bool, those that were unpruned before.
        prune: (d,) bool, those of the unpruned ones that are removed now.
        diagonal: (d,) `diag(F^-1)`.
        damp: The ridge of the scores.
        mean_diagonal: Mean of the diagonal of `(1/m) G^T G`.
        draw: Samples that were asked for, and the number of the draw.
        memory: The plan that the update keeps to.
    """

    grads: GradientStore
    blocks: Sequence[slice]
    kernels: Sequence[BlockKernel]
    weights: np.ndarray
    keep: np.ndarray
    prune: np.ndarray
    diagonal: np.ndarray
    damp: float
    mean_diagonal: float
    draw: tuple[int, int]
    memory: MemoryPlan


class Corrector(Protocol):
    """Computes the change (d,) of the unpruned weights, and tells what it chose."""

    def __call__(self, removal: Removal, meter: Meter) -> tuple[np.ndarray, CalibrationReport | None]: ...


class BlockCorrector:
    """Block by block, with the damping of the scores.

    Args:
        joint: The exact update for the set in each block, or the sum of single updates.
    """

    def __init__(self, joint: bool):
        self._joint = joint

    def __call__(self, removal: Removal, meter: Meter) -> tuple[np.ndarray, CalibrationReport | None]:
        work = sum(bool(removal.prune[block].any()) for block in removal.blocks)
        with meter.phase("update", work, "block") as advance:
            fisher = BlockFisher(removal.grads, removal.blocks, removal.damp, removal.kernels, advance)
            weights = removal.weights[removal.keep]
            return fisher.update(weights, removal.prune, removal.diagonal, self._joint), None


class CalibratedCorrector:
    """Over all kept weights at once, with the dampings that are best on held-out examples.

    Args:
        source: Gives the gradient of the mean loss.
        loss: On the held-out examples.
        first_order: Whether Newton steps are tried.
        damp: The damping of the compensation, or None: several are tried.
    """

    def __init__(self, source: SampledGradients, loss: HeldOutLoss, first_order: bool, damp: float | None):
        self._source = source
        self._loss = loss
        self._first_order = first_order
        self._damp = damp

    def __call__(self, removal: Removal, meter: Meter) -> tuple[np.ndarray, CalibrationReport | None]:
        compensations = [part * removal.mean_diagonal for part in COMPENSATIONS] if self._damp is None else [self._damp]
        steps = [part * removal.mean_diagonal for part in STEPS] if self._first_order else []
        gradient = self._gradient(removal, meter) if self._first_order else None
        with meter.phase("update", 1, "decomposition") as advance:
            unpruned = removal.weights[removal.keep]
            correction = WholeCorrection(removal.grads, removal.kernels[0], unpruned, removal.prune, gradient)
            changes = correction.changes(compensations, steps)
            advance()
        base = np.where(removal.prune, 0.0, unpruned)
        with meter.phase("calibration", 1 + len(compensations) + len(steps), "candidate") as advance:

            def loss(change: np.ndarray) -> float:
                weights = removal.weights.copy()
                weights[removal.keep] = base + change
                advance()
                return self._loss(weights)

            return calibrate(changes, loss, (compensations, steps))

    def _gradient(self, removal: Removal, meter: Meter) -> np.ndarray:
        edges = np.cumsum([target.size for target in self._source.targets])[:-1]
        kept = np.split(removal.keep, edges)
        with meter.phase("gradients", removal.draw[0], "sample") as advance:
            gradient = self._source.mean_gradient(kept, *removal.draw, removal.memory.chunk)
            advance(removal.draw[0])
        return gradient
