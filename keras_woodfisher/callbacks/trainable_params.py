"""A callback that freezes and unfreezes variables, and the schedule that several of one `fit` share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.training import (
    callbacks_beside,
    forget,
    keep_edits,
    leaving_nothing,
    model_of,
    refresh,
    undo_at_next_fit,
)
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.callbacks.epoch_callback import TOLERANCE, ScheduledCallback, end_of, start_of
from keras_woodfisher.callbacks.resuming import ResumableCallback
from keras_woodfisher.callbacks.woodfisher_pruning import WoodFisherPruning
from keras_woodfisher.model.optimizer_variables import OptimizerSlots, check_growth
from keras_woodfisher.model.targets import ALL, Target, all_targets, holds_keyword, named_targets
from keras_woodfisher.options.checks import flag, names

_ATTRIBUTE = "_keras_woodfisher_trainable_schedule"


@dataclass(frozen=True, eq=False)
class TrainablePeriod:
    """From `start` to `end`, in epochs, some variables are trained or not."""

    variables: Sequence[Any]
    trainable: bool
    start: float
    end: float

    def holds(self, position: float) -> bool:
        """Whether it says something at a position."""
        return self.start - TOLERANCE <= position < self.end - TOLERANCE


class TrainableSchedule:
    """Carries out the periods for one model. Use `TrainableSchedule.of(model)`.

    Of periods for one variable, the one that began last holds; without any, the variable is what it was.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self.periods: list[TrainablePeriod] = []
        self._carried_out: list[TrainablePeriod] | None = []
        self._found: dict[int, tuple[Any, bool]] = {}
        self._slots: OptimizerSlots | None = None

    @classmethod
    def of(cls, model: keras.Model) -> "TrainableSchedule":
        """The one instance that a model has."""
        known = vars(model).get(_ATTRIBUTE)
        if known is None:
            # Past Keras's __setattr__, which would track it.
            known = vars(model)[_ATTRIBUTE] = cls(model)
            undo_at_next_fit(model, known.detach)
        return known

    def join(self, period: TrainablePeriod) -> None:
        """Adds a period before training."""
        self.periods.append(period)
        self.periods.sort(key=lambda p: p.start)
        for variable in period.variables:
            self._found.setdefault(id(variable), (variable, variable.trainable))

    def leave(self, period: TrainablePeriod) -> None:
        """Takes a period away; after the last one the model and its optimizer are what they were."""
        self.periods = [known for known in self.periods if known is not period]
        if not self.periods:
            self.detach()

    def prepare(self) -> None:
        """Has the optimizer ready for whatever will be trained.

        Raises:
            ValueError: If it can't be.
        """
        if self._slots is None:
            wanted = {id(v) for period in self.periods if period.trainable for v in period.variables}
            extra = [v for v in self._model.variables if v.trainable or id(v) in wanted]
            self._slots = OptimizerSlots(self._model, extra)
            if self._slots.added:
                # With `keras.distribution` a step is made for so many variables.
                self._model.make_train_function(force=True)

    def trainable_at(self, variable: Any, position: float) -> bool:
        """Whether a variable is trained at a position."""
        found = self._found.get(id(variable), (variable, variable.trainable))
        wanted = [p.trainable for p in self.periods if p.holds(position) and any(v is variable for v in p.variables)]
        return wanted[-1] if wanted else found[1]

    def frozen_at(self, variable: Any, start: float, end: float) -> float | None:
        """Where a variable isn't trained between two positions, the end excluded unless it is the start; or None."""
        edges = (edge for period in self.periods for edge in (period.start, period.end))
        positions = [start, *(edge for edge in edges if start < edge < end)]
        return next((p for p in positions if not self.trainable_at(variable, p)), None)

    def due(self, position: float, unfreeze_only: bool = False) -> list[tuple[Any, bool]]:
        """The variables to change at a position, with what they become."""
        periods = [period for period in self.periods if period.holds(position)]
        if periods == self._carried_out:
            return []
        wanted = [(v, self.trainable_at(v, position)) for v, _ in self._found.values()]
        if unfreeze_only:
            return [(v, True) for v, value in wanted if value and not v.trainable]
        self._carried_out = periods
        return [(v, value) for v, value in wanted if v.trainable != value]

    def change(self, changes: Sequence[tuple[Any, bool]], as_they_are: bool = False) -> None:
        """Freezes and unfreezes variables between two steps (see `OptimizerSlots.show`); on JAX after `refresh`."""
        self.prepare()
        assert self._slots is not None
        for variable, value in changes:
            variable.trainable = value
        self._slots.show(self._model.trainable_variables, as_they_are)
        self._rebuild()
        self._model.make_train_function(force=True)
        keep_edits(self._model)

    def knowledge(self) -> dict[str, np.ndarray]:
        """What training that goes on has to know: what is trained, and state that files leave out."""
        trained = np.array([variable.trainable for variable, _ in self._found.values()])
        slots = [] if self._slots is None else self._slots.added
        return {"trained": trained} | {f"slot_{n}": keras.ops.convert_to_numpy(v) for n, v in enumerate(slots)}

    def go_on(self, known: Mapping[str, np.ndarray]) -> None:
        """Takes over what an earlier run knew."""
        pairs = zip(self._found.values(), known["trained"].tolist(), strict=True)
        self.change([(variable, now) for (variable, _), now in pairs if variable.trainable != now], as_they_are=True)
        assert self._slots is not None
        for number, slot in enumerate(self._slots.added):
            slot.assign(known[f"slot_{number}"])
        self._carried_out = None

    def detach(self) -> None:
        """Gives everything back; on JAX the variables must be up to date."""
        vars(self._model).pop(_ATTRIBUTE, None)
        forget(self._model, self.detach)
        changed = [(v, value) for v, value in self._found.values() if v.trainable != value]
        for variable, value in changed:
            variable.trainable = value
        if self._slots is not None:
            self._slots.restore()
            self._slots = None
            self._rebuild()

    def _rebuild(self) -> None:
        # On JAX, each has the split into trainable variables and others built in.
        self._model.train_function = self._model.test_function = self._model.predict_function = None


