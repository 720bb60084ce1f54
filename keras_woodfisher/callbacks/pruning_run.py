"""One training run of a pruning callback: what is pruned, how far by when, with which gradients, and what was done."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from keras_woodfisher.callbacks.progress import Progress
from keras_woodfisher.callbacks.update_plan import PlannedUpdate, Ramps, check_buffer
from keras_woodfisher.data.examples import open_examples
from keras_woodfisher.gradients.footprint import buffered_footprint
from keras_woodfisher.gradients.sources import BufferedGradients, GradientSource, SampledGradients
from keras_woodfisher.model.targets import Target, finals_of
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.schedule import Schedule
from keras_woodfisher.pruning.pruner import Pruner, zeros_of
from keras_woodfisher.pruning.stages import StagedUpdates
from keras_woodfisher.reports.pruning_report import PruningReport, StageReport, merged
from keras_woodfisher.reports.zeros import count_zeros


@dataclass(frozen=True)
class Task:
    """What a callback was told, whatever the model.

    Attributes:
        options: How updates work.
        schedule: When they are, and how far they go.
        levels: A final sparsity for each variable, or None: the schedule's for all.
        from_zeros: Whether the ramps begin at the zeros that are there.
        data: Where to sample gradients from; None buffers those of training.
    """

    options: PruningOptions
    schedule: Schedule
    levels: tuple[tuple[float, tuple[str, ...]], ...] | None
    from_zeros: bool
    data: Any

    def check_epochs(self, epochs: int | None) -> None:
        """Refuses a run that ends too early.

        Raises:
            ValueError: If the last update lies after its last epoch.
        """
        if epochs is not None and self.schedule.end > epochs:
            raise ValueError(
                f"end_epoch={self.schedule.end:g} lies after the last epoch ({epochs}), so the final sparsity "
                f"would never be reached. Train for epochs={math.ceil(self.schedule.end)}, or lower end_epoch."
            )

    def check_buffered(self) -> None:
        """Refuses what the gradients of training can't give.

        Raises:
            ValueError: If an option needs data to sample from.
        """
        for name, plain in (("grad_batch_size", 1), ("fisher", "empirical"), ("num_recomputations", 1)):
            if getattr(self.options, name) != plain:
                raise ValueError(
                    f"{name}={getattr(self.options, name)!r} needs data to sample from: give data=(x, y). Without "
                    "data, each step of training gives one gradient, averaged over its batch."
                )

    def check_plan(
        self, updates: Sequence[PlannedUpdate], steps: int | None, epochs: int | None, first_epoch: int
    ) -> None:
        """Refuses a run that can't do what was planned; see `WoodFisherPruning.check_plan`."""
        self.check_epochs(epochs)
        if self.options.second_order and self.data is None:
            self.check_buffered()
            check_buffer(updates, steps, epochs, first_epoch, self.schedule.start)


