"""Where training stands, in epochs: what a callback on a schedule has to know, and Keras tells in pieces."""

from collections.abc import Mapping
from typing import Any


class Progress:
    """The position of one call of `fit`, fed by a callback's own events.

        >>> progress = Progress({"epochs": 3, "steps": 4})
        >>> progress.begin_epoch(1)
        >>> [progress.before(batch) for batch in range(4)]
        [1.0, 1.25, 1.5, 1.75]

    Args:
        params: The callback's `params`.
        total_epochs: Epochs of the whole training, where this `fit` is only a part of it.

    Attributes:
        epochs: Index after the last epoch of training, or None outside of `fit`.
        fit_epochs: Index after the last epoch of this `fit`.
        steps: Batches an epoch; None in the first epoch of a generator of unknown length.
        epoch: Index of the present epoch.
        batches: Batches of it that are done.
        total: Batches that are done since training began.
        ended: Position where the last whole epoch ended; an epoch that begins follows one that is done.

    Raises:
        ValueError: If this `fit` is longer than the whole training.
    """

    def __init__(self, params: Mapping[str, Any] | None, total_epochs: int | None = None):
        params = params or {}
        self.fit_epochs: int | None = params.get("epochs")
        self.epochs = self.fit_epochs if total_epochs is None else total_epochs
        if total_epochs is not None and (self.fit_epochs or 0) > total_epochs:
            raise ValueError(
                f"This fit trains to epoch {self.fit_epochs}, beyond total_epochs={total_epochs}, which is the number "
                f"of epochs of all parts of the training. Give total_epochs={self.fit_epochs}, or leave it out."
            )
        self.steps: int | None = params.get("steps")
        self._counts = self.steps is None
        self.epoch = 0
        self.batches = 0
        self.total = 0
        self.ended = 0.0

    def resume(self, steps: int | None, total: int) -> None:
        """Takes over what the run knew that this one goes on with: the length of an epoch, and the batches done."""
        self.steps = self.steps or steps
        self.total = total

    @property
    def goes_on(self) -> bool:
        """Whether a later `fit` is to train further."""
        return self.epochs != self.fit_epochs and self.epochs is not None and self.ended < self.epochs

    @property
    def is_over(self) -> bool:
        """Whether all epochs of training are done."""
        return self.epochs is not None and self.ended >= self.epochs

    def begin_epoch(self, epoch: int) -> None:
        """To be called from `on_epoch_begin`."""
        self.epoch, self.batches, self.ended = epoch, 0, float(epoch)

    def before(self, batch: int) -> float:
        """The position before a batch. It stays below the next epoch, and is the epoch's start without `steps`."""
        return self.epoch + (min(batch / self.steps, 1.0 - 1e-6) if self.steps else 0.0)

    def end_batch(self, batch: int) -> None:
        """To be called from `on_train_batch_end`, which may stand for several steps (`steps_per_execution`)."""
        self.total += batch + 1 - self.batches
        self.batches = batch + 1

    def end_epoch(self, stopped: bool) -> None:
        """To be called from `on_epoch_end`.

        Args:
            stopped: Whether training is about to stop.
        """
        if self.is_whole_epoch(stopped):
            self.ended = self.epoch + 1.0
        if self._counts:
            self.steps = self.batches

    def is_last_epoch(self) -> bool:
        """Whether `fit` ends with this epoch."""
        return self.epochs is not None and self.epoch == self.epochs - 1

    def is_last_batch(self) -> bool:
        """Whether all batches of this epoch are done, as far as their number is known."""
        return self.steps is not None and self.batches >= self.steps

    def is_whole_epoch(self, stopped: bool) -> bool:
        """Whether the epoch's batches are all done: training wasn't stopped amid them."""
        return self.steps is None or self.batches >= self.steps or not stopped
