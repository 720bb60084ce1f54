"""What callbacks that set something at a position in training have in common."""

import math
from typing import Any

import keras
from keras_woodfisher_backends.keras_internals.optimizers import is_multi_optimizer
from keras_woodfisher_backends.keras_internals.training import leaving_nothing, model_of
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.callbacks.progress import Progress
from keras_woodfisher.callbacks.resuming import ResumableCallback
from keras_woodfisher.model.optimizer_variables import built_optimizer, check_compiled, inner_optimizer, parts_of
from keras_woodfisher.options.checks import as_json, number

TOLERANCE = 1e-9
"""Positions that differ by less are the same: `2.3` and `2 + 3 / 10` need not be."""


class ScheduledCallback(ResumableCallback):
    """Tells where training stands before each batch, and where it ended.

    Positions are exact to the step where the number of steps is known. In the first epoch of a generator of unknown
    length, and with a hand-written loop that doesn't tell it, only whole epochs are.

    Args:
        config: The arguments, by name, as they were checked.
    """

    async_safe = True
    """Keras may call `on_train_batch_end` from threads, which lets steps go on without waiting for their logs."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self._config = config
        self._batch_ends: list[int] = []
        self._reached = -math.inf

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config`."""
        return as_json(self._config)

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._progress = Progress(self.params)
        self._reached = -math.inf
        with current_ranks().together(f"{type(self).__name__}, beginning"), leaving_nothing(self):
            self.check(model_of(self))
            self._prepare()

    def check(self, model: keras.Model) -> None:
        """Refuses a model that it can't work on. Nothing is changed.

        Raises:
            ValueError: If the model isn't compiled, or doesn't suit this callback.
        """
        check_compiled(model, type(self).__name__)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self._progress.begin_epoch(epoch)
        self._batch_ends.clear()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._reached = self._progress.before(batch)
        with leaving_nothing(self):
            self._apply(self._reached)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # From several threads, so in any order.
        self._batch_ends.append(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._batch_ends:
            self._progress.end_batch(max(self._batch_ends))
        self._progress.end_epoch(bool(model_of(self).stop_training))

    def on_train_end(self, logs: Any = None) -> None:
        # No batch follows, but what is due now is how a resumed run would begin.
        if self._progress.ended > self._reached:
            self._apply(self._progress.ended)
        super().on_train_end(logs)

    def _prepare(self) -> None:
        """Checks before the first batch whatever can be checked then; the model's variables are up to date."""

    def _apply(self, position: float) -> None:
        """Makes what is due at a position, in epochs."""
        raise NotImplementedError


def start_of(value: Any) -> float:
    """Checks a `start_epoch`; -1 means at once, as 0 does.

    Raises:
        ValueError, TypeError: If it is negative otherwise, or not a number.
    """
    start = number("start_epoch", value)
    if start < 0 and start != -1:
        raise ValueError(f"start_epoch must be at least 0, or -1 for at once, got {start:g}.")
    return max(start, 0.0)


def end_of(value: Any, start: float) -> float:
    """Checks an `end_epoch` that may be -1: infinite, then.

    Raises:
        ValueError, TypeError: If it doesn't lie after `start`, or isn't a number.
    """
    end = number("end_epoch", value)
    if end == -1:
        return math.inf
    if end <= start:
        raise ValueError(
            f"end_epoch must lie after start_epoch={start:g}, or be -1 for the end of training, got {end:g}."
        )
    return end


def known_parts(model: keras.Model) -> list[Any]:
    """The optimizers that update weights: one, or the parts of a `MultiOptimizer`."""
    optimizer = inner_optimizer(model.optimizer)
    if is_multi_optimizer(optimizer) and model.built:
        # Only then are all its parts known.
        built_optimizer(model)
    return parts_of(optimizer)
