"""Pruning by reconstruction: reads examples, chooses how many weights each layer loses, and finds the new weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras_woodfisher_backends.nest import arrays, take

from keras_woodfisher.data.examples import Examples, read_batches
from keras_woodfisher.oneshot.reconstruction.allocation import Allocation, candidates
from keras_woodfisher.oneshot.reconstruction.held_out import HeldOutOutputs
from keras_woodfisher.oneshot.reconstruction.layerwise import Layerwise, joined
from keras_woodfisher.options.checks import count
from keras_woodfisher.options.mask_types import UNSTRUCTURED, mask_text
from keras_woodfisher.options.pruning_options import RECONSTRUCT, PruningOptions
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.workspace import budget_of
from keras_woodfisher.reports.layer_report import ReconstructionReport
from keras_woodfisher.reports.meter import Meter
from keras_woodfisher.reports.pruning_report import StageReport

HELD_OUT = 10
"""One example in so many is held out, to measure what nothing was fitted to."""

_SCOUTS = 8
"""Allocations are compared with one in so many of the examples."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much work reconstruction is.

    Attributes:
        num_examples: Examples to fit to, fewer where there are fewer.
        compare: Whether allocations are compared.
    """

    num_examples: int
    compare: bool = False

    def report(self, quality: str, options: PruningOptions) -> dict[str, Any]:
        """What a report says of it."""
        found = {"quality": quality, "method": options.method, "num_examples": self.num_examples}
        if options.mask_type != UNSTRUCTURED:
            found["mask_type"] = mask_text(options.mask_type)
        return {**found, "seed": options.seed}


_EFFORTS = {
    "fast": Effort(num_examples=256),
    "balanced": Effort(num_examples=1024),
    "best": Effort(num_examples=4096, compare=True),
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
        ValueError: If there are too few examples.
        MemoryError: If the work doesn't fit into memory.
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
        options = pruner.options
        wanted = effort.num_examples + -(-effort.num_examples // HELD_OUT)
        fitted, held = _divided([batch[0] for batch in read_batches(examples, wanted, wanted, options.seed)])
        self._examples, self._held = _number(fitted), _number(held)
        budget = budget_of(options)
        self._layerwise = Layerwise(model, pruner.targets, fitted, options.seed, budget.limit, budget.reason)
        self._outputs = HeldOutOutputs(model, pruner.targets, held, 2 * self._layerwise.plan.chunk)

    def run(self) -> tuple[list[StageReport], ReconstructionReport | None]:
        """Prunes, and tells what became of each layer."""
        if not self._pruner.prunes(self._finals):
            return [], None
        self._meter.note(f"reconstruction of {self._layerwise.total} matrices, {self._layerwise.plan}")
        found = candidates(self._pruner, self._finals)
        tried = self._compared(found) if len(found) > 1 and self._effort.compare else {}
        chosen = min(tried, key=lambda name: tried[name]) if tried else next(iter(found))
        with self._meter.phase("reconstruction", self._layerwise.total, "layer") as advance:
            done = self._layerwise.run(found[chosen], advance=advance)
            error = self._outputs.distance(done.kernels)
        self._pruner.write(done.kernels)
        report = ReconstructionReport(done.layers, self._examples, self._held, error, chosen, tuple(tried.items()))
        return [StageReport(self._pruner.sparsity)], report

    def _compared(self, found: Mapping[str, Allocation]) -> dict[str, float]:
        """The held-out distance of each allocation, with a part of the examples."""
        tried = {}
        with self._meter.phase("allocation", len(found) * self._layerwise.total, "layer") as advance:
            for name, allocation in found.items():
                scout = self._layerwise.run(allocation, 1.0 / _SCOUTS, advance, hurried=True)
                tried[name] = self._outputs.distance(scout.kernels)
        return tried


def _number(batches: Sequence[Any]) -> int:
    return sum(len(arrays(batch)[0]) for batch in batches)


def _divided(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Inputs to fit to, and inputs that are held out; the same ones where there are too few to divide."""
    total = _number(batches)
    held = total // (HELD_OUT + 1) if total > HELD_OUT else 0
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
