"""Variables that ride along in an optimizer, and that no saved file ever shows.

Keras carries an optimizer's variables through the compiled train step on every backend, which is where masks and the
gradient buffer have to live. A file saved meanwhile must look as if they weren't there: extra variables would make a
loader skip the optimizer's state.
"""

from functools import partial
from typing import Any

import keras

_ATTRIBUTE = "_keras_woodfisher_hidden"
_SAVING = ("save_own_variables", "load_own_variables")


class HiddenVariables:
    """The hidden variables of one optimizer. Use `HiddenVariables.of(optimizer)`.

    They belong to the inner optimizer, where there is one: on the outer `LossScaleOptimizer` they would be cut
    off from the step inside its conditional.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = inner_optimizer(optimizer)
        self._holders = list({id(o): o for o in (optimizer, self.optimizer)}.values())
        self._variables: list[Any] = []

    @classmethod
    def of(cls, optimizer: Any) -> "HiddenVariables":
        """The one instance that an optimizer has."""
        hidden = vars(optimizer).get(_ATTRIBUTE)
        return cls(optimizer) if hidden is None else hidden

    def add(self, shape: tuple[int, ...], dtype: str, name: str) -> Any:
        """Creates a variable of zeros that the train step carries and saving leaves out."""
        if not self._variables:
            for holder in self._holders:
                # Past Keras's __setattr__, which would track them.
                vars(holder)[_ATTRIBUTE] = self
                for method in _SAVING:
                    vars(holder)[method] = partial(self._without, holder, method)
        variable = self.optimizer.add_variable(
            shape=shape, initializer="zeros", dtype=dtype, name=f"keras_woodfisher_{name}"
        )
        self._variables.append(variable)
        return variable

    def remove(self, variables: list[Any]) -> None:
        """Takes variables out of the optimizer; without any left it is a stock optimizer again."""
        gone = {id(v) for v in variables}
        for variable in self._variables:
            if id(variable) in gone:
                self.optimizer._untrack_variable(variable)
        self._variables = [v for v in self._variables if id(v) not in gone]
        if not self._variables:
            for holder in self._holders:
                for attribute in (_ATTRIBUTE, *_SAVING):
                    vars(holder).pop(attribute, None)

    def _without(self, holder: Any, method: str, store: Any) -> None:
        """The optimizer's own method, run while the hidden variables are out of its list."""
        tracked = self.optimizer._variables
        everything = list(tracked)
        ids = {id(v) for v in self._variables}
        tracked[:] = [v for v in everything if id(v) not in ids]
        try:
            getattr(type(holder), method)(holder, store)
        finally:
            tracked[:] = everything


def inner_optimizer(optimizer: Any) -> keras.Optimizer:
    """The optimizer that updates the weights: the inner one of a `LossScaleOptimizer`."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers that keep the state of weights: the parts of a `MultiOptimizer`, or the optimizer itself."""
    return list(getattr(optimizer, "optimizers", ())) or [optimizer]


def slots_of(optimizer: Any, variable: Any) -> list[Any]:
    """The optimizer's own variables for one weight: momentum, second moments, averages, accumulators."""
    optimizer = next(part for part in parts_of(optimizer) if any(v is variable for v in part._trainable_variables))
    index, count = optimizer._get_variable_index(variable), len(optimizer._trainable_variables)
    lists = [value for value in vars(optimizer).values() if isinstance(value, list)]
    slots = [value[index] for value in lists if len(value) == count]
    return [
        slot
        for slot in slots
        if isinstance(slot, keras.Variable) and slot is not variable and slot.shape == variable.shape
    ]
