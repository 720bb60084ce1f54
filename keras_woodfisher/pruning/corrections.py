"""How the weights that stay are corrected once it is known which ones go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.ranks.ranks import Ranks

from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.memory.store import GradientStore
from keras_woodfisher.pruning.calibration import COMPENSATIONS, STEPS, HeldOutLoss, best_of, longest_that_helps
from keras_woodfisher.pruning.fisher import BlockFisher
from keras_woodfisher.pruning.share import Share
from keras_woodfisher.reports.meter import Meter
from keras_woodfisher.reports.stage_report import CalibrationReport


class WholeCorrection:
    """Corrections over all kept weights in one block, for any damping, from one decomposition.

    With `A = G_K G_K^T = U S U^T` over the kept set K and `w_Q` removed:

    - compensation, which minimises the quadratic cost of the removal (Optimal Brain Surgeon for a set):
      `G_K^T (A + m damp I)^-1 G_Q w_Q`;
    - a damped Newton step on the loss itself, with its gradient `g`:
      `-(F_KK + damp I)^-1 g_K = -(1 / damp) (g_K - G_K^T (A + m damp I)^-1 G_K g_K)`.

    Memory beyond `G` is that of `A`, in float64, and of the changes that are asked for, in float32.

    Args:
        grads: The samples (m, d) of the unpruned weights.
        kernel: Does the products.
        weights: (d,) unpruned weights.
        prune: (d,) bool, those that are removed now (Q); at least one stays.
        share: The columns that this process has, if not all.
    """

    def __init__(
        self,
        grads: GradientStore,
        kernel: BlockKernel,
        weights: np.ndarray,
        prune: np.ndarray,
        share: Share | None = None,
    ):
        share = self._share = share or Share((), weights.size, Ranks())
        weights, prune = weights[share.columns], prune[share.columns]
        self._grads = grads.block(slice(0, grads.shape[1]))
        # Nothing else works meanwhile.
        self._kernel = kernel.sharing()
        self._keep = ~prune
        self._removed = np.where(prune, weights, 0.0).astype(np.float64)
        # Of several processes, one may have no column, or none that stays.
        here = self._kernel.gram(self._grads, self._keep) if self._keep.any() else np.zeros((len(grads), len(grads)))
        self._values, self._basis = np.linalg.eigh(share.ranks.sum(here))

    def compensations(self, dampings: Sequence[float]) -> np.ndarray:
        """The compensation for each damping, (k, d) float32, zero on what is removed."""
        return self._share.joined(self._responses(self._removed, dampings), axis=1)

    def steps(self, gradient: np.ndarray, dampings: Sequence[float]) -> np.ndarray:
        """The Newton step for each damping, (k, d) float32, zero on what is removed; `gradient` is of the mean loss."""
        kept = np.where(self._keep, gradient[self._share.columns], 0.0)
        out = self._responses(kept, dampings)
        out -= kept
        out /= np.asarray(dampings)[:, None]
        return self._share.joined(out, axis=1)

    def _responses(self, right: np.ndarray, dampings: Sequence[float]) -> np.ndarray:
        """`G_K^T (A + m damp I)^-1 G right` for each damping."""
        source = self._basis.T @ self._share.ranks.sum(self._kernel.combine(self._grads, right))
        # Rounding may leave eigenvalues that are zero a little below it.
        values = np.maximum(self._values, 0.0)[:, None] + len(source) * np.asarray(dampings)
        duals = self._basis @ (source[:, None] / values)
        out = np.zeros((len(dampings), self._keep.size), np.float32)
        self._kernel.project(self._grads, self._keep, duals, out)
        return out


@dataclass(frozen=True)
class RemovedWeights:
    """Which weights an update removes, and what it knows of them.

    Attributes:
        fisher: The block-wise Fisher of the scores, with the samples of the unpruned weights.
        weights: (N,) all chosen weights, pruned ones too.
        keep: (N,) bool, those that were unpruned before.
        prune: (d,) bool, those of the unpruned ones that are removed now.
        mean_diagonal: Mean of the diagonal of `(1/m) G^T G`.
        draw: Number of the update.
        examples: How many are differentiated at a time.
    """

    fisher: BlockFisher
    weights: np.ndarray
    keep: np.ndarray
    prune: np.ndarray
    mean_diagonal: float
    draw: int
    examples: int


class Corrector(Protocol):
    """Computes the change (d,) of the unpruned weights, and says what it chose."""

    def __call__(self, removal: RemovedWeights, meter: Meter) -> tuple[np.ndarray, CalibrationReport | None]: ...


class BlockCorrector:
    """Block by block, with the damping of the scores.

    Args:
        joint: The exact update for the set in each block, or the sum of single updates.
    """

    def __init__(self, joint: bool):
        self._joint = joint

    def __call__(self, removal: RemovedWeights, meter: Meter) -> tuple[np.ndarray, CalibrationReport | None]:
        diagonal = None if self._joint else removal.fisher.inverse_diagonal()
        with meter.phase("update", removal.fisher.touched(removal.prune), "block") as advance:
            weights = removal.weights[removal.keep]
            return removal.fisher.update(weights, removal.prune, diagonal, self._joint, advance), None


class CalibratedCorrector:
    """Over all kept weights at once, with the dampings that are best on held-out examples.

    Of the compensations the best one is taken, or none; then as many Newton steps as help, each with the gradient where
    the last one ended, and with the curvature from before the removal.

    Args:
        source: Gives gradients of the mean loss.
        loss: On the held-out examples.
        newton_steps: How many steps are tried.
        damp: The damping of the compensation, or None: several are tried.
    """

    def __init__(self, source: SampledGradients, loss: HeldOutLoss, newton_steps: int, damp: float | None):
        self._source = source
        self._loss = loss
        self._newton_steps = newton_steps
        self._damp = damp

    def __call__(self, removal: RemovedWeights, meter: Meter) -> tuple[np.ndarray, CalibrationReport | None]:
        if removal.prune.all():
            # Nothing stays that could be corrected.
            left = self._loss(np.where(removal.keep, 0.0, removal.weights), removal.examples)
            return np.zeros(removal.prune.shape), CalibrationReport(None, (), left, left, 0)
        compensations = [part * removal.mean_diagonal for part in COMPENSATIONS] if self._damp is None else [self._damp]
        dampings = [part * removal.mean_diagonal for part in STEPS]
        unpruned = removal.weights[removal.keep]
        with meter.phase("update", 1, "decomposition") as advance:
            fisher = removal.fisher
            correction = WholeCorrection(fisher.grads, fisher.kernels[0], unpruned, removal.prune, fisher.share)
            changes = correction.compensations(compensations)
            advance()
        base = removal.weights.copy()
        base[removal.keep] = np.where(removal.prune, 0.0, unpruned)
        change = np.zeros(unpruned.shape)

        def loss(candidate: np.ndarray) -> float:
            return self._loss(_added(base, removal.keep, change + candidate), removal.examples)

        with meter.phase("calibration", 1, "choice") as advance:
            removed = loss(change)
            if math.isinf(removed):
                self._loss.check(removal.weights, removal.examples)
            best, lowest = best_of(changes, loss, removed)
            advance()
        if best is not None:
            change = change + changes[best]
        chosen: list[float] = []
        place: int | None = None
        examples = 0
        for number in range(self._newton_steps):
            gradient, differentiated = self._gradient(removal, _added(base, removal.keep, change), number, meter)
            examples += differentiated
            with meter.phase("calibration", 1, "choice") as advance:
                # The samples' squares, and with them the Fisher and its damping, may be those of several examples.
                steps = correction.steps(gradient / self._source.square_scale, dampings)
                place, lowest = longest_that_helps(steps, loss, lowest, start=place)
                advance()
            if place is None:
                break
            change = change + steps[place]
            chosen.append(dampings[place])
        compensation = None if best is None else compensations[best]
        return change, CalibrationReport(compensation, tuple(chosen), removed, lowest, examples)

    def _gradient(
        self, removal: RemovedWeights, weights: np.ndarray, number: int, meter: Meter
    ) -> tuple[np.ndarray, int]:
        kept = np.split(removal.keep, np.cumsum([target.size for target in self._source.targets])[:-1])
        with meter.phase("gradients", 1, "gradient") as advance:
            gradient, examples = self._source.mean_gradient(weights, kept, removal.draw, number, removal.examples)
            advance()
        return gradient, examples


def _added(weights: np.ndarray, keep: np.ndarray, change: np.ndarray) -> np.ndarray:
    """All weights, with a change of the unpruned ones."""
    out = weights.copy()
    out[keep] += change
    return out
