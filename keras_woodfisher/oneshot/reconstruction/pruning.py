"""Pruning by reconstruction: reads examples, chooses how many weights each layer loses, and finds the new weights."""

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.nest import arrays, take

from keras_woodfisher.model.examples import ArrayExamples, Examples, read_batches
from keras_woodfisher.model.tokens import checked
from keras_woodfisher.oneshot.reconstruction.allocation import Allocation, candidates
from keras_woodfisher.oneshot.reconstruction.footprint import HELD_OUT, size_of
from keras_woodfisher.oneshot.reconstruction.held_out import Closeness, HeldOutOutputs
from keras_woodfisher.oneshot.reconstruction.layerwise import Layerwise, joined
from keras_woodfisher.oneshot.reconstruction.problem import Choice
from keras_woodfisher.oneshot.reconstruction.refinement import RATES, Refinement
from keras_woodfisher.oneshot.reconstruction.removal import Removal
from keras_woodfisher.options.checks import count
from keras_woodfisher.options.mask_types import UNSTRUCTURED, mask_text
from keras_woodfisher.options.pruning_options import RECONSTRUCT, PruningOptions
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.workspace import budget_of
from keras_woodfisher.reports.layer_report import ReconstructionReport, RefinementReport
from keras_woodfisher.reports.meter import Meter
from keras_woodfisher.reports.stage_report import StageReport

_SOLVED = 4096
"""Layers are fitted to so many examples at most: more make them no better. Steps use all."""

_INPUTS = 8
"""Inputs may take one part in so many of the memory that may be used."""

_TRIAL = 16
"""Rates are tried with one in so many of the steps."""

_SCOUTS = 8
"""Allocations are compared with one in so many of the examples."""

_POOR = 0.3
"""Where the outputs are so far from the dense ones, another allocation may be much better."""

_NEAR = 1.05
"""Of rates whose trials end so near to each other, the largest one is the best for all steps."""

_FAR, _DENSER = 0.2, 2.0
"""Where the outputs are so far from the dense ones, steps begin with so many times the weights that are left."""

Reconstructed = tuple[Sequence[np.ndarray], ReconstructionReport]
"""Kernels, one a variable in its shape, and what was found."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much work reconstruction is.

    Attributes:
        num_examples: Examples to fit to, fewer where there are fewer.
        compare: The held-out distance from which on other ways to divide the zeros are tried, too.
        steps: Steps of 64 examples on the kept weights of all layers together, after the layers are solved.
    """

    num_examples: int
    compare: float = math.inf
    steps: int = 0

    def report(self, quality: str, options: PruningOptions) -> dict[str, Any]:
        """What a report says of it."""
        found = {"quality": quality, "method": options.method, "num_examples": self.num_examples, "steps": self.steps}
        if options.mask_type != UNSTRUCTURED:
            found["mask_type"] = mask_text(options.mask_type)
        return {**found, "seed": options.seed}


_EFFORTS = {
    "fast": Effort(num_examples=256),
    "balanced": Effort(num_examples=1024, compare=_POOR),
    "best": Effort(num_examples=8192, compare=0.0, steps=1024),
}


def effort_of(quality: str, num_examples: int | None, method: str) -> Effort | None:
    """The effort of a preset, with the number of examples that was given; None for another method.

    Raises:
        ValueError, TypeError: If that number is wrong, or given for another method.
    """
    if method != RECONSTRUCT:
        if num_examples is not None:
            raise ValueError(
                f"num_examples={num_examples!r} is for method='reconstruct', got method={method!r}. WoodFisher takes "
                "num_grads samples of grad_batch_size examples each."
            )
        return None
    effort = _EFFORTS[quality]
    return effort if num_examples is None else replace(effort, num_examples=count("num_examples", num_examples))