class Run:
    """A task carried out on one model; nothing of the model is changed before the first update.

    Args:
        task: What to do.
        model: A built model.

    Attributes:
        pruner: Does the updates.
        buffer: The gradients of training, where those are used.

    Raises:
        ValueError, KeyError: See `Pruner`.
    """

    def __init__(self, task: Task, model: keras.Model):
        self._task = task
        self._model = model
        self.pruner = Pruner(model, task.options)
        targets = self.pruner.targets
        finals = [task.schedule.final] * len(targets) if task.levels is None else finals_of(targets, task.levels)
        sizes = [target.size for target in targets]
        self._ramps = Ramps(task.schedule, finals, sizes, task.options, self.pruner.coverage)
        self._source: GradientSource | None = None
        self.buffer: BufferedGradients | None = None
        self._stages: list[StageReport] = []

    @property
    def targets(self) -> list[Target]:
        return self.pruner.targets

    def plan(
        self,
        steps: int | None,
        epochs: int | None,
        first_epoch: int = 0,
        pruned: Mapping[int, int] | None = None,
    ) -> list[PlannedUpdate]:
        """Every update that it will make; see `WoodFisherPruning.plan`."""
        zeros = [int(zeros_of(target).sum()) for target in self.targets]
        zeros = [(pruned or {}).get(id(t.variable), z) for t, z in zip(self.targets, zeros, strict=True)]
        self._begin_ramps(zeros)
        return self._ramps.plan(zeros, steps, epochs, first_epoch)

    def open_source(self, progress: Progress) -> None:
        """Finds out where gradients come from and where they will be kept, and checks both.

        Raises:
            ValueError, TypeError: If the data doesn't fit the model or the options.
            MemoryError: If the gradients don't fit.
        """
        options = self._task.options
        if not options.second_order:
            return
        if self._task.data is None:
            self._task.check_buffered()
        planned = self.plan(progress.steps, progress.epochs)
        uses = [(update.num_grads, update.kept) for update in planned if update.num_grads]
        if self._task.data is None:
            footprint = buffered_footprint(self.targets, options.most_gradients)
            self.pruner.plan_memory(footprint, uses or [(options.most_gradients, 1)])
            backend = self.pruner.backend
            self._source = self.buffer = BufferedGradients(self._model, self.targets, options.most_gradients, backend)
            return
        source = SampledGradients(
            self._model, self.targets, options, self.pruner.backend, open_examples(self._task.data)
        )
        source.check(options.most_gradients)
        if uses:
            self.pruner.plan_memory(source.footprint(max(rows for rows, _ in uses)), uses)
        self._source = source

    def find_zeros(self) -> None:
        """Takes the zeros that are there as pruned, and begins the ramps with them where the task says so."""
        self.pruner.find_zeros()
        self._begin_ramps(self.pruner.zeros)

    def check_buffer(self, progress: Progress, epoch: int, expected: Mapping[int, int]) -> None:
        """Finds out whether the gradients of training, where they are buffered, are enough for each update.

        Args:
            progress: Of the run.
            epoch: Index of its first epoch.
            expected: Zeros that other callbacks will have left in variables by their turn, by `id(variable)`.

        Raises:
            ValueError: If it doesn't.
        """
        pairs = zip(self.targets, self.pruner.zeros, strict=True)
        zeros = [max(zeros, expected.get(id(target.variable), 0)) for target, zeros in pairs]
        self._begin_ramps(zeros)
        updates = self._ramps.plan(zeros, progress.steps, progress.epochs, epoch)
        check_buffer(updates, progress.steps, progress.epochs, epoch, self._task.schedule.start)

    def zeros_at_the_end(self) -> dict[int, int]:
        """About how many zeros each variable will have, by `id(variable)`."""
        return self._ramps.zeros_at_the_end({id(target.variable): target.size for target in self.targets})

    def rows(self) -> int:
        """Gradient samples that the next update uses."""
        return self._ramps.gradients_after(sum(self.pruner.zeros))

    def prunes(self, due: float) -> bool:
        """Whether the update that is due at a position would prune anything."""
        return self.pruner.prunes(self._ramps.at(due))

    def update(self, due: float, rows: int, draw: int, position: float) -> None:
        """Makes an update.

        Args:
            due: Its position on the grid, in epochs.
            rows: As `rows` has it.
            draw: Its number.
            position: Where training is.
        """
        updates = StagedUpdates(self.pruner, self._source, self._task.options.num_recomputations)
        done = updates.update(self._ramps.at(due), lambda _: rows, draw)
        self._stages += [replace(stage, epoch=position) for stage in done]

    def masks(self) -> list[np.ndarray]:
        """See `Pruner.masks`."""
        return self.pruner.masks()

    def report(self) -> PruningReport:
        """See `WoodFisherPruning.report`."""
        return PruningReport(
            count_zeros(self.targets),
            merged([phase for stage in self._stages for phase in stage.phases]),
            sum(stage.samples for stage in self._stages),
            (self.pruner.note,) if self.pruner.note else (),
            tuple(self._stages),
            self._task.options.settings(),
        )

    def close(self) -> None:
        """Ends buffering."""
        if self.buffer is not None:
            self.buffer.detach()
            self.buffer = self._source = None

    def _begin_ramps(self, zeros: Sequence[int]) -> None:
        if self._task.from_zeros:
            self._ramps.start_from(zeros)
