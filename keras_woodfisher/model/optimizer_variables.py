"""An optimizer's lists of variables: hidden ones that ride along, and which weights it trains.

Keras carries an optimizer's variables through the compiled train step on every backend, which is where masks and the
gradient buffer have to live. A file saved meanwhile must look as if they weren't there: extra variables would make a
loader skip the optimizer's state.

Keras also fixes an optimizer's variables when it is built: JAX refuses a train step with others, moving averages are
kept in one list for all of them, and a variable that was frozen then is unknown. `OptimizerSlots` exchanges these lists
for ones of the variables to train now. The optimizer's own variables stay the same, so a file saved meanwhile holds all
state.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals import optimizers as internals
from keras_woodfisher_backends.keras_internals.engines import engine_scope, riding_variable

_ATTRIBUTE = "_keras_woodfisher_hidden"
_SAVING = ("save_own_variables", "load_own_variables")
_SHOWING = ("summary", "get_state_tree")
"""Of a model: what tells of its optimizer's variables."""


class HiddenVariables:
    """The hidden variables of a model's optimizer. Use `HiddenVariables.of(model)`.

    They belong to the inner optimizer, where there is one: on the outer `LossScaleOptimizer` they would be cut
    off from the step inside its conditional.
    """

    def __init__(self, model: keras.Model):
        optimizer = model.optimizer
        self._model = model
        self.optimizer = inner_optimizer(optimizer)
        self._holders = list({id(o): o for o in (optimizer, self.optimizer)}.values())
        # One that the user put in place stays.
        own = [name for name in _SHOWING if name not in vars(model)]
        self._hiding = [*((holder, _SAVING) for holder in self._holders), (model, own)]
        # Never touched: TensorFlow can't export a list of its own from which something was taken.
        self._stock = internals.all_variables(self.optimizer)
        self._variables: list[Any] = []
        self._added = 0

    @classmethod
    def of(cls, model: keras.Model) -> "HiddenVariables":
        """The one instance that a compiled model's optimizer has, which is built."""
        hidden = vars(built_optimizer(model)).get(_ATTRIBUTE)
        return cls(model) if hidden is None else hidden

    def add(self, shape: tuple[int, ...], dtype: str, name: str, weight: Any = None) -> Any:
        """Creates a variable of zeros that the train step carries and saving leaves out; see `riding_variable`."""
        if not self._variables:
            # Past Keras's __setattr__, which would track them.
            for holder in self._holders:
                vars(holder)[_ATTRIBUTE] = self
            for owner, methods in self._hiding:
                for method in methods:
                    vars(owner)[method] = partial(self._without, owner, method)
        # `Model.get_state_tree` wants names that are unique.
        name = f"keras_woodfisher_{name}_{self._added}"
        variable = riding_variable(self._model, shape, dtype, name, weight)
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
                vars(holder).pop(_ATTRIBUTE, None)
            for owner, methods in self._hiding:
                for method in methods:
                    vars(owner).pop(method, None)

    def _show(self) -> None:
        internals.set_all_variables(
            self.optimizer, [*self._stock, *self._variables] if self._variables else self._stock
        )

    def _without(self, owner: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """The own method of an optimizer or model, run while the hidden variables are out of the optimizer's list."""
        internals.set_all_variables(self.optimizer, self._stock)
        try:
            return getattr(type(owner), method)(owner, *args, **kwargs)
        finally:
            self._show()


def check_compiled(model: keras.Model, callback: str) -> None:
    """Refuses a model without an optimizer; `callback` is what it is to be trained with.

    Raises:
        ValueError: If the model isn't compiled with one.
    """
    if not getattr(model, "compiled", False) or model.optimizer is None:
        raise ValueError(
            f"The model must be compiled with an optimizer before training with {callback}: "
            "call model.compile(optimizer=..., loss=...)."
        )


def built_optimizer(model: keras.Model) -> Any:
    """The optimizer of a compiled model, with its variables: TensorFlow's trainer would build it at the first step."""
    if not model.optimizer.built:
        with engine_scope(model):
            model.optimizer.build(model.trainable_variables)
    return model.optimizer


def inner_optimizer(optimizer: Any) -> keras.Optimizer:
    """The optimizer that updates the weights: the inner one of a `LossScaleOptimizer`."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def steps_of(model: keras.Model) -> int:
    """Steps that a compiled model's optimizer was called for, also those that only add up gradients."""
    return int(keras.ops.convert_to_numpy(internals.step_counter(inner_optimizer(built_optimizer(model)))))


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


def check_growth(model: keras.Model, variables: Sequence[Any]) -> None:
    """Refuses variables for which an optimizer can't get state.

    Raises:
        ValueError: If a `MultiOptimizer` doesn't know them.
    """
    optimizer = model.optimizer
    if internals.is_multi_optimizer(inner_optimizer(optimizer)):
        known = {
            id(v) for v in (internals.trained_variables(optimizer) if optimizer.built else model.trainable_variables)
        }
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
        self._hidden = HiddenVariables.of(model)
        self._model = model
        self._added: list[Any] = []
        known = {id(v) for v in internals.trained_variables(optimizer)}
        unknown = [v for v in extra if id(v) not in known]
        if unknown:
            self._grow(inner, unknown)

    def show(self, variables: Sequence[Any], as_they_are: bool) -> None:
        """Has the optimizer train these variables, in their order.

        Averages and sums of those that it didn't train begin anew, or stay `as_they_are`.
        """
        for part in self._slots:
            part.show(variables, as_they_are)

    @property
    def added(self) -> list[Any]:
        """The state of variables that the optimizer didn't know, which saved files leave out."""
        return list(self._added)

    def restore(self) -> None:
        """Makes it the optimizer that it was."""
        for part in self._slots:
            part.restore()
        self._hidden.remove(self._added)

    def _grow(self, inner: Any, unknown: list[Any]) -> None:
        if internals.is_multi_optimizer(inner):
            _refuse(unknown)
        # As another optimizer of its kind would begin.
        with engine_scope(self._model):
            fresh = type(inner).from_config(inner.get_config())
            fresh.build(unknown)
        slots = internals.slot_lists(fresh)
        for index, variable in enumerate(unknown):
            own = {name: self._hide(values[index]) for name, values in slots.items()}
            for part in self._slots:
                part.add(variable, own if part.optimizer is inner else {})

    def _hide(self, slot: Any) -> Any:
        """A variable with a slot's value that saved files leave out, as they do for one that is frozen."""
        if slot is None:
            return None
        hidden = self._hidden.add(tuple(slot.shape), slot.dtype, "slot", slot)
        hidden.assign(slot)
        self._added.append(hidden)
        return hidden


class _Slots:
    """One optimizer's variables with the state that it keeps for each."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        lists = internals.slot_lists(optimizer)
        self._names = set(lists)
        self._stock = internals.training_state(optimizer)
        self._slots = {
            id(v): {name: values[i] for name, values in lists.items()}
            for i, v in enumerate(internals.trained_variables(optimizer))
        }

    def add(self, variable: Any, slots: dict[str, Any]) -> None:
        """Takes up a variable."""
        self._slots[id(variable)] = slots
        for name in slots.keys() - self._names:
            self._names.add(name)
            self._stock[name] = vars(self.optimizer)[name]

    def show(self, variables: Sequence[Any], as_they_are: bool) -> None:
        mine = [v for v in variables if id(v) in self._slots]
        present = {id(v) for v in internals.trained_variables(self.optimizer)}
        for variable in mine:
            if id(variable) not in present and not as_they_are:
                _begin(variable, self._slots[id(variable)])
        slots = {name: [self._slots[id(v)][name] for v in mine] for name in self._names}
        internals.train_only(self.optimizer, mine, slots)

    def restore(self) -> None:
        internals.restore(self.optimizer, self._stock)


def _begin(variable: Any, slots: dict[str, Any]) -> None:
    """What is stale after steps without a variable: averages of weights, and sums of gradients that weren't used."""
    if slots.get(internals.MOVING_AVERAGES) is not None:
        # A copy: JAX refuses a step that is handed one array twice.
        slots[internals.MOVING_AVERAGES].assign(keras.ops.copy(variable))
    if slots.get(internals.GRADIENT_SUMS) is not None:
        slots[internals.GRADIENT_SUMS].assign(np.zeros(slots[internals.GRADIENT_SUMS].shape))