class Examined:
    """Examples that layers are fitted to, and others that outputs are compared on.

    Args:
        model: The dense model.
        pruner: Its pruner.
        examples: Where to read; labels are ignored.
        number: How many to fit to, at most.

    Attributes:
        layerwise: Finds sparse kernels.

    Raises:
        ValueError: If there is no example.
        MemoryError: If the work doesn't fit into memory.
    """

    def __init__(self, model: keras.Model, pruner: Pruner, examples: Examples, number: int):
        if isinstance(examples, ArrayExamples):
            pruner.ranks.check_same(data=examples.digest())
        options = pruner.options
        budget = budget_of(options)
        # Inputs may be large, too.
        size = size_of(read_batches(examples, 1, 1, options.seed)[0][0])
        number = min(number, max(1, budget.limit // max(1, _INPUTS * size)))
        wanted = number + -(-number // HELD_OUT)
        read = read_batches(examples, wanted, wanted, options.seed)
        fitted, held = _divided(list(checked(model, (batch[0] for batch in read))))
        self._fitted, self._held = _number(fitted), _number(held)
        self._same = self._fitted + self._held > _number([batch[0] for batch in read])
        self._inputs, self._model, self._pruner = fitted, model, pruner
        self._share = min(1.0, _SOLVED / self._fitted)
        used = [take(batch, slice(0, max(1, round(self._share * len(arrays(batch)[0]))))) for batch in fitted]
        self.layerwise = Layerwise(model, pruner, used)
        self._outputs = HeldOutOutputs(model, pruner.targets, held, 2 * self.layerwise.plan.chunk)

    def reconstruct(self, choice: Choice, name: str, meter: Meter) -> Reconstructed:
        """New kernels, and what was found.

        Args:
            choice: Which weights may stay.
            name: How the zeros are divided.
            meter: Shows progress.
        """
        total = self.layerwise.total
        meter.note(f"reconstruction of {total} matrices by {self.layerwise.examples:,} examples, {self.layerwise.plan}")
        with meter.phase("reconstruction", total, "layer") as advance:
            done = self.layerwise.run(choice, advance=advance)
            error = self._outputs.distance(done.kernels)
        report = ReconstructionReport(done.layers, self.layerwise.examples, self._held, error, name, same=self._same)
        return done.kernels, report

    def refine(
        self,
        kernels: Sequence[np.ndarray],
        before: Reconstructed,
        steps: int,
        removal: Removal | None,
        meter: Meter,
    ) -> Reconstructed:
        """Kernels after steps towards the dense outputs, if that brings the held-out ones nearer than before.

        Args:
            kernels: Where the steps begin; the removal goes on from there.
            before: What else there is.
            steps: How many steps.
            removal: Which weights go on the way, if any.
            meter: Shows progress.
        """
        if not self._outputs.complete:
            # Steps towards outputs that aren't there, or that are one for all examples, can't be taken.
            return before[0], replace(before[1], refined=RefinementReport(0, 0.0, 0, before[1].error))
        pruner, trial = self._pruner, max(1, steps // _TRIAL)
        work = Refinement(self._model, pruner.targets, self._inputs, pruner.backend, pruner.options.seed)
        with meter.phase("refinement", steps + len(RATES) * trial, "step") as advance:
            tried = {rate: self._outputs.distance(work.run(kernels, trial, rate, advance=advance)) for rate in RATES}
            # Few steps need a smaller rate than many.
            near = [rate for rate, error in tried.items() if error <= _NEAR * min(tried.values())]
            rate = max(near)
            refined, error = before[0], math.inf
            # Where steps lead nowhere, nothing is lost.
            with suppress(FloatingPointError):
                refined = work.run(kernels, steps, rate, removal, advance)
                error = self._outputs.distance(refined)
        report, examples = before[1], work.batch * (steps + len(RATES) * trial)
        if not error < report.error:
            return before[0], replace(report, refined=RefinementReport(0, rate, examples, report.error))
        return refined, replace(report, error=error, refined=RefinementReport(steps, rate, examples, report.error))

    def closeness(self, done: Reconstructed) -> Closeness:
        """How near the held-out outputs are to the dense ones."""
        return self._outputs.closeness(done[0])

    def compared(self, found: Mapping[str, Allocation], meter: Meter) -> dict[str, Closeness]:
        """How near the held-out outputs are with each allocation, with a part of the examples."""
        tried = {}
        with meter.phase("allocation", len(found) * self.layerwise.total, "layer") as advance:
            for name, allocation in found.items():
                scout = self.layerwise.run(allocation, 1.0 / _SCOUTS, advance, hurried=True)
                tried[name] = self._outputs.closeness(scout.kernels)
        return tried


class ReconstructionWork:
    """Reaches sparsities by reconstruction.

    Args:
        model: A built model.
        pruner: Of the model.
        examples: What to fit to; labels are ignored.
        finals: The sparsity of each variable.
        effort: How much work to spend.
        meter: Shows progress.

    Raises:
        ValueError, MemoryError: See `Examined`.
    """

    def __init__(
        self,
        model: keras.Model,
        pruner: Pruner,
        examples: Examples,
        finals: Sequence[float],
        effort: Effort,
        meter: Meter,
    ):
        self._pruner, self._finals, self._effort, self._meter = pruner, finals, effort, meter
        self._examined = Examined(model, pruner, examples, effort.num_examples)

    def run(self) -> tuple[list[StageReport], ReconstructionReport | None]:
        """Prunes, and tells what became of each layer."""
        if not self._pruner.prunes(self._finals):
            return [], None
        done = self._reconstructed(candidates(self._pruner, self._finals))
        if self._effort.steps:
            done = self._refined(done)
        kernels, report = done
        _warn_of_few(report)
        self._pruner.write(self._pruner.ranks.from_first(kernels))
        return [StageReport(self._pruner.sparsity)], report

    def _reconstructed(self, found: Mapping[str, Allocation]) -> Reconstructed:
        """The best of some allocations, of which the first one is the most likely."""
        chosen, enough = next(iter(found)), (False, self._effort.compare)
        first = self._examined.reconstruct(found[chosen], chosen, self._meter)
        if len(found) == 1 or self._examined.closeness(first) < enough:
            return first
        tried = self._examined.compared(found, self._meter)
        better = min(tried, key=lambda name: tried[name])
        second = first
        if better != chosen:
            second = self._examined.reconstruct(found[better], better, self._meter)
        kernels, report = min(first, second, key=self._examined.closeness)
        return kernels, replace(report, compared=tuple((name, near.distance) for name, near in tried.items()))

    def _refined(self, done: Reconstructed) -> Reconstructed:
        """Steps from there, or from about twice as many weights, the rest of which goes on the way."""
        if done[1].error < _FAR:
            return self._examined.refine(done[0], done, self._effort.steps, None, self._meter)
        first = [
            max(now, 1.0 - _DENSER * (1.0 - final))
            for now, final in zip(self._pruner.reached, self._finals, strict=True)
        ]
        kernels: Sequence[np.ndarray] = self._examined.layerwise.dense
        if self._pruner.prunes(first):
            name = done[1].allocation
            kernels, _ = self._examined.reconstruct(candidates(self._pruner, first)[name], name, self._meter)
        removal = Removal(self._pruner, first, self._finals)
        return self._examined.refine(kernels, done, self._effort.steps, removal, self._meter)


def _warn_of_few(report: ReconstructionReport) -> None:
    """Warns where so few examples say nearly nothing of a layer."""
    few = [layer for layer in report.layers if not layer.note and layer.rows < layer.inputs]
    if report.same and few:
        warnings.warn(
            f"Reconstruction was fitted to {report.examples} example(s): {few[0].name} has {few[0].inputs:,} inputs, "
            f"but {few[0].rows:,} row(s) to fit them to, and other examples may come out worse than by "
            "method='magnitude'. Give more examples, some hundreds; they need no labels.",
            stacklevel=2,
        )


def _number(batches: Sequence[Any]) -> int:
    return sum(len(arrays(batch)[0]) for batch in batches)


def _divided(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Inputs to fit to, and inputs that are held out; the same ones where there are too few to divide."""
    total = _number(batches)
    held = -(-total // (HELD_OUT + 1)) if total > HELD_OUT else 0
    if not held:
        return joined(batches), joined(batches)
    first, last, seen = [], [], 0
    for batch in batches:
        size = len(arrays(batch)[0])
        edge = min(size, max(0, total - held - seen))
        seen += size
        first += [take(batch, slice(0, edge))] if edge else []
        last += [take(batch, slice(edge, None))] if edge < size else []
    return joined(first), joined(last)
