"""The callback of a modifier that prunes in one shot."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.keras_internals.training import (
    forget,
    leaving_nothing,
    model_of,
    refresh,
    undo_where_refused,
)
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.callbacks.resuming import ResumableCallback
from keras_woodfisher.model.weight_copies import copies_of_weights
from keras_woodfisher.oneshot.prune import prune
from keras_woodfisher.reports.pruning_report import PruningReport


class OneShotPruning(ResumableCallback):
    """Prunes before the first batch of the first epoch; training that goes on isn't pruned again.

    Where another callback refuses the training before its first step, the weights are as they were.

    Args:
        data: Examples, as in `prune`.
        verbose: As in `prune`.
        arguments: Further ones of `prune`.
    """

    async_safe = True
    """As in `ScheduledCallback`: steps needn't wait for their logs."""

    def __init__(self, data: Any, verbose: int, arguments: Mapping[str, Any]):
        super().__init__()
        self._data = data
        self._verbose = verbose
        self._arguments = dict(arguments)
        self._began = False
        self._report: PruningReport | None = None
        self._before: list[tuple[Any, np.ndarray]] = []

    def report(self) -> PruningReport:
        """What was done when this training run, or the last one, began.

        Raises:
            RuntimeError: If it wasn't in effect.
        """
        if self._report is None:
            raise RuntimeError("Nothing was pruned: training hasn't begun, or it began at a later epoch.")
        return self._report

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._began = False
        self._report = None

    def _shared(self) -> list[Any]:
        return [self._data]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        # A backup amid the first epoch begins it again.
        if not self._began and epoch == 0 and self._known is None:
            with current_ranks().together(type(self).__name__), leaving_nothing(self):
                self._prune(refresh(self))
        self._began = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._settle()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._settle()

    def on_train_end(self, logs: Any = None) -> None:
        self._settle()
        super().on_train_end(logs)

    def _prune(self, model: keras.Model) -> None:
        variables = [*model.weights, *copies_of_weights(model)]
        before = [(variable, np.array(ops.convert_to_numpy(variable))) for variable in variables]
        self._report = prune(model, self._data, verbose=self._verbose, **self._arguments)
        self._before = [(variable, old) for variable, old in before if (ops.convert_to_numpy(variable) != old).any()]
        if self._before:
            undo_where_refused(model, self._put_back)

    def _put_back(self) -> None:
        for variable, old in self._before:
            variable.assign(old)
        self._before, self._report = [], None

    def _settle(self) -> None:
        """Lets go of the weights from before: a step was made with the new ones."""
        if self._before:
            self._before = []
            forget(model_of(self), self._put_back)
