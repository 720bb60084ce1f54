"""WoodFisherPruning: knows when to prune; the pruner knows what, the backend how."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.training import callbacks_beside, keep_edits, model_of, refresh
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.callbacks.callback_list import warn, warn_about_others
from keras_woodfisher.callbacks.epoch_logs import log_each
from keras_woodfisher.callbacks.mask_callback import MaskCallback
from keras_woodfisher.callbacks.mask_constraint import WeightMasks
from keras_woodfisher.callbacks.pruning_run import Run, sparsity_of
from keras_woodfisher.callbacks.pruning_task import Task
from keras_woodfisher.callbacks.update_plan import PlannedUpdate
from keras_woodfisher.model.weight_copies import copies_follow
from keras_woodfisher.options.checks import flag
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.collapse import emptied_text
from keras_woodfisher.reports.meter import announce, say
from keras_woodfisher.reports.pruning_report import PruningReport


class WoodFisherPruning(MaskCallback):
    """Prunes a model during `fit`, on a schedule, with second-order scores and corrections.

    At each update the inverse of the empirical Fisher `F = damp I + (1/m) G^T G` is estimated block by block, the
    weights with the lowest `w^2 / (2 [F^-1]_jj)` are removed, and the others are corrected (WoodFisher, arXiv
    2004.14340; M-FAC, arXiv 2107.03356). Pruned weights are exactly zero after every optimizer step from then on.
    It belongs first in the list of callbacks.

        >>> pruner = kw.WoodFisherPruning(0.75, end_epoch=1, data=(x, y), verbose=0)
        >>> history = model.fit(x, y, epochs=2, callbacks=[pruner], verbose=0)
        >>> history.history["sparsity"]
        [0.0, 0.75]

    Args:
        final_sparsity: Fraction of zeros from `end_epoch` on, in [0, 1); or `{fraction: names}`, which prunes each
            variable by itself to the fraction of the first name or `re:` pattern that matches it.
        end_epoch: Position of the last update in epochs, fractions allowed. Training must last as long.
        init_sparsity: Fraction of zeros at `start_epoch`, or `"__FROM_PARAM__"`: the zeros that are there.
        start_epoch: Position of the first update in epochs; -1 means at once.
        update_frequency: Epochs between updates, fractions allowed; 0 or -1 means at every step.
        inter_func: `"cubic"`, `"linear"` or `"inverse_cubic"` ramp.
        leave_enabled: Hold the zeros to the end of training, or let them grow again after `end_epoch`.
        data: Where to sample gradients from: whatever `fit` takes, or a callable that returns a fresh iterator of
            batches. Without it the training run's own latest gradients are buffered, one a step.
        params: The variables to prune: `"__ALL_PRUNABLE__"` (the default: kernels of Dense, EinsumDense, convolutions,
            recurrent layers), `"__ALL__"` (embeddings and weights of other layers too), or a list of these, of names
            and of `re:` patterns.
        exclude: Names and patterns to leave out.
        global_sparsity: Rank all weights together (the default), or each variable by itself.
        num_grads: Gradient samples (m), or `{sparsity: count}`: the count of the largest key that is at or below the
            sparsity reached so far.
        grad_batch_size: Examples averaged into one sample (b). With buffering it is the training batch.
        fisher: `"empirical"`: samples are gradients of the loss, as in the papers; `"ggn"`: rows of an unbiased sketch
            of the Gauss-Newton matrix, for (sparse) categorical and binary cross-entropy and mean squared error (not
            with buffering).
        damp: Ridge on the Fisher's diagonal, in units of squared gradient; `"auto"`: the one by which the estimate is
            nearest to the true Fisher (`keras_woodfisher.pruning.shrinkage`). Where `data` has examples to spare, up to
            128 of them are held out, a smaller ridge is tried first, and an update that isn't clearly better on them
            than magnitude pruning gives way to that. The papers have 1e-5.
        fisher_block_size: Weights in one block (B); None means one block over everything.
        num_recomputations: Stages of one update, each with new gradients; the kept fraction falls by the same factor
            in each (not with buffering).
        update: `"joint"` corrects for all weights pruned in a block at once, `"independent"` adds up the single
            corrections, as in the papers.
        method: `"woodfisher"`, or `"magnitude"` (no gradients, no correction).
        mask_type: Which zeros are made: `"unstructured"` (single weights), `"N:M"` such as `"2:4"` (at most N of M
            neighbours stay), `"block4"` (4 neighbours), `[a, b]` (a output units by b inputs), `"filter"` (all weights
            of an output unit) or `"channel"` (all weights that read an input). Neighbours are inputs of one output
            unit, those of one kernel position next to each other. Groups are ranked by their joint cost for each
            weight. Sparsities are fractions of the weights that fill whole groups; what fills none stays dense.
        available_gpus: Devices that share the inverse, such as `["cuda:0"]`, or `"all"`: every GPU; none means the CPU.
        memory_limit: Bytes of the host's memory that updates may take beside the training's own, or a text such as
            `"4GiB"`; by default a quarter of what is free when training begins. Gradients that don't fit go to a
            temporary file, or are taken again for a part of the weights at a time.
        grads_device: Where gradients are kept: `"cpu"` (memory, or disk as the limit has it), `"disk"`, or a device
            such as `"cuda:0"`.
        grads_dtype: `"float32"`, or `"float16"` with a scale for each sample: half the memory, less accuracy.
        num_pages: Where one block spans everything, keep one of so many pages of the gradients' columns in memory,
            and the others on disk.
        seed: Seed of the choice of examples from arrays; None chooses anew each time.
        verbose: 0 silent, 1 a progress bar at each update, 2 one line a phase.
        total_epochs: Epochs of the whole training, where a `fit` is only a part of it and a later one goes on.
        log_variables: Put the sparsity of each variable, too, into the logs of each epoch, as `sparsity/<path>`, for
            the callbacks after this one (TensorBoard, CSVLogger, those of W&B and MLflow) and the history.

    Raises:
        ValueError, TypeError: If an argument is out of range, or, before the first batch, if the arguments don't fit
            the model, the data or the training.
        KeyError: Before the first batch, if a name matches no variable.
        MemoryError: Before the first batch, if the gradients don't fit.
    """

    def __init__(  # noqa: PLR0913
        self,
        final_sparsity: float | Mapping[float, Sequence[str]],
        *,
        end_epoch: float,
        init_sparsity: float | str = 0.0,
        start_epoch: float = 0.0,
        update_frequency: float = 1.0,
        inter_func: str = "cubic",
        leave_enabled: bool = True,
        data: Any = None,
        params: str | Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        global_sparsity: bool | None = None,
        num_grads: int | Mapping[float, int] = 64,
        grad_batch_size: int = 1,
        fisher: str = "empirical",
        damp: float | str = "auto",
        fisher_block_size: int | None = 2000,
        num_recomputations: int = 1,
        update: str = "joint",
        method: str = "woodfisher",
        mask_type: str | Sequence[int] = "unstructured",
        available_gpus: str | Sequence[str] | None = None,
        memory_limit: int | str | None = None,
        grads_device: str = "cpu",
        grads_dtype: str = "float32",
        num_pages: int = 1,
        seed: int | None = 0,
        verbose: int = 1,
        total_epochs: int | None = None,
        log_variables: bool = False,
    ):
        arguments = dict(locals())
        super().__init__(total_epochs)
        self._log_variables = flag("log_variables", log_variables)
        self.task = Task.of(arguments)
        self._siblings: list[WoodFisherPruning] = []
        self._run: Run | None = None

    def get_config(self) -> dict[str, Any]:
        """All arguments but `data`, for `from_config`."""
        return self.task.config() | {"total_epochs": self._total_epochs, "log_variables": self._log_variables}

    @classmethod
    def from_config(cls, config: dict[str, Any], data: Any = None) -> "WoodFisherPruning":
        """A callback with the arguments of `get_config`."""
        return cls(**config, data=data)

    def _shared(self) -> list[Any]:
        return [self.task.data]

    @property
    def options(self) -> PruningOptions:
        """How its updates work."""
        return self.task.options

    @property
    def run(self) -> Run:
        """The present training run, or the last one.

        Raises:
            RuntimeError: Before training has begun.
        """
        if self._run is None:
            raise RuntimeError("The sparsity is known once training has begun; sparsity_report tells it of any model.")
        return self._run

    @property
    def sparsity(self) -> float:
        """The fraction of pruned weights over the chosen variables, now; a RuntimeError before training has begun."""
        return self.run.pruner.sparsity

    def report(self) -> PruningReport:
        """What the updates of the present training run, or of the last one, did, and the zeros now; `print` it."""
        return self.run.report()

    def on_train_begin(self, logs: Any = None) -> None:
        self._run = None
        super().on_train_begin(logs)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_begin(batch, logs)
        self._prune_if_due(self._progress.before(batch))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_end(batch, logs)
        if self.run.awaits_a_step:
            with self._leaving_nothing("first step"):
                self.run.check_first_step()
        if self._progress.is_last_batch() and self._progress.is_last_epoch():
            self._prune_if_due(self._progress.epoch + 1.0, last=True)
        self._log(logs)

    def on_test_begin(self, logs: Any = None) -> None:
        # The last chance before validation, where the number of steps wasn't known.
        progress = self._progress
        # Of several processes only one may validate: theirs comes at the end of the epoch.
        alone = current_ranks().size == 1
        if (
            alone
            and self.weight_masks is not None
            and progress.is_last_epoch()
            and progress.is_whole_epoch(self._stopped)
        ):
            self._prune_if_due(progress.epoch + 1.0, last=True)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if self._progress.is_last_epoch() and self._progress.ended > epoch:
            self._prune_if_due(self._progress.ended, last=True)
        if self._released:
            self.run.pruner.find_zeros()
        self._log(logs)
        self.run.end_epoch(epoch, logs)
        if self._log_variables:
            log_each(logs, self.run.targets, self.run.pruner.zeros)

    def on_train_end(self, logs: Any = None) -> None:
        if self.weight_masks is None:
            return
        # Training that was stopped early may end where the last update is due.
        if self._progress.ended >= self.task.schedule.end and not self._progress.goes_on:
            self._prune_if_due(self._progress.ended, last=True)
        super().on_train_end(logs)
        if self._started and self.run.done != self.task.schedule.end and not self._progress.goes_on:
            warn(
                f"Training ended before end_epoch={self.task.schedule.end:g}: the model is at sparsity "
                f"{self.sparsity:.3f}, not at {self.get_config()['final_sparsity']}. With EarlyStopping, set "
                f"start_from_epoch={self.task.first_final_epoch(self._progress.epochs)}."
            )

    def _prepare(self, model: keras.Model) -> WeightMasks:
        self.task.check_epochs(self._progress.epochs)
        run = self._run = Run(self.task, model)
        if self.options.verbose and (remarks := run.remarks()):
            say("\n".join(remarks))
        if emptied := run.emptied():
            warn(f"final_sparsity rounds to all weights. {emptied_text(emptied, 'will be')}")
        run.prepare(self._progress)
        before, after = beside = callbacks_beside(self)
        self._siblings = [c for c in [*before, *after] if isinstance(c, WoodFisherPruning)]
        end = self.task.schedule.end
        warn_about_others(beside, end, self.task.first_final_epoch(self._progress.epochs))
        return WeightMasks(model, run.targets, (self.task.schedule.start, end))

    def plan(
        self,
        model: keras.Model,
        steps_per_epoch: int | None = None,
        epochs: int | None = None,
        initial_epoch: int = 0,
        pruned: Mapping[int, int] | None = None,
    ) -> list[PlannedUpdate]:
        """Every update that a training run would make. Nothing is trained or changed.

        Args:
            model: The model to train; it need not be compiled.
            steps_per_epoch: Batches an epoch, where known.
            epochs: `epochs` of the run, where known.
            initial_epoch: `initial_epoch` of the run.
            pruned: Zeros that variables will have when it begins, by `id(variable)`, where not those they have now.

        Raises:
            ValueError: If there is nothing to prune.
            KeyError: If a name matches no variable.
        """
        return Run(self.task, model).plan(steps_per_epoch, epochs, initial_epoch, pruned)

    def check_plan(
        self, updates: Sequence[PlannedUpdate], steps_per_epoch: int | None, epochs: int | None, initial_epoch: int = 0
    ) -> None:
        """Refuses a training run that can't do what was planned.

        Raises:
            ValueError: If training ends before `end_epoch`, or (with the number of steps and without data) the buffer
                can't hold enough gradients at an update.
        """
        self.task.check_plan(updates, steps_per_epoch, epochs, initial_epoch)

    def _start(self, epoch: int) -> list[np.ndarray]:
        self.run.begin(self._progress, [other.run for other in self._siblings])
        self._released = self.run.released
        return self.run.held()

    def _go_on(self, known: Mapping[str, np.ndarray]) -> None:
        self.run.go_on(known)

    def identity(self) -> dict[str, Any]:
        return self.task.identity() | super().identity()

    def knowledge(self) -> dict[str, np.ndarray]:
        return super().knowledge() | self.run.knowledge()

    def lacking(self, epoch: int) -> str:
        return self.run.lacking(self._progress, epoch)

    def _prune_if_due(self, position: float, last: bool = False) -> None:
        """Makes the update that is due; `last` where training ends and nothing can wait."""
        if self.run.due(position) is not None:
            with self._leaving_nothing(f"update at epoch {position:.4g}"):
                self._prune(position, last)

    def _prune(self, position: float, last: bool) -> None:
        run, weight_masks = self.run, self.weight_masks
        due = run.due(position)
        if due is None:
            return
        if run.done is None and weight_masks is not None and weight_masks.is_shared():
            # Another callback may have pruned the same variables before this one's turn.
            refresh(self)
            run.find_zeros()
        rows, prunes = run.rows(), run.prunes(due)
        if prunes and run.waits(rows, self._progress.total) and not last:
            return
        self._check_state()
        if prunes and last and (lost := run.pruner.not_finite()):
            # Training is over, and TerminateOnNaN may have ended it.
            warn(f"The update at epoch {position:.3g} was left out. {lost}")
            run.done = due
            return
        if prunes:
            with copies_follow(model_of(self), [target.variable for target in run.targets]):
                run.update(due, rows, self._progress, position)
                for text in run.news():
                    warn(text)
                if weight_masks is not None:
                    weight_masks.hold(run.pruner.masks())
                    weight_masks.constrain()
            if self.options.verbose:
                announce(f"epoch {position:.3g}, sparsity {self.sparsity:.4f}")
        run.done = due
        if due == self.task.schedule.end and not self.task.leave_enabled and weight_masks is not None:
            weight_masks.release()
            self._released = True
        keep_edits(model_of(self))

    def _log(self, logs: Any) -> None:
        if logs is not None:
            runs = [self.run, *(other.run for other in self._siblings)]
            logs["sparsity"] = self.sparsity if len(runs) == 1 else sparsity_of(runs)

    def _let_go(self) -> None:
        super()._let_go()
        if self._run is not None:
            self._run.close()
