"""Callbacks that set the learning rate."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.optimizers import learning_rate_of
from keras_woodfisher_backends.keras_internals.training import assign_between_steps, callbacks_beside, model_of

from keras_woodfisher.callbacks import learning_rate_functions as rates
from keras_woodfisher.callbacks.epoch_callback import TOLERANCE, ScheduledCallback, end_of, known_parts, start_of
from keras_woodfisher.options.checks import LARGEST_FLOAT32, finite_float32, number, one_of


class LearningRateCallback(ScheduledCallback):
    """Sets the optimizer's rate to `value_at` before each batch, where it changes.

    Where several are in one list, one whose time hasn't ended goes before one that is over, and of these the one that
    began (or ended) last, whatever their order.

    Args:
        start: Position from which there is a rate.
        end: Position from which it stays as it is.
        config: The arguments, by name, as they were checked.
    """

    def __init__(self, start: float, end: float, config: dict[str, Any]):
        super().__init__(config)
        self._start = start
        self._end = end
        self._siblings: list[LearningRateCallback] = [self]
        self._set: float | None = None

    def value_at(self, position: float) -> float | None:
        """The rate at a position in epochs; None before `start_epoch`."""
        raise NotImplementedError

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        if self._known is not None:
            # The optimizer has this rate, or what something else has made of it since.
            self._set, self._known = float(self._known["rate"]), None

    def knowledge(self) -> dict[str, np.ndarray]:
        return {"rate": np.array(np.nan if self._set is None else self._set)}

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if logs is not None:
            # As Keras's LearningRateScheduler names them.
            parts = known_parts(model_of(self))
            for part in parts:
                name = "learning_rate" if len(parts) == 1 else f"learning_rate_{part.name}"
                logs[name] = float(keras.ops.convert_to_numpy(part.learning_rate))

    def check(self, model: keras.Model) -> None:
        super().check(model)
        for part in known_parts(model):
            rate = learning_rate_of(part)
            if not isinstance(rate, keras.Variable):
                raise ValueError(
                    f"The optimizer's learning rate can't be set by {type(self).__name__}, since it is "
                    f"{type(rate).__name__}. Compile the model with a number, such as "
                    f"{type(part).__name__}(learning_rate=0.01)."
                )

    def check_rates(self, epochs: int) -> None:
        """Refuses rates that grow beyond float32 before so many epochs are over: those that grow do so to the end.

        Raises:
            ValueError: If they do.
        """
        if (self.value_at(float(epochs)) or 0.0) > LARGEST_FLOAT32:
            raise ValueError(f"The learning rate is infinite by epoch {epochs}. Lower gamma, or end earlier.")

    def _prepare(self) -> None:
        if self._progress.epochs is not None:
            self.check_rates(self._progress.epochs)
        before, after = callbacks_beside(self)
        self._siblings = [c for c in [*before, self, *after] if isinstance(c, LearningRateCallback)]
        self._set = None

    def _apply(self, position: float) -> None:
        # Of equals the last in the list.
        leader = max(reversed(self._siblings), key=lambda callback: callback.standing(position))
        value = self.value_at(position) if leader is self else None
        if value is not None and value != self._set:
            for part in known_parts(model_of(self)):
                assign_between_steps(model_of(self), learning_rate_of(part), value)
        self._set = value

    def standing(self, position: float) -> tuple[bool, float, float]:
        """What decides between callbacks at a position; the greatest wins."""
        if position < self._start - TOLERANCE:
            return False, -1.0, -1.0
        running = position < self._end - TOLERANCE
        return running, self._start if running else self._end, self._start


class SetLearningRate(LearningRateCallback):
    """Sets the optimizer's learning rate at a position in training. It stays so afterwards.

        >>> lower = kw.SetLearningRate(1e-4, start_epoch=0.5)
        >>> history = model.fit(x, y, callbacks=[lower], verbose=0)
        >>> round(float(model.optimizer.learning_rate), 6)
        0.0001

    Args:
        learning_rate: The rate.
        start_epoch: Position in epochs, fractions allowed; 0 or -1 means at once.

    Raises:
        ValueError, TypeError: If an argument is out of range, or, before the first batch, if the optimizer's rate is
            a schedule.
    """

    def __init__(self, learning_rate: float, start_epoch: float = 0.0):
        start = start_of(start_epoch)
        self._rate = finite_float32("learning_rate", learning_rate, least=0.0)
        super().__init__(start, start, {"learning_rate": self._rate, "start_epoch": float(start_epoch)})

    def value_at(self, position: float) -> float | None:
        return self._rate if position >= self._start - TOLERANCE else None


class LearningRateFunction(LearningRateCallback):
    """Lowers (or raises) the learning rate from `init_lr` to `final_lr`, a little at each step.

    `final + f(x) (init - final)` with `x = (position - start) / (end - start)`: `linear` has `f = 1 - x`, `cosine`
    `f = (1 + cos(pi x)) / 2`; `cyclic_linear` is linear within each cycle of `cycle_epochs` and then jumps back.
    From `end_epoch` on, and after training, the rate is `final_lr`.

        >>> ramp = kw.LearningRateFunction("linear", init_lr=0.1, final_lr=0.0, start_epoch=2, end_epoch=4)
        >>> [ramp.value_at(position) for position in (0, 2, 3, 4, 9)]
        [None, 0.1, 0.05, 0.0, 0.0]

    Args:
        lr_func: `"linear"`, `"cosine"` or `"cyclic_linear"`.
        init_lr: The rate at `start_epoch`.
        final_lr: The rate from `end_epoch` on.
        start_epoch: Position in epochs, fractions allowed; 0 or -1 means at once.
        end_epoch: Position in epochs.
        cycle_epochs: Epochs of a cycle; only `cyclic_linear` uses it.

    Raises:
        ValueError, TypeError: If an argument is out of range, or, before the first batch, if the optimizer's rate is
            a schedule.
    """

    def __init__(
        self,
        lr_func: str,
        init_lr: float,
        final_lr: float,
        start_epoch: float,
        end_epoch: float,
        cycle_epochs: float = 1.0,
    ):
        start, end = start_of(start_epoch), number("end_epoch", end_epoch, least=0.0)
        if end < start:
            raise ValueError(f"end_epoch={end:g} lies before start_epoch={start:g}. Swap or move them.")
        config = {
            "lr_func": one_of("lr_func", lr_func, tuple(rates.FUNCTIONS)),
            "init_lr": finite_float32("init_lr", init_lr, least=0.0),
            "final_lr": finite_float32("final_lr", final_lr, least=0.0),
            "start_epoch": float(start_epoch),
            "end_epoch": end,
            "cycle_epochs": number("cycle_epochs", cycle_epochs, least=1e-6),
        }
        super().__init__(start, end, config)

    def value_at(self, position: float) -> float | None:
        kind, init, final, cycle = (self._config[key] for key in ("lr_func", "init_lr", "final_lr", "cycle_epochs"))
        return rates.function_value(kind, position, init, final, self._start, self._end, cycle)


class LearningRateSchedule(LearningRateCallback):
    """Sets the learning rate as one of PyTorch's schedules does that is stepped once an epoch.

    Epochs are counted from `start_epoch`. From `end_epoch` on the rate stays what it was.

        >>> steps = kw.LearningRateSchedule("StepLR", {"step_size": 2, "gamma": 0.5}, init_lr=0.4)
        >>> [steps.value_at(position) for position in (0, 1.5, 2, 4)]
        [0.4, 0.4, 0.2, 0.1]

    Args:
        lr_class: `"StepLR"`, `"MultiStepLR"`, `"ExponentialLR"` or `"CosineAnnealingWarmRestarts"`.
        lr_kwargs: Its arguments: `step_size` and `gamma` (0.1), `milestones` and `gamma` (0.1), `gamma`, or `T_0`,
            `T_mult` (1) and `eta_min` (0).
        init_lr: The rate at `start_epoch`.
        start_epoch: Position in epochs, fractions allowed; 0 or -1 means at once.
        end_epoch: Position in epochs; -1 means the end of training.

    Raises:
        ValueError, TypeError: If an argument is out of range, or, before the first batch, if the optimizer's rate is
            a schedule.
    """

    def __init__(
        self,
        lr_class: str,
        lr_kwargs: Mapping[str, Any],
        init_lr: float,
        start_epoch: float = 0.0,
        end_epoch: float = -1.0,
    ):
        start = start_of(start_epoch)
        end = end_of(end_epoch, start)
        self._class = one_of("lr_class", lr_class, tuple(rates.SCHEDULES))
        self._settings = rates.checked_settings(lr_class, lr_kwargs)
        self._init = finite_float32("init_lr", init_lr, above=0.0)
        chosen = {"lr_class": lr_class, "lr_kwargs": self._settings, "init_lr": self._init}
        super().__init__(start, end, chosen | {"start_epoch": float(start_epoch), "end_epoch": float(end_epoch)})

    def value_at(self, position: float) -> float | None:
        return rates.schedule_value(self._class, self._settings, position, self._init, self._start, self._end)
