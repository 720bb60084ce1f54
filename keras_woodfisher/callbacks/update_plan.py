"""Which updates a training run will make, and with how many gradients: known before it begins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.schedule import Schedule
from keras_woodfisher.pruning.masks import count


@dataclass(frozen=True, slots=True)
class PlannedUpdate:
    """One update of a run.

    Attributes:
        position: When it is due, in epochs.
        epoch: Index of the epoch in which it runs.
        step: Index of the batch before which it runs (the number of batches where it runs after the last one);
            None where the number of steps isn't known.
        steps_before: Steps of this run that come before it, or None.
        sparsity: The fraction of zeros that it reaches, over all weights.
        num_grads: Gradient samples that it uses; 0 where it prunes nothing, or by magnitude.
        kept: Unpruned weights when it begins: the columns of its gradients.
    """

    position: float
    epoch: int
    step: int | None
    steps_before: int | None
    sparsity: float
    num_grads: int
    kept: int


class Ramps:
    """The ramp of each variable on the common grid of updates.

    Args:
        schedule: The grid, and the ramp where `finals` and what is found don't say otherwise.
        finals: Final sparsity of each variable.
        sizes: Weights of each variable.
        options: How updates work.
        coverage: The weights of each variable that a sparsity is a fraction of; by default all. Groups are taken to
            give exactly that fraction.
    """

    def __init__(
        self,
        schedule: Schedule,
        finals: Sequence[float],
        sizes: Sequence[int],
        options: PruningOptions,
        coverage: Sequence[int] | None = None,
    ):
        self.schedule = schedule
        self._sizes = list(sizes)
        self._coverage = self._sizes if coverage is None else list(coverage)
        self._options = options
        self._ramps = [replace(schedule, final=final) for final in finals]

    def start_from(self, pruned: Sequence[int], steps: int | None = None, first_epoch: int = 0) -> None:
        """Makes the zeros that are there in each variable the beginning of its ramp (`"__FROM_PARAM__"`).

        Where training goes on at an epoch after the first updates, the zeros are those that the ramp had reached by
        then, which tells where it began, to about one weight.
        """
        sizes, zeros = self._sizes, list(pruned)
        if self._options.global_sparsity:
            sizes, zeros = [sum(sizes)] * len(sizes), [sum(zeros)] * len(sizes)
        done = self.schedule.before(first_epoch, steps)
        starts = [_beginning(*row, done) for row in zip(self._ramps, zeros, sizes, strict=True)]
        self._ramps = [replace(r, init=min(start, r.final)) for r, start in zip(self._ramps, starts, strict=True)]

    @property
    def beginnings(self) -> list[float]:
        """Where the ramp of each variable begins: a sparsity."""
        return [ramp.init for ramp in self._ramps]

    def begin_at(self, beginnings: Sequence[float]) -> None:
        """Has the ramp of each variable begin at a sparsity."""
        self._ramps = [replace(r, init=b) for r, b in zip(self._ramps, beginnings, strict=True)]

    def at(self, position: float) -> list[float]:
        """The sparsity of each variable (the same one for all in global pruning)."""
        return [ramp.sparsity(position) for ramp in self._ramps]

    def zeros_at_the_end(self) -> list[int]:
        """About how many zeros each variable will have; global pruning is taken to spread them evenly."""
        return [count(ramp.final, size) for ramp, size in zip(self._ramps, self._sizes, strict=True)]

    def gradients_after(self, pruned: int) -> int:
        """Samples to use when `pruned` weights are zero."""
        # Rounding to whole weights may have left a little off the sparsity that was asked for.
        groups = 1 if self._options.global_sparsity else len(self._sizes)
        return self._options.gradients_at((pruned + 0.5 * groups) / sum(self._sizes))

    def counts_at(self, position: float, pruned: Sequence[int]) -> list[int]:
        """Zeros after the update that is due at a position: of each variable, or of all in global pruning."""
        wanted = self.at(position)
        if self._options.global_sparsity:
            return [max(count(wanted[0], sum(self._coverage)), sum(pruned))]
        return [max(count(s, n), p) for s, n, p in zip(wanted, self._coverage, pruned, strict=True)]

    def plan(
        self, pruned: Sequence[int], steps: int | None, epochs: int | None, first_epoch: int = 0
    ) -> list[PlannedUpdate]:
        """Every update that a run makes; of those that fall on one step only the last.

        Args:
            pruned: Zeros of each variable when it begins.
            steps: Steps an epoch, if known.
            epochs: Index after the last epoch, if known.
            first_epoch: Index of its first epoch.
        """
        planned: dict[tuple[int, int | None], PlannedUpdate] = {}
        total, before = sum(self._sizes), list(pruned)
        slots = {_slot(p, steps, epochs, first_epoch): p for p in self.schedule.updates(steps, first_epoch)}
        for (epoch, step), position in slots.items():
            zeros = sum(before)
            after = self.counts_at(position, before)
            prunes = sum(after) > zeros
            second_order = prunes and self._options.second_order
            planned[epoch, step] = PlannedUpdate(
                position,
                epoch,
                step,
                None if steps is None or step is None else (epoch - first_epoch) * steps + step,
                sum(after) / total,
                self.gradients_after(zeros) if second_order else 0,
                total - zeros,
            )
            before = after
        return list(planned.values())


def check_buffer(updates: Sequence[PlannedUpdate], steps: int | None, epochs: int | None, first_epoch: int) -> None:
    """Finds out beforehand whether a run's own gradients are enough at each update, where its length is known.

    `updates` are from `Ramps.plan` with the same arguments.

    Raises:
        ValueError: If they aren't.
    """
    if steps is None or epochs is None:
        return
    for update in updates:
        # The updates of a run that goes on wait for the buffer.
        before = (epochs - first_epoch) * steps if first_epoch > 0 else update.steps_before or 0
        wanted = update.num_grads
        if before < wanted:
            raise ValueError(
                f"num_grads={wanted} gradients can't have been buffered by the update at epoch "
                f"{update.position:g}: only {before} steps come before it. "
                + (f"num_grads={before} would fit; or set " if before > 0 else "Set ")
                + f"start_epoch to {first_epoch + wanted / steps:.3g} or later, or give data=."
            )


def _beginning(ramp: Schedule, zeros: int, size: int, done: float | None) -> float:
    """The sparsity at which a ramp began that has led to so many zeros by the update at `done` (None: before any)."""
    found = zeros / size
    if done is None:
        return found
    passed = replace(ramp, init=0.0, final=1.0).sparsity(done)
    from_none = passed * ramp.final * size
    # Counts are rounded; with fewer zeros no such ramp can have come by.
    if passed >= 1.0 or zeros < from_none - 1.0:
        return found
    start = round((zeros - from_none) / (1.0 - passed))
    return min(max(start, 0), zeros) / size


def _slot(position: float, steps: int | None, epochs: int | None, first_epoch: int) -> tuple[int, int | None]:
    """Where an update runs: the epoch and the batch before which it comes."""
    position = max(position, float(first_epoch))
    epoch = math.floor(position + 1e-9)
    if steps is None:
        return (epoch if epochs is None else min(epoch, epochs - 1)), None
    step = math.ceil((position - epoch) * steps - 1e-6)
    if step >= steps:
        epoch, step = epoch + 1, 0
    if epochs is not None and epoch >= epochs:
        # After the final batch of training.
        return epochs - 1, steps
    return epoch, step
