"""One training run of a pruning callback: what is pruned, how far by when, with which gradients, and what was done."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras

from keras_woodfisher.callbacks.progress import Progress
from keras_woodfisher.callbacks.pruning_task import Task
from keras_woodfisher.callbacks.update_plan import PlannedUpdate, Ramps, check_buffer
from keras_woodfisher.data.examples import open_examples
from keras_woodfisher.gradients.buffer import BufferedGradients
from keras_woodfisher.gradients.sources import GradientSource, SampledGradients
from keras_woodfisher.model.targets import Target, finals_of
from keras_woodfisher.pruning.guard import guard_of
from keras_woodfisher.pruning.masks import zeros_of
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.stages import StagedUpdates
from keras_woodfisher.reports.pruning_report import PruningReport, StageReport, merged
from keras_woodfisher.reports.zeros import count_zeros


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
        self._first_epoch = 0
        self._stages: list[StageReport] = []

    @property
    def targets(self) -> list[Target]:
        return self.pruner.targets

    def plan(
        self, steps: int | None, epochs: int | None, first_epoch: int = 0, pruned: Mapping[int, int] | None = None
    ) -> list[PlannedUpdate]:
        """Every update that it will make; see `WoodFisherPruning.plan`."""
        zeros = [(pruned or {}).get(id(t.variable), int(zeros_of(t).sum())) for t in self.targets]
        self._begin_ramps(zeros)
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
            self.source = self.buffer = BufferedGradients(self._model, self.targets, options.most_gradients, backend)
            uses = uses or [(options.most_gradients, 1)]
        else:
            examples = open_examples(self.task.data)
            self.source = sampled = SampledGradients(self._model, self.targets, options, backend, examples, loss)
            self.pruner.guard = guard_of(sampled, options, backend, options.most_gradients, options.update)
        self.pruner.open_source(self.source, options.most_gradients, uses)

    def prepare(self, progress: Progress) -> None:
        """To be called before training: whatever can't work fails here, and buffering begins where it is needed.

        Raises:
            ValueError, TypeError, MemoryError: See `open_source`.
        """
        if not self.task.options.second_order:
            return
        self.task.check_buffered()
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
        self.find_zeros()
        if self.buffer is not None:
            self._check_buffer(progress, siblings)

    def find_zeros(self) -> None:
        """Takes the zeros that are there as pruned, and begins the ramps with them where the task says so."""
        self.pruner.find_zeros()
        self._begin_ramps(self.pruner.zeros)

    def _check_buffer(self, progress: Progress, siblings: Sequence["Run"]) -> None:
        expected: dict[int, int] = {}
        for other in siblings:
            if other.task.leave_enabled and other.task.schedule.end <= self.task.schedule.start:
                expected |= other.zeros_at_the_end()
        pairs = zip(self.targets, self.pruner.zeros, strict=True)
        zeros = [max(zeros, expected.get(id(target.variable), 0)) for target, zeros in pairs]
        self._begin_ramps(zeros)
        updates = self._ramps.plan(zeros, progress.steps, progress.epochs, progress.epoch)
        check_buffer(updates, progress.steps, progress.epochs, progress.epoch, self.task.schedule.start)

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
        """Whether the buffer is too empty: that of a resumed run was, when the updates of an earlier one came."""
        return self.buffer is not None and self._first_epoch > self.task.schedule.start and steps < rows

    def prunes(self, due: float) -> bool:
        """Whether the update that is due at a position would prune anything."""
        return self.pruner.prunes(self._ramps.at(due))

    def update(self, due: float, rows: int, progress: Progress, position: float) -> None:
        """Makes the update at `due` on the grid, with so many gradient samples, while training is at `position`."""
        # A resumed run draws what an unbroken one would have drawn.
        gap = self.task.schedule.frequency or 1.0 / (progress.steps or 1)
        draw = round((due - self.task.schedule.start) / gap)
        updates = StagedUpdates(self.pruner, self.source, self.task.options.num_recomputations)
        done = updates.update(self._ramps.at(due), lambda _: rows, draw)
        self._stages += [replace(stage, epoch=position) for stage in done]

    def report(self) -> PruningReport:
        """See `WoodFisherPruning.report`."""
        return PruningReport(
            count_zeros(self.targets),
            merged([phase for stage in self._stages for phase in stage.phases]),
            sum(stage.samples for stage in self._stages),
            (self.pruner.note,) if self.pruner.note else (),
            tuple(self._stages),
            self.task.options.settings(),
        )

    def close(self) -> None:
        """Ends buffering."""
        if self.buffer is not None:
            self.buffer.detach()
            self.buffer = self.source = None

    def _begin_ramps(self, zeros: Sequence[int]) -> None:
        if self.task.from_zeros:
            self._ramps.start_from(zeros)


def sparsity_of(runs: Sequence[Run]) -> float:
    """The fraction of zeros over all variables that runs prune, together or one after the other."""
    zeros: dict[int, tuple[int, int]] = {}
    for pruner in (run.pruner for run in runs):
        for target, number in zip(pruner.targets, pruner.zeros, strict=True):
            known = zeros.get(id(target.variable), (0, 0))
            zeros[id(target.variable)] = max(known, (number, target.size))
    return sum(number for number, _ in zeros.values()) / sum(size for _, size in zeros.values())
