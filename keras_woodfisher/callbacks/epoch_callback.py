"""What all companion callbacks have in common: when something is due, and what they need of a model."""

import math
import sys
from types import FrameType
from typing import Any

import keras

from keras_woodfisher.callbacks.progress import Progress
from keras_woodfisher.model.optimizer_variables import built_optimizer, inner_optimizer, parts_of
from keras_woodfisher.options.checks import number

_OPTIMIZER = 2
"""Place of the optimizer's values in the state of a train step on JAX, as documented for custom ones."""


def assign_between_steps(model: keras.Model, variable: Any, value: float) -> None:
    """Assigns one variable of a model's optimizer; the next step of `fit` uses the new value.

    On JAX the values live in lists that `fit` hands from step to step while the variables are empty. Bringing all
    variables up to date for the sake of one number can cost more than a step does, so the number is changed in
    the list, where that can be found.
    """
    known = (getattr(model, "_jax_state", None) or {}).get("optimizer_variables")
    variables = model.optimizer.variables if known else []
    if not known or len(known) != len(variables):
        variable.assign(value)
        return
    index = next(i for i, other in enumerate(variables) if other is variable)
    live = None if model._jax_state_synced else _live_values(model)
    found = live is not None and live[index] is known[index]
    # Here too, since it is put back after a step that finds no more data.
    known[index] = keras.ops.convert_to_tensor(value, variable.dtype)
    if model._jax_state_synced:
        variable.assign(value)
    elif live is not None and found:
        live[index] = known[index]
    else:
        model.jax_state_sync()


def _live_values(model: keras.Model) -> list[Any] | None:
    """The optimizer's values that JAX's `fit` is about to hand to the next step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is model:
            state = frame.f_locals.get("state")
            values = state[_OPTIMIZER] if isinstance(state, tuple) and len(state) > _OPTIMIZER else None
            return values if isinstance(values, list) else None
        frame = frame.f_back
    return None


TOLERANCE = 1e-9
"""Positions that differ by less are the same: `2.3` and `2 + 3 / 10` need not be."""


class Companion(keras.callbacks.Callback):
    """Tells where training stands before each batch, and where it ended.

    Positions are exact to the step where the number of steps is known. In the first epoch of a generator of unknown
    length, and with a hand-written loop that doesn't tell it, only whole epochs are.
    """

    may_come_before_pruning = True

    async_safe = True
    """Keras may call `on_train_batch_end` from threads, which lets steps go on without waiting for their logs."""

    def __init__(self) -> None:
        super().__init__()
        self._progress = Progress(None)
        self._batch_ends: list[int] = []
        self._reached = -math.inf

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config`."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Companion":
        """A callback with the arguments of `get_config`."""
        return cls(**config)

    def on_train_begin(self, logs: Any = None) -> None:
        self._progress = Progress(self.params)
        self._reached = -math.inf
        self.check(self._model)
        self._prepare()

    def check(self, model: keras.Model) -> None:
        """Refuses a model that it can't work on. Nothing is changed.

        Raises:
            ValueError: If the model isn't compiled, or doesn't suit this callback.
        """
        if not getattr(model, "compiled", False) or model.optimizer is None:
            raise ValueError(
                f"The model must be compiled with an optimizer before training with {type(self).__name__}: "
                "call model.compile(optimizer=..., loss=...)."
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._progress.begin_epoch(epoch)
        self._batch_ends.clear()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._reached = self._progress.before(batch)
        self._apply(self._reached)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # From several threads, so in any order.
        self._batch_ends.append(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._batch_ends:
            self._progress.end_batch(max(self._batch_ends))
        self._progress.end_epoch(bool(self._model.stop_training))

    def on_train_end(self, logs: Any = None) -> None:
        # No batch follows, but what is due now is how a resumed run would begin.
        if self._progress.ended > self._reached:
            self._apply(self._progress.ended)

    def _prepare(self) -> None:
        """Checks before the first batch whatever can be checked then. On JAX, `self._model` is as good as `model`."""

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
    if isinstance(optimizer, keras.optimizers.MultiOptimizer) and model.built:
        # Only then are all its parts known.
        built_optimizer(model)
    return parts_of(optimizer)
