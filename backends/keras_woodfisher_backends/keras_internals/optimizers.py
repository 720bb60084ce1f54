"""Private parts of optimizers: the variables that they train, what they keep for each, and their averages.

What replaces a list or a method of an optimizer is written past Keras's `__setattr__`, which would track it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import keras
from keras import ops

_ALL, _TRAINED, _INDICES = "_variables", "_trainable_variables", "_trainable_variables_indices"
_DECAYED = "_weight_decay_by_var_key"
"""Whether each variable decays: from 3.16 on settled when the optimizer is built."""

_AVERAGING = "_update_model_variables_moving_average"
MOVING_AVERAGES, GRADIENT_SUMS = "_model_variables_moving_average", "_accumulated_gradients"
"""Of `slot_lists`: the averages of weights (`use_ema`), and sums of gradients that weren't used yet."""

_LINEARS = "_linears"
"""Of `slot_lists` of Ftrl: what it computes weights from."""


def trained_variables(optimizer: Any) -> list[Any]:
    """The variables that a built optimizer updates, in its order."""
    return optimizer._trainable_variables


def step_counter(optimizer: Any) -> Any:
    """Counts all calls; `iterations` only those that update weights (`gradient_accumulation_steps`)."""
    return optimizer._iterations


def learning_rate_of(optimizer: Any) -> Any:
    """The learning rate as it was given: a variable of a number, a schedule, or a function."""
    return optimizer._learning_rate


def all_variables(optimizer: Any) -> list[Any]:
    """The list of the optimizer's own variables, which train steps carry and files hold; not a copy."""
    return vars(optimizer)[_ALL]


def set_all_variables(optimizer: Any, variables: list[Any]) -> None:
    """Replaces the list of `all_variables`."""
    vars(optimizer)[_ALL] = variables


def slot_lists(optimizer: Any) -> dict[str, list[Any]]:
    """The lists with one entry a trained variable: momentum, second moments, averages, sums of gradients."""
    count = len(trained_variables(optimizer))
    return {
        name: value
        for name, value in vars(optimizer).items()
        # The list of all variables may happen to have the right length, but isn't one entry a weight.
        if isinstance(value, list)
        and name not in (_ALL, _TRAINED)
        and len(value) == count > 0
        and all(slot is None or isinstance(slot, keras.Variable) for slot in value)
    }


def slots_of(optimizer: Any, variable: Any) -> list[tuple[Any, float]]:
    """What an optimizer keeps for one of the variables that it trains, in its shape, and the value it begins with."""
    index = optimizer._get_variable_index(variable)
    # Zero would divide zero by zero in Ftrl and Adagrad.
    begins = {"_accumulators": getattr(optimizer, "initial_accumulator_value", 0.0)}
    slots = [(slots[index], begins.get(name, 0.0)) for name, slots in slot_lists(optimizer).items()]
    return [
        (slot, begin)
        for slot, begin in slots
        if slot is not None and slot is not variable and slot.shape == variable.shape
    ]


def weight_slots(optimizer: Any) -> list[str]:
    """Of `slot_lists`, the averages of weights (`use_ema`), what begins as a copy of them, and what they come from."""
    lists = slot_lists(optimizer)
    own = {MOVING_AVERAGES, _LINEARS} if isinstance(optimizer, keras.optimizers.Ftrl) else {MOVING_AVERAGES}
    probe = keras.Variable([[1.0, -2.0], [3.0, -4.0]], name="probe")
    # An optimizer that can't be made again can't be asked.
    with suppress(TypeError, ValueError):
        fresh = type(optimizer).from_config(optimizer.get_config())
        fresh.build([probe])
        begun = {name: slots[0] for name, slots in slot_lists(fresh).items() if slots[0] is not None}
        own |= {name for name, slot in begun.items() if slot.shape == probe.shape and bool(ops.all(slot == probe))}
    return [name for name in lists if name in own]