class TrainableParams(ScheduledCallback):
    """Freezes or unfreezes variables from `start_epoch` to `end_epoch`.

    A frozen variable is exactly unchanged by training, weight decay and averages included, and keeps its state in the
    optimizer. At `end_epoch`, and in any case when training ends, variables get back the `trainable` that they had,
    so that the model is left as it was. Where several of these callbacks name one variable, the one that began last
    holds. Each change has the train step compiled anew.

    Layers stay what they are: a BatchNormalization of a frozen layer (`layer.trainable = False`) uses its moving
    averages whatever its weights do. A variable that the optimizer didn't know gets fresh state when training begins,
    which the model's files leave out; `BackupAndRestore` and `BackupPruning` keep it for training that goes on.

        >>> before = model.get_layer("hidden").get_weights()
        >>> frozen = kw.TrainableParams(["re:hidden/.*"], trainable=False)
        >>> history = model.fit(x, y, callbacks=[frozen], verbose=0)
        >>> all((new == old).all() for new, old in zip(model.get_layer("hidden").get_weights(), before))
        True

    Args:
        params: `"__ALL__"` (every weight, biases and normalisation included), or names and `re:` patterns.
        trainable: Whether they are trained meanwhile.
        start_epoch: Position in epochs, fractions allowed; 0 or -1 means at once.
        end_epoch: Position in epochs; -1 means the end of training.

    Raises:
        ValueError, TypeError: If an argument is out of range, or, before the first batch, if the variables can't be
            trained, or are to be pruned while they are frozen.
        KeyError: Before the first batch, if a name matches no variable.
    """

    def __init__(
        self,
        params: str | Sequence[str] = ALL,
        trainable: bool = True,
        start_epoch: float = 0.0,
        end_epoch: float = -1.0,
    ):
        self._params_wanted = names("params", params)
        self._value = flag("trainable", trainable)
        self._start = start_of(start_epoch)
        self._end = end_of(end_epoch, self._start)
        positions = {"start_epoch": float(start_epoch), "end_epoch": float(end_epoch)}
        super().__init__({"params": self._params_wanted, "trainable": trainable} | positions)
        self._schedule: TrainableSchedule | None = None
        self._pruning: list[WoodFisherPruning] = []
        self._period: TrainablePeriod | None = None
        self._checked = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        with current_ranks().together(f"{type(self).__name__}, epoch {epoch}"), leaving_nothing(self):
            self._check()
            if self._known and self._schedule is not None:
                self._schedule.go_on(self._known)
            self._known = None
            # Early, so that a pruning callback finds trained what it prunes at the first batch.
            self._change(float(epoch), unfreeze_only=True)

    def on_train_end(self, logs: Any = None) -> None:
        refresh(self)
        ResumableCallback.on_train_end(self, logs)
        if self._schedule is not None and self._period is not None:
            self._schedule.leave(self._period)
        self._schedule = None

    def identity(self) -> dict[str, Any]:
        variables = () if self._period is None else self._period.variables
        return {**self._config, "params": None, "variables": [list(variable.shape) for variable in variables]}

    def knowledge(self) -> dict[str, np.ndarray]:
        schedule = self._schedule
        return schedule.knowledge() if schedule is not None and schedule.periods[0] is self._period else {}

    def check(self, model: keras.Model) -> None:
        super().check(model)
        chosen = self._chosen(model)
        if self._value and chosen and not model.trainable:
            raise ValueError(
                f"{chosen[0].name!r} can't be trained, since the model as a whole is frozen (model.trainable is "
                "False). Set model.trainable = True, and freeze its layers instead."
            )
        check_growth(model, [t.variable for t in chosen] if self._value else [])

    def _prepare(self) -> None:
        chosen = self._chosen(model_of(self))
        self._schedule = TrainableSchedule.of(model_of(self))
        self._period = TrainablePeriod([t.variable for t in chosen], self._value, self._start, self._end)
        self._schedule.join(self._period)
        before, after = callbacks_beside(self)
        self._pruning = [c for c in [*before, *after] if isinstance(c, WoodFisherPruning)]
        self._checked = False

    def _chosen(self, model: keras.Model) -> list[Target]:
        everything = all_targets(model)
        params = self._params_wanted
        if holds_keyword(params, ALL):
            return [t for t in everything if not _quantised(t)]
        chosen = named_targets(everything, params)
        if not chosen:
            raise ValueError(f"params={params!r} names no variable. Write {ALL!r} for all of them.")
        for target in chosen:
            if _quantised(target):
                raise ValueError(
                    f"{target.name!r} belongs to a quantised layer ({target.layer.quantization_mode}), which can't "
                    "be trained. Leave it out of `params`."
                )
        return chosen

    def _check(self) -> None:
        """What can be known only when every callback of the list has prepared itself, before the first batch."""
        if self._schedule is None or self._checked:
            return
        self._checked = True
        refresh(self)
        self._schedule.prepare()
        for callback in self._pruning:
            _refuse_pruning_of_frozen(callback, self._schedule)

    def _apply(self, position: float) -> None:
        self._check()
        self._change(position)

    def _change(self, position: float, unfreeze_only: bool = False) -> None:
        if self._schedule is None:
            return
        changes = self._schedule.due(position, unfreeze_only)
        if changes:
            refresh(self)
            self._schedule.change(changes)


def _quantised(target: Target) -> bool:
    return getattr(target.layer, "quantization_mode", None) is not None


def _refuse_pruning_of_frozen(callback: WoodFisherPruning, schedule: TrainableSchedule) -> None:
    task = callback.run.task
    # Without data, gradients are collected from the first step on.
    start, end = 0.0 if task.buffers else task.schedule.start, task.schedule.end
    for target in callback.run.targets:
        frozen = schedule.frozen_at(target.variable, start, end)
        if frozen is not None:
            raise ValueError(
                f"{target.name!r} is frozen at epoch {frozen:g} by TrainableParams, while WoodFisherPruning "
                f"{'collects its gradients or ' if task.buffers else ''}prunes it from epoch "
                f"{start:g} to {end:g}. Freeze it at other times, or put it in `exclude`."
            )
