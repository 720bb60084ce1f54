"""The way of gradients in one shot: stages of updates, with corrections as the preset has them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras
from keras_woodfisher_backends.nest import map_arrays

from keras_woodfisher.gradients.loss import MeanLoss
from keras_woodfisher.gradients.sampling import NoUsableSamplesError
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.model.examples import Examples, open_examples, read_batches
from keras_woodfisher.oneshot.presets import Settings
from keras_woodfisher.options.pruning_options import AUTO, CALIBRATED
from keras_woodfisher.pruning.calibration import HeldOutLoss
from keras_woodfisher.pruning.corrections import CalibratedCorrector, Corrector
from keras_woodfisher.pruning.guard import guard_of
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.stages import StagedUpdates
from keras_woodfisher.reports.stage_report import StageReport

_MOST_HELD_OUT = 5000
"""Examples that are used at most where other data is given to calibrate on."""


class StagedWork:
    """Reaches sparsities in stages; what can't work fails when it is made.

    Args:
        pruner: Of the model.
        model: A built model.
        examples: Where gradients are sampled; None for magnitude pruning.
        loss: As in `prune`.
        finals: The sparsity of each variable.
        settings: What the preset chose.
        given: The options that weren't left to it.

    Attributes:
        settings: What was done in the end.

    Raises:
        ValueError: If the model, the loss and the examples don't fit together.
        MemoryError: If the gradients don't fit.
    """

    def __init__(
        self,
        pruner: Pruner,
        model: keras.Model,
        examples: Examples | None,
        loss: Any,
        finals: list[float],
        settings: Settings,
        given: Mapping[str, Any],
    ):
        options = pruner.options
        self.settings = settings
        self._may_take_gradients = settings.fisher == "ggn" and given.get("fisher") is None
        self._source: SampledGradients | None = None
        self._finals = finals
        self._rows = options.gradients_at
        if not options.second_order or examples is None:
            self._updates = StagedUpdates(pruner, None, 1, verbose=options.verbose)
            return
        source = self._source = SampledGradients(model, pruner.targets, options, pruner.backend, examples, loss)
        corrector = _corrector(pruner, source, settings)
        rows = options.most_gradients_between(pruner.sparsity, max(finals))
        pruner.guard = guard_of(source, options, pruner.backend, rows, settings.update)
        pruner.open_source(source, rows, [(rows, pruner.kept)] if pruner.prunes(finals) else [])
        self._updates = StagedUpdates(pruner, source, options.num_recomputations, corrector, options.verbose)

    def run(self) -> tuple[list[StageReport], None]:
        """Prunes, and tells what each stage did."""
        try:
            return self._updates.update(self._finals, self._rows), None
        except NoUsableSamplesError as error:
            if self._source is None or not self._may_take_gradients:
                raise
            note = f"fisher='empirical' instead of 'ggn': in the first stage {error.problem}."
        self._source.take_gradients()
        self.settings = replace(self.settings, fisher="empirical")
        done = self._updates.update(self._finals, self._rows)
        return [replace(done[0], note=f"{note} {done[0].note}".strip()), *done[1:]], None


def _corrector(pruner: Pruner, source: SampledGradients, settings: Settings) -> Corrector | None:
    """The corrector that is calibrated, with its examples; None where corrections are made block by block."""
    if settings.update != CALIBRATED:
        return None
    if isinstance(settings.calibration, int):
        held_out = source.hold_out(settings.calibration)
    else:
        examples = open_examples(settings.calibration)
        held_out = read_batches(examples, _MOST_HELD_OUT, _MOST_HELD_OUT, pruner.options.seed)
        try:
            source.loss.probe(map_arrays(lambda array: array[None], held_out[0]), pruner.backend.outlined)
        except ValueError as error:
            raise ValueError(f"The examples in calibration don't fit the model. {error}") from error
    damp = None if settings.damp == AUTO else float(settings.damp)
    loss = HeldOutLoss(MeanLoss(source.loss, pruner.backend.compiled), pruner.targets, held_out)
    return CalibratedCorrector(source, loss, settings.newton_steps, damp)