def follow_change(optimizer: Any, names: Sequence[str], variable: Any, before: Any) -> None:
    """Has what an optimizer keeps of a weight follow a change that no step made.

    An average becomes the one of weights that had always been changed so, and so do slow weights of whatever kind;
    where a step computes weights from its state alone (Ftrl), that becomes the state of the new ones.

    Args:
        optimizer: A built optimizer that trains the variable.
        names: From `weight_slots`.
        variable: With its new value; what is zero now has zeros there.
        before: What it was.
    """
    index = optimizer._get_variable_index(variable)
    dtype = keras.backend.result_type(variable.dtype, "float32")
    old, new = ops.cast(before, dtype), ops.cast(variable, dtype)
    for name in names:
        slot = vars(optimizer)[name][index]
        if slot is None or slot.shape != variable.shape:
            continue
        value = _ftrl_linear(optimizer, index, new) if name == _LINEARS else ops.cast(slot, dtype) + new - old
        slot.assign(ops.where(new == old, ops.cast(slot, dtype), ops.where(new == 0, ops.zeros_like(new), value)))


def _ftrl_linear(ftrl: Any, index: int, weight: Any) -> Any:
    """The state from which Ftrl computes a weight (McMahan et al. 2013, algorithm 1, solved for z)."""
    rate, dtype = ops.cast(ftrl.learning_rate, weight.dtype), weight.dtype
    curvature = ops.power(ops.cast(ftrl._accumulators[index], dtype), -ftrl.learning_rate_power) / rate
    ridge = 2.0 * ftrl.l2_regularization_strength + ftrl.beta / rate
    return -weight * (curvature + ridge) - ftrl.l1_regularization_strength * ops.sign(weight)


def training_state(optimizer: Any) -> dict[str, Any]:
    """All that `train_only` replaces, for `restore`."""
    names = [name for name in (_TRAINED, _INDICES, _DECAYED) if name in vars(optimizer)]
    return {name: vars(optimizer)[name] for name in names} | slot_lists(optimizer)


def train_only(optimizer: Any, variables: list[Any], slots: Mapping[str, list[Any]]) -> None:
    """Has an optimizer train these variables.

    Args:
        optimizer: A built optimizer.
        variables: Some that it knows, or others.
        slots: The lists of `slot_lists`, for these variables.
    """
    new: dict[str, Any] = {_TRAINED: variables, **slots}
    new[_INDICES] = {optimizer._var_key(variable): index for index, variable in enumerate(variables)}
    if _DECAYED in vars(optimizer):
        decays = {optimizer._var_key(v): not optimizer._is_excluded_from_weight_decay(v) for v in variables}
        new[_DECAYED] = vars(optimizer)[_DECAYED] | decays
    vars(optimizer).update(new)


def restore(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Puts back what `training_state` found."""
    vars(optimizer).update(state)


def follow_averages(optimizer: Any, follow: Callable[[Any, Any], None]) -> None:
    """Calls `follow(variable, average)` for each variable after each update of its average (`use_ema`)."""
    vars(optimizer)[_AVERAGING] = partial(_average, optimizer, follow)


def unfollow_averages(optimizer: Any) -> None:
    """Gives the optimizer its own method back."""
    vars(optimizer).pop(_AVERAGING, None)


def _average(optimizer: Any, follow: Callable[[Any, Any], None], variables: Sequence[Any]) -> None:
    getattr(type(optimizer), _AVERAGING)(optimizer, variables)
    for variable, average in zip(variables, vars(optimizer)[MOVING_AVERAGES], strict=True):
        if average is not None:
            follow(variable, average)


def is_multi_optimizer(optimizer: Any) -> bool:
    """Whether it is a `MultiOptimizer`, which Keras has from 3.15 on."""
    return isinstance(optimizer, getattr(keras.optimizers, "MultiOptimizer", ()))


def is_for_torch_alone(module: str) -> bool:
    """Whether a module holds the optimizers that Keras uses on torch, which files saved there name."""
    return module.startswith("keras.src.backend.torch.")
