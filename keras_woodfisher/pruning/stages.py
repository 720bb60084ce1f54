"""Several stages within one update, each with new gradients at the weights that the last one left."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from keras_woodfisher.gradients.sampling import NoUsableSamplesError
from keras_woodfisher.gradients.sources import GradientSource
from keras_woodfisher.pruning.corrections import Corrector
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.reports.meter import announce
from keras_woodfisher.reports.stage_report import StageReport


def stage_sparsities(now: float, final: float, stages: int) -> list[float]:
    """The sparsity after each stage, from one that is there now to the final one; what is kept falls geometrically.

    >>> [round(sparsity, 4) for sparsity in stage_sparsities(0.0, 0.936, 3)]
    [0.6, 0.84, 0.936]
    >>> stage_sparsities(0.5, 0.5, 2)
    [0.5, 0.5]
    """
    if final <= now:
        return [final] * stages
    ratio = (1.0 - final) / (1.0 - now)
    # The last one exactly: it decides how many weights are zero.
    return [1.0 - (1.0 - now) * ratio ** (stage / stages) for stage in range(1, stages)] + [final]


class StagedUpdates:
    """Updates in several stages each; if one fails or is interrupted, all is as before its first stage.

    Args:
        pruner: Does each stage.
        source: Where gradients come from; None for magnitude pruning.
        stages: How many stages an update has.
        corrector: How the weights that stay are corrected; by default block by block.
        verbose: Whether stages are announced.
    """

    def __init__(
        self,
        pruner: Pruner,
        source: GradientSource | None,
        stages: int,
        corrector: Corrector | None = None,
        verbose: int = 0,
    ):
        self._pruner = pruner
        self._source = source
        self._stages = stages
        self._corrector = corrector
        self._verbose = verbose

    def update(self, sparsity: Sequence[float], rows: Callable[[float], int], draw: int = 0) -> list[StageReport]:
        """Prunes to a sparsity; in one stage where a later one finds no gradient but zeros, as of saturated nets.

        Args:
            sparsity: As in `Pruner.update`.
            rows: How many samples a stage uses, as a function of the sparsity before it.
            draw: Number of the update.

        Returns:
            One report a stage that pruned anything.

        Raises:
            NoUsableSamplesError: If there are no gradients in the first stage.
        """
        try:
            return self._update(sparsity, rows, draw, self._stages)
        except _LaterStage as later:
            note = f"{later}. Pruned in one stage instead."
        warnings.warn(note, stacklevel=2)
        return [replace(done, note=note) for done in self._update(sparsity, rows, draw, 1)]

    def _update(
        self, sparsity: Sequence[float], rows: Callable[[float], int], draw: int, stages: int
    ) -> list[StageReport]:
        pruner = self._pruner
        ramps = [stage_sparsities(now, final, stages) for now, final in zip(pruner.reached, sparsity, strict=True)]
        done: list[StageReport] = []
        with pruner.all_or_nothing():
            for stage, level in enumerate(zip(*ramps, strict=True)):
                if not pruner.prunes(level):
                    continue
                if self._verbose and stages > 1:
                    announce(f"stage {stage + 1} of {stages}")
                number = draw * self._stages + stage
                try:
                    done.append(pruner.update(level, self._source, rows(pruner.sparsity), number, self._corrector))
                except NoUsableSamplesError as error:
                    if not done:
                        raise
                    raise _LaterStage(
                        f"Stage {stage + 1} of {stages}, from sparsity {pruner.sparsity:.4f} on, found no gradient but "
                        "such as are zero or not finite (the model's outputs may be saturated)"
                    ) from error
        return done


class _LaterStage(Exception):
    """There are no gradients in a stage after the first."""
