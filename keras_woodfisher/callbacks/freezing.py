"""Which of a model's variables are trained, as several callbacks of one `fit` want it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras_woodfisher_backends.keras_internals.training import forget, keep_edits, undo_at_next_fit

from keras_woodfisher.callbacks.epoch_callback import TOLERANCE
from keras_woodfisher.model.optimizer_slots import OptimizerSlots

_ATTRIBUTE = "_keras_woodfisher_participation"


@dataclass(frozen=True, eq=False)
class Plan:
    """From `start` to `end`, in epochs, some variables are trained or not."""

    variables: Sequence[Any]
    trainable: bool
    start: float
    end: float

    def holds(self, position: float) -> bool:
        """Whether it says something at a position."""
        return self.start - TOLERANCE <= position < self.end - TOLERANCE


class Participation:
    """Carries out the plans for one model. Use `Participation.of(model)`.

    Of plans for one variable, the one that began last holds; without any, the variable is what it was.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._plans: list[Plan] = []
        self._carried_out: list[Plan] = []
        self._found: dict[int, tuple[Any, bool]] = {}
        self._slots: OptimizerSlots | None = None

    @classmethod
    def of(cls, model: keras.Model) -> "Participation":
        """The one instance that a model has."""
        known = vars(model).get(_ATTRIBUTE)
        if known is None:
            # Past Keras's __setattr__, which would track it.
            known = vars(model)[_ATTRIBUTE] = cls(model)
            undo_at_next_fit(model, known.detach)
        return known

    def join(self, plan: Plan) -> None:
        """Adds a plan before training."""
        self._plans.append(plan)
        self._plans.sort(key=lambda p: p.start)
        for variable in plan.variables:
            self._found.setdefault(id(variable), (variable, variable.trainable))

    def leave(self, plan: Plan) -> None:
        """Takes a plan away; after the last one the model and its optimizer are what they were."""
        self._plans = [known for known in self._plans if known is not plan]
        if not self._plans:
            self.detach()

    def prepare(self) -> None:
        """Has the optimizer ready for whatever will be trained.

        Raises:
            ValueError: If it can't be.
        """
        if self._slots is None:
            wanted = {id(v) for plan in self._plans if plan.trainable for v in plan.variables}
            extra = [v for v in self._model.variables if v.trainable or id(v) in wanted]
            self._slots = OptimizerSlots(self._model, extra)

    def trainable_at(self, variable: Any, position: float) -> bool:
        """Whether a variable is trained at a position."""
        found = self._found.get(id(variable), (variable, variable.trainable))
        wanted = [p.trainable for p in self._plans if p.holds(position) and any(v is variable for v in p.variables)]
        return wanted[-1] if wanted else found[1]

    def frozen_at(self, variable: Any, start: float, end: float) -> float | None:
        """Where a variable isn't trained between two positions, the end excluded unless it is the start; or None."""
        edges = (edge for plan in self._plans for edge in (plan.start, plan.end))
        positions = [start, *(edge for edge in edges if start < edge < end)]
        return next((p for p in positions if not self.trainable_at(variable, p)), None)

    def due(self, position: float, unfreeze_only: bool = False) -> list[tuple[Any, bool]]:
        """The variables to change at a position, with what they become."""
        plans = [plan for plan in self._plans if plan.holds(position)]
        if plans == self._carried_out:
            return []
        wanted = [(v, self.trainable_at(v, position)) for v, _ in self._found.values()]
        if unfreeze_only:
            return [(v, True) for v, value in wanted if value and not v.trainable]
        self._carried_out = plans
        return [(v, value) for v, value in wanted if v.trainable != value]

    def change(self, changes: Sequence[tuple[Any, bool]]) -> None:
        """Freezes and unfreezes variables between two steps; on JAX they must be up to date."""
        self.prepare()
        assert self._slots is not None
        for variable, value in changes:
            variable.trainable = value
        self._slots.show(self._model.trainable_variables)
        self._rebuild()
        self._model.make_train_function(force=True)
        keep_edits(self._model)

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
