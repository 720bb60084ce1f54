"""The callback of a modifier that prunes in one shot."""

from collections.abc import Mapping
from typing import Any

from keras_woodfisher_backends.keras_internals.training import leaving_nothing, refresh

from keras_woodfisher.callbacks.resuming import ResumableCallback
from keras_woodfisher.oneshot.prune import prune
from keras_woodfisher.reports.pruning_report import PruningReport


class OneShotPruning(ResumableCallback):
    """Prunes before the first batch of the first epoch; training that goes on isn't pruned again.

    Args:
        data: Examples, as in `prune`.
        verbose: As in `prune`.
        arguments: Further ones of `prune`.
    """

    def __init__(self, data: Any, verbose: int, arguments: Mapping[str, Any]):
        super().__init__()
        self._data = data
        self._verbose = verbose
        self._arguments = dict(arguments)
        self._began = False
        self._report: PruningReport | None = None

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
            with leaving_nothing(self):
                self._report = prune(refresh(self), self._data, verbose=self._verbose, **self._arguments)
        self._began = True
