"""Has a built optimizer train other variables than those it was built for.

Keras fixes an optimizer's variables when it is built: JAX refuses a train step with others, moving averages are kept
in one list for all of them, and a variable that was frozen then is unknown. Here an optimizer's lists are exchanged
for ones of the variables to train now. Its own variables stay the same, so a file saved meanwhile holds all state.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.optimizers import (
    GRADIENT_SUMS,
    MOVING_AVERAGES,
    is_multi_optimizer,
    restore,
    slot_lists,
    train_only,
    trained_variables,
    training_state,
)

from keras_woodfisher.model.optimizer_variables import HiddenVariables, built_optimizer, inner_optimizer, parts_of


def check_growth(model: keras.Model, variables: Sequence[Any]) -> None:
    """Refuses variables for which an optimizer can't get state.

    Raises:
        ValueError: If a `MultiOptimizer` doesn't know them.
    """
    optimizer = model.optimizer
    if is_multi_optimizer(inner_optimizer(optimizer)):
        known = {id(v) for v in (trained_variables(optimizer) if optimizer.built else model.trainable_variables)}
        _refuse([v for v in variables if id(v) not in known])


def _refuse(unknown: Sequence[Any]) -> None:
    if unknown:
        raise ValueError(
            f"{unknown[0].path!r} was frozen when the MultiOptimizer was built, which can't take up more "
            "variables. Compile the model while it is trainable, and freeze it with "
            "TrainableParams(trainable=False, end_epoch=...)."
        )


class OptimizerSlots:
    """The lists of variables, and of slots for them, of a model's optimizer, of what it wraps and of its parts.

    Args:
        model: A built model that is compiled.
        extra: Variables that will be trained though the optimizer may not know them; it gets state for them.

    Raises:
        ValueError: If the optimizer can't get state for them.
    """

    def __init__(self, model: keras.Model, extra: Sequence[Any]):
        optimizer = built_optimizer(model)
        inner = inner_optimizer(optimizer)
        holders = list({id(o): o for o in (optimizer, inner, *parts_of(inner))}.values())
        self._slots = [_Slots(holder) for holder in holders if holder.built]
        self._hidden = HiddenVariables.of(optimizer)
        self._added: list[Any] = []
        known = {id(v) for v in trained_variables(optimizer)}
        unknown = [v for v in extra if id(v) not in known]
        if unknown:
            self._grow(inner, unknown)

    def show(self, variables: Sequence[Any]) -> None:
        """Has the optimizer train these variables, in their order."""
        for part in self._slots:
            part.show(variables)

    def restore(self) -> None:
        """Makes it the optimizer that it was."""
        for part in self._slots:
            part.restore()
        self._hidden.remove(self._added)

    def _grow(self, inner: Any, unknown: list[Any]) -> None:
        if is_multi_optimizer(inner):
            _refuse(unknown)
        # As another optimizer of its kind would begin.
        fresh = type(inner).from_config(inner.get_config())
        fresh.build(unknown)
        slots = slot_lists(fresh)
        for index, variable in enumerate(unknown):
            own = {name: self._hide(values[index]) for name, values in slots.items()}
            for part in self._slots:
                part.add(variable, own if part.optimizer is inner else {})

    def _hide(self, slot: Any) -> Any:
        """A variable with a slot's value that saved files leave out, as they do for one that is frozen."""
        if slot is None:
            return None
        hidden = self._hidden.add(tuple(slot.shape), slot.dtype, "slot")
        hidden.assign(slot)
        self._added.append(hidden)
        return hidden


class _Slots:
    """One optimizer's variables with the state that it keeps for each."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        lists = slot_lists(optimizer)
        self._names = set(lists)
        self._stock = training_state(optimizer)
        self._slots = {
            id(v): {name: values[i] for name, values in lists.items()}
            for i, v in enumerate(trained_variables(optimizer))
        }

    def add(self, variable: Any, slots: dict[str, Any]) -> None:
        """Takes up a variable."""
        self._slots[id(variable)] = slots
        for name in slots.keys() - self._names:
            self._names.add(name)
            self._stock[name] = vars(self.optimizer)[name]

    def show(self, variables: Sequence[Any]) -> None:
        mine = [v for v in variables if id(v) in self._slots]
        present = {id(v) for v in trained_variables(self.optimizer)}
        for variable in mine:
            if id(variable) not in present:
                _begin(variable, self._slots[id(variable)])
        slots = {name: [self._slots[id(v)][name] for v in mine] for name in self._names}
        train_only(self.optimizer, mine, slots)

    def restore(self) -> None:
        restore(self.optimizer, self._stock)


def _begin(variable: Any, slots: dict[str, Any]) -> None:
    """What is stale after steps without a variable: averages of weights, and sums of gradients that weren't used."""
    if slots.get(MOVING_AVERAGES) is not None:
        # A copy: JAX refuses a step that is handed one array twice.
        slots[MOVING_AVERAGES].assign(keras.ops.copy(variable))
    if slots.get(GRADIENT_SUMS) is not None:
        slots[GRADIENT_SUMS].assign(np.zeros(slots[GRADIENT_SUMS].shape))
