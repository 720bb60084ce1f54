"""One training run of a pruning callback: what is pruned, how far by when, with which gradients, and what was done."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from keras_woodfisher.callbacks.callback_list import warn_of_dead
from keras_woodfisher.callbacks.epoch_logs import epoch_report
from keras_woodfisher.callbacks.progress import Progress
from keras_woodfisher.callbacks.pruning_task import Task
from keras_woodfisher.callbacks.update_plan import PlannedUpdate, Ramps, check_buffer
from keras_woodfisher.gradients.buffer import BufferedGradients
from keras_woodfisher.gradients.loss import check_loss
from keras_woodfisher.gradients.sampling import NoUsableSamplesError
from keras_woodfisher.gradients.sources import GradientSource, SampledGradients
from keras_woodfisher.gradients.trained import (
    check_trained,
    of_other_optimizers,
    refuse_untrained,
    trains_as_keras_does,
)
from keras_woodfisher.model.examples import Examples, open_examples
from keras_woodfisher.model.targets import Target, finals_of
from keras_woodfisher.options.mask_types import UNSTRUCTURED
from keras_woodfisher.pruning.agreement import agree
from keras_woodfisher.pruning.collapse import Collapse, emptied_at
from keras_woodfisher.pruning.guard import guard_of
from keras_woodfisher.pruning.masks import zeros_of
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.stages import StagedUpdates
from keras_woodfisher.reports.epoch_report import EpochReport
from keras_woodfisher.reports.left_out import LeftOut
from keras_woodfisher.reports.pruning_report import PruningReport
from keras_woodfisher.reports.stage_report import StageReport, merged
from keras_woodfisher.reports.zeros import count_zeros, left_out_of


class Run:
    """A task carried out on one model; nothing of the model is changed before the first update.

    Args:
        task: What to do, an attribute too.
        model: A built model.

    Attributes:
        pruner: Does the updates.
        source: Where gradients come from; None for magnitude pruning, and before it is opened.
        buffer: The same, where the gradients of training are used.
        done: Position on the grid of the last update that was made.
        released: Whether it lets the zeros go since all updates are done.

    Raises:
        ValueError, KeyError: See `Pruner`.
    """

    def __init__(self, task: Task, model: keras.Model):
        self.task = task
        self._model = model
        self.pruner = Pruner(model, task.options)
        targets = self.pruner.targets
        finals = [task.schedule.final] * len(targets) if task.levels is None else finals_of(targets, task.levels)
        sizes = [target.size for target in targets]
        self._ramps = Ramps(task.schedule, finals, sizes, task.options, self.pruner.coverage)
        self.source: GradientSource | None = None
        self.buffer: BufferedGradients | None = None
        self.done: float | None = None
        self.released = False
        self._first_epoch = 0
        self._stepped = False
        self._stages: list[StageReport] = []
        self._history: list[EpochReport] = []
        self._examples: Examples | None = None
        self._collapse: Collapse | None = None

    @property
    def targets(self) -> list[Target]:
        return self.pruner.targets

    def plan(
        self, steps: int | None, epochs: int | None, first_epoch: int = 0, pruned: Mapping[int, int] | None = None
    ) -> list[PlannedUpdate]:
        """Every update that it will make; see `WoodFisherPruning.plan`."""
        found = zeros_of(self._model, self.targets)
        pairs = zip(self.targets, found, strict=True)
        zeros = [(pruned or {}).get(id(target.variable), int(here.sum())) for target, here in pairs]
        self._begin_ramps(zeros, steps, first_epoch)
        return self._ramps.plan(zeros, steps, epochs, first_epoch)

    def open_source(self, updates: Sequence[PlannedUpdate], loss: Any = None) -> None:
        """Finds out where gradients come from and where they will be kept, and checks both; nothing is changed.

        `updates` are those planned; a Keras `loss` takes the place of the compiled one.

        Raises:
            ValueError, TypeError: If the data doesn't fit the model or the options.
            MemoryError: If the gradients don't fit.
        """
        options, backend = self.task.options, self.pruner.backend
        if not options.second_order:
            return
        uses = [(update.num_grads, update.kept) for update in updates if update.num_grads]
        if self.task.buffers:
            check_trained(self._model, self.targets, self.task.chosen_by_name)
            self.source = self.buffer = BufferedGradients(self._model, self.targets, options.most_gradients, backend)
            uses = uses or [(options.most_gradients, 1)]
        else:
            if loss is None:
                check_loss(
                    self._model,
                    "Compile it with one, or leave out `data`: then the gradients of training are buffered, whatever "
                    "makes its loss (add_loss, a train_step).",
                )
            self._examples = open_examples(self.task.data)
            sampled = SampledGradients(self._model, self.targets, options, backend, self._examples, loss)
            self.source = sampled
            self.pruner.guard = guard_of(sampled, options, backend, options.most_gradients, options.update)
        self.pruner.open_source(self.source, options.most_gradients, uses)

    def prepare(self, progress: Progress) -> None:
        """To be called before training: whatever can't work fails here, and buffering begins where it is needed.

        Raises:
            ValueError, TypeError, MemoryError: See `open_source`.
        """
        if not self.task.options.second_order:
            # Nothing is sampled, but outputs are looked at.
            self._examples = None if self.task.data is None else open_examples(self.task.data)
            return
        self.task.check_buffered()
        agree(self._model, self.pruner)
        self.open_source(self.plan(progress.steps, progress.epochs))
        if self.buffer is not None:
            self.buffer.attach()

    def begin(self, progress: Progress, siblings: Sequence["Run"]) -> None:
        """To be called in the first epoch, when weights are what training begins with.

        `siblings` are the runs of the other callbacks of this `fit` that prune.

        Raises:
            ValueError: If the gradients of training, where they are buffered, aren't enough for an update.
        """
        self._first_epoch = progress.epoch
        self._collapse = Collapse(self.targets)
        self.pruner.find_zeros()
        self._begin_ramps(self.pruner.zeros, progress.steps, progress.epoch)
        end = self.task.schedule.end
        if not self.task.leave_enabled and progress.epoch > end:
            self.done, self.released = end, True
        elif self.buffer is not None:
            self._check_buffer(progress, siblings)

    def held(self) -> list[np.ndarray]:
        """The weights to hold from the first batch on, bool in their variables' shapes."""
        if self.released:
            return [np.zeros(tuple(target.variable.shape), bool) for target in self.targets]
        warn_of_dead(self.targets, self.pruner.pruned)
        return self.pruner.masks()

    @property
    def awaits_a_step(self) -> bool:
        """Whether `check_first_step` has something to find out."""
        return not self._stepped and self.buffer is not None and self.buffer.ring is not None

    def check_first_step(self) -> None:
        """To be called after each step: the first one tells which variables the compiled optimizer trains.

        Raises:
            ValueError: If it doesn't train one of those to prune, and gradients are buffered.
        """
        if self.buffer is None or self.buffer.ring is None or not self.buffer.ring.trained:
            return
        self._stepped = True
        untrained = self.buffer.untrained()
        if not trains_as_keras_does(self._model):
            # It may train some variables in later steps.
            untrained = of_other_optimizers(self._model, untrained)
        refuse_untrained(untrained)

    def find_zeros(self) -> None:
        """Takes the zeros that are there as pruned, and begins the ramps with them where the task says so."""
        self.pruner.find_zeros()
        self._begin_ramps(self.pruner.zeros)

    def knowledge(self) -> dict[str, np.ndarray]:
        """What a run that goes on with this one has to know; the model's variables are up to date."""
        known = {
            "pruned": np.packbits(np.concatenate(self.pruner.pruned)),
            "beginnings": np.array(self._ramps.beginnings),
            "done": np.array(np.nan if self.done is None else self.done),
            "first_epoch": np.array(self._first_epoch),
        }
        if self._needs_buffer and self.buffer is not None and self.buffer.ring is not None:
            known["gradients"], known["gradients_seen"] = map(np.asarray, self.buffer.ring.contents())
        return known

    def go_on(self, known: Mapping[str, np.ndarray]) -> None:
        """To be called instead of `begin` where training goes on with what `knowledge` told."""
        self._collapse = Collapse(self.targets)
        self.pruner.take(np.unpackbits(known["pruned"], count=sum(t.size for t in self.targets)).astype(bool))
        self._ramps.begin_at(known["beginnings"].tolist())
        self.done = None if np.isnan(known["done"]) else float(known["done"])
        self._first_epoch = int(known["first_epoch"])
        if self.buffer is not None and self.buffer.ring is not None and "gradients" in known:
            self.buffer.ring.put(known["gradients"], int(known["gradients_seen"]))

    def lacking(self, progress: Progress, epoch: int) -> str:
        """What a run that goes on at an epoch lacks if it doesn't know what the one before knew, or ""."""
        if self.buffer is None or not self._needs_buffer:
            return ""
        updates = self.plan(progress.steps, progress.epochs, epoch)
        short = any(update.num_grads > (update.steps_before or 0) for update in updates)
        return "the gradients that were buffered" if short else ""

    @property
    def _needs_buffer(self) -> bool:
        return self.done != self.task.schedule.end

    def _check_buffer(self, progress: Progress, siblings: Sequence["Run"]) -> None:
        expected: dict[int, int] = {}
        for other in siblings:
            if other.task.leave_enabled and other.task.schedule.end <= self.task.schedule.start:
                expected |= other.zeros_at_the_end()
        pairs = zip(self.targets, self.pruner.zeros, strict=True)
        zeros = [max(zeros, expected.get(id(target.variable), 0)) for target, zeros in pairs]
        self._begin_ramps(zeros, progress.steps, progress.epoch)
        updates = self._ramps.plan(zeros, progress.steps, progress.epochs, progress.epoch)
        check_buffer(updates, progress.steps, progress.epochs, progress.epoch)

    def zeros_at_the_end(self) -> dict[int, int]:
        """About how many zeros each variable will have, by `id(variable)`."""
        keys = (id(target.variable) for target in self.targets)
        return dict(zip(keys, self._ramps.zeros_at_the_end(), strict=True))

    def rows(self) -> int:
        """Gradient samples that the next update uses."""
        return self._ramps.gradients_after(sum(self.pruner.zeros))

    def due(self, position: float) -> float | None:
        """The position on the grid of the update that is due at a position, if it isn't done yet."""
        due = self.task.schedule.due(position)
        return None if due is None or (self.done is not None and due <= self.done) else due

    def waits(self, rows: int, steps: int) -> bool:
        """Whether the buffer is too empty: that of a run that went on without an earlier one's gradients may be."""
        return self.buffer is not None and self._first_epoch > 0 and steps < rows

    def prunes(self, due: float) -> bool:
        """Whether the update that is due at a position would prune anything."""
        return self.pruner.prunes(self._ramps.at(due))

    def update(self, due: float, rows: int, progress: Progress, position: float) -> None:
        """Makes the update at `due` on the grid, with so many gradient samples, while training is at `position`."""
        # A resumed run draws what an unbroken one would have drawn.
        gap = self.task.schedule.frequency or 1.0 / (progress.steps or 1)
        draw = round((due - self.task.schedule.start) / gap)
        updates = StagedUpdates(self.pruner, self.source, self.task.options.num_recomputations)
        ranks = self.pruner.ranks
        note = agree(self._model, self.pruner, due, rows)
        try:
            done = updates.update(self._ramps.at(due), lambda _: rows, draw)
        except NoUsableSamplesError as error:
            raise ValueError(f"The update at epoch {position:.4g}: {error}") from error
        notes = [f"{note} {stage.note}".strip() for stage in done]
        self._stages += ranks.same([replace(s, epoch=position, note=text) for s, text in zip(done, notes, strict=True)])

    def news(self) -> list[str]:
        """What has died since the last time, as warnings; to be asked for after an update."""
        assert self._collapse is not None
        return self._collapse.news(self._model, lambda: self._examples)

    def emptied(self) -> list[Target]:
        """The variables that will certainly have no weight left at the end."""
        if self.task.options.mask_type != UNSTRUCTURED:
            return []
        finals, sizes = self._ramps.at(self.task.schedule.end), [target.size for target in self.targets]
        return [self.targets[place] for place in emptied_at(finals, sizes, self.task.options.global_sparsity)]

    def report(self) -> PruningReport:
        """See `WoodFisherPruning.report`."""
        return PruningReport(
            count_zeros(self.targets),
            merged([phase for stage in self._stages for phase in stage.phases]),
            sum(stage.samples for stage in self._stages),
            self._notes(),
            tuple(self._stages),
            self.task.options.settings(),
            left_out=self.left_out(),
            history=tuple(self._history),
        )

    def end_epoch(self, epoch: int, logs: Mapping[str, Any] | None) -> None:
        """Notes how training went in an epoch that is over, for the report."""
        self._history.append(epoch_report(epoch, self.pruner.sparsity, logs))

    def _notes(self) -> tuple[str, ...]:
        constant = "" if self._collapse is None else self._collapse.constant
        notes = (*(stage.note for stage in self._stages), constant, self.pruner.note)
        return tuple(dict.fromkeys(text for text in notes if text))

    def remarks(self) -> list[str]:
        """What is left out, of variables and of the model, in lines."""
        return [*([self.pruner.note] if self.pruner.note else []), *self.left_out().lines()]

    def left_out(self) -> LeftOut:
        """The weights that it doesn't consider."""
        return left_out_of(self._model, self.targets, self.task.options.params, self.task.options.exclude)

    def close(self) -> None:
        """Ends buffering."""
        if self.buffer is not None:
            self.buffer.detach()
            self.buffer = self.source = None

    def _begin_ramps(self, zeros: Sequence[int], steps: int | None = None, first_epoch: int = 0) -> None:
        if self.task.from_zeros:
            self._ramps.start_from(zeros, steps, first_epoch)


def sparsity_of(runs: Sequence[Run]) -> float:
    """The fraction of zeros over all variables that runs prune, together or one after the other."""
    zeros: dict[int, tuple[int, int]] = {}
    for pruner in (run.pruner for run in runs):
        for target, number in zip(pruner.targets, pruner.zeros, strict=True):
            known = zeros.get(id(target.variable), (0, 0))
            zeros[id(target.variable)] = max(known, (number, target.size))
    return sum(number for number, _ in zeros.values()) / sum(size for _, size in zeros.values())
