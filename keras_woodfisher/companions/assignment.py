"""Changing an optimizer's variable between two steps, without slowing the steps down."""

import sys
from types import FrameType
from typing import Any

import keras

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
