"""Variables that ride along in an optimizer, and that no saved file ever shows.

Keras carries an optimizer's variables through the compiled train step on every backend, which is where masks and the
gradient buffer have to live. A file saved meanwhile must look as if they weren't there: extra variables would make a
loader skip the optimizer's state.
"""

from functools import partial
from typing import Any

import keras
from keras_woodfisher_backends.keras_internals import optimizers as internals

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
        # Never touched: TensorFlow can't export a list of its own from which something was taken.
        self._stock = internals.all_variables(self.optimizer)
        self._variables: list[Any] = []
        self._added = 0

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
        # `Model.get_state_tree` wants names that are unique.
        name = f"keras_woodfisher_{name}_{self._added}"
        variable = keras.Variable(initializer="zeros", shape=shape, dtype=dtype, trainable=False, name=name)
        self._variables.append(variable)
        self._added += 1
        self._show()
        return variable

    def remove(self, variables: list[Any]) -> None:
        """Takes variables out of the optimizer; without any left it is a stock optimizer again."""
        gone = {id(v) for v in variables}
        self._variables = [v for v in self._variables if id(v) not in gone]
        self._show()
        if not self._variables:
            for holder in self._holders:
                for attribute in (_ATTRIBUTE, *_SAVING):
                    vars(holder).pop(attribute, None)

    def _show(self) -> None:
        internals.set_all_variables(
            self.optimizer, [*self._stock, *self._variables] if self._variables else self._stock
        )

    def _without(self, holder: Any, method: str, store: Any) -> None:
        """The optimizer's own method, run while the hidden variables are out of its list."""
        internals.set_all_variables(self.optimizer, self._stock)
        try:
            getattr(type(holder), method)(holder, store)
        finally:
            self._show()


def built_optimizer(model: keras.Model) -> Any:
    """The optimizer of a compiled model, with its variables: TensorFlow's trainer would build it at the first step."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return model.optimizer


def inner_optimizer(optimizer: Any) -> keras.Optimizer:
    """The optimizer that updates the weights: the inner one of a `LossScaleOptimizer`."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers that keep the state of weights: the parts of a `MultiOptimizer`, or the optimizer itself."""
    return list(getattr(optimizer, "optimizers", ())) or [optimizer]


def slots_of(optimizer: Any, variable: Any) -> list[tuple[Any, float]]:
    """The optimizer's own variables for one weight (momentum, second moments, averages) and the values they begin with.

    None while the weight is frozen: no part trains it then.
    """
    parts = [part for part in parts_of(optimizer) if any(v is variable for v in internals.trained_variables(part))]
    if not parts:
        return []
    return internals.slots_of(parts[0], variable)
