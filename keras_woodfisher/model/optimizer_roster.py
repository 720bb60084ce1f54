"""Has a built optimizer train other variables than those it was built for.

Keras fixes an optimizer's variables when it is built: JAX refuses a train step with others, moving averages are kept
in one list for all of them, and a variable that was frozen then is unknown. Here an optimizer's lists are exchanged
for ones of the variables to train now. Its own variables stay the same, so a file saved meanwhile holds all state.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_woodfisher.model.optimizer_variables import HiddenVariables, built_optimizer, inner_optimizer, parts_of

_LIST, _INDICES = "_trainable_variables", "_trainable_variables_indices"


_NOT_SLOTS = ("_variables", _LIST)


_AVERAGES, _SUMS = "_model_variables_moving_average", "_accumulated_gradients"


def check_growth(model: keras.Model, variables: Sequence[Any]) -> None:
    """Refuses variables for which an optimizer can't get state.

    Raises:
        ValueError: If a `MultiOptimizer` doesn't know them.
    """
    optimizer = model.optimizer
    if isinstance(inner_optimizer(optimizer), keras.optimizers.MultiOptimizer):
        known = {id(v) for v in (optimizer._trainable_variables if optimizer.built else model.trainable_variables)}
        _refuse([v for v in variables if id(v) not in known])


def _refuse(unknown: Sequence[Any]) -> None:
    if unknown:
        raise ValueError(
            f"{unknown[0].path!r} was frozen when the MultiOptimizer was built, which can't take up more "
            "variables. Compile the model while it is trainable, and freeze it with "
            "TrainableParams(trainable=False, end_epoch=...)."
        )


class Rosters:
    """The rosters of a model's optimizer, of what it wraps and of its parts.

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
        self._rosters = [_Roster(holder) for holder in holders if holder.built]
        self._hidden = HiddenVariables.of(optimizer)
        self._added: list[Any] = []
        known = {id(v) for v in optimizer._trainable_variables}
        unknown = [v for v in extra if id(v) not in known]
        if unknown:
            self._grow(inner, unknown)

    def show(self, variables: Sequence[Any]) -> None:
        """Has the optimizer train these variables, in their order."""
        for roster in self._rosters:
            roster.show(variables)

    def restore(self) -> None:
        """Makes it the optimizer that it was."""
        for roster in self._rosters:
            roster.restore()
        self._hidden.remove(self._added)

    def _grow(self, inner: Any, unknown: list[Any]) -> None:
        if isinstance(inner, keras.optimizers.MultiOptimizer):
            _refuse(unknown)
        # As another optimizer of its kind would begin.
        fresh = type(inner).from_config(inner.get_config())
        fresh.build(unknown)
        slots = _slot_lists(fresh, len(unknown))
        for index, variable in enumerate(unknown):
            own = {name: self._hide(values[index]) for name, values in slots.items()}
            for roster in self._rosters:
                roster.add(variable, own if roster.optimizer is inner else {})

    def _hide(self, slot: Any) -> Any:
        """A variable with a slot's value that saved files leave out, as they do for one that is frozen."""
        if slot is None:
            return None
        hidden = self._hidden.add(tuple(slot.shape), slot.dtype, "slot")
        hidden.assign(slot)
        self._added.append(hidden)
        return hidden


class _Roster:
    """One optimizer's variables with the state that it keeps for each."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        variables = optimizer._trainable_variables
        lists = _slot_lists(optimizer, len(variables))
        self._slots = {id(v): {name: values[i] for name, values in lists.items()} for i, v in enumerate(variables)}
        self._stock = {name: vars(optimizer)[name] for name in (_LIST, _INDICES, *lists)}

    def add(self, variable: Any, slots: dict[str, Any]) -> None:
        """Takes up a variable."""
        self._slots[id(variable)] = slots
        for name in slots:
            self._stock.setdefault(name, vars(self.optimizer)[name])

    def show(self, variables: Sequence[Any]) -> None:
        mine = [v for v in variables if id(v) in self._slots]
        present = {id(v) for v in self.optimizer._trainable_variables}
        for variable in mine:
            if id(variable) not in present:
                _begin(variable, self._slots[id(variable)])
        new: dict[str, Any] = {name: [self._slots[id(v)][name] for v in mine] for name in self._slot_names}
        new[_LIST] = mine
        new[_INDICES] = {self.optimizer._var_key(v): i for i, v in enumerate(mine)}
        # Past Keras's __setattr__, which would track them.
        vars(self.optimizer).update(new)

    def restore(self) -> None:
        vars(self.optimizer).update(self._stock)

    @property
    def _slot_names(self) -> list[str]:
        return [name for name in self._stock if name not in (_LIST, _INDICES)]


def _begin(variable: Any, slots: dict[str, Any]) -> None:
    """What is stale after steps without a variable: averages of weights, and sums of gradients that weren't used."""
    if slots.get(_AVERAGES) is not None:
        # A copy: JAX refuses a step that is handed one array twice.
        slots[_AVERAGES].assign(keras.ops.copy(variable))
    if slots.get(_SUMS) is not None:
        slots[_SUMS].assign(np.zeros(slots[_SUMS].shape))


def _slot_lists(optimizer: Any, count: int) -> dict[str, list[Any]]:
    """The lists with one entry a variable: momentum, second moments, averages, sums of gradients."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, list)
        and name not in _NOT_SLOTS
        and len(value) == count > 0
        and all(slot is None or isinstance(slot, keras.Variable) for slot in value)
    }
