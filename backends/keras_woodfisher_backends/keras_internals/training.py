"""Private parts of `fit`: where it begins, the callbacks it calls, their backups, and the state it carries on JAX.

On JAX a step's values live in lists that `fit` hands from step to step, while the variables are empty.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import keras

from keras_woodfisher_backends.keras_internals import RELEASE

_SAVE = "_save_model"
"""Method of `BackupAndRestore` that writes a backup."""

_OPTIMIZER = 2
"""Place of the optimizer's values in the state of a train step on JAX, as documented for custom ones."""


def undo_at_next_fit(model: keras.Model, undo: Callable[[], None]) -> None:
    """Calls `undo` when the next `fit` of a model begins, unless `forget` comes first.

    Keras tells a callback nothing when `fit` ends with an exception, so that masks, gradient buffers and hooks stay.
    """
    _hook_of(model).undos.append(undo)


def undo_where_refused(model: keras.Model, undo: Callable[[], None]) -> None:
    """Calls `undo` where `undo_now` is called, unless `forget` comes first; the next `fit` forgets it.

    For changes of weights that aren't to stay where another callback refuses the training.
    """
    _hook_of(model).where_refused.append(undo)


def forget(model: keras.Model, undo: Callable[[], None]) -> None:
    """Takes `undo` off the lists; without any left the model is a stock model again."""
    hook = vars(model).get("fit")
    if isinstance(hook, _Fit):
        hook.undos = [known for known in hook.undos if known != undo]
        hook.where_refused = [known for known in hook.where_refused if known != undo]
        if not hook.undos and not hook.where_refused:
            hook.give_back()


def undo_now(model: keras.Model) -> None:
    """Undoes at once what the next `fit` of a model would, and more; on JAX its variables must be up to date."""
    hook = vars(model).get("fit")
    if isinstance(hook, _Fit):
        hook.undo()
        # The last change first, as one may have followed another.
        for undo in reversed(hook.where_refused):
            undo()
            forget(model, undo)


class _Fit:
    """A model's `fit` that first undoes what an interrupted one left, unless it is called within another."""

    def __init__(self, model: keras.Model, own: Callable[..., Any] | None):
        self._model = model
        self._own = own
        self.undos: list[Callable[[], None]] = []
        self.where_refused: list[Callable[[], None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not fits_of(self._model):
            self.undo()
            for undo in self.where_refused:
                forget(self._model, undo)
        return (self._own or partial(type(self._model).fit, self._model))(*args, **kwargs)

    def undo(self) -> None:
        for undo in list(self.undos):
            undo()

    def give_back(self) -> None:
        """Takes this hook off the model, which may have had a `fit` of its own."""
        vars(self._model).pop("fit")
        if self._own is not None:
            vars(self._model)["fit"] = self._own


def _hook_of(model: keras.Model) -> _Fit:
    hook = vars(model).get("fit")
    if not isinstance(hook, _Fit):
        # Past Keras's __setattr__, which would track it.
        hook = vars(model)["fit"] = _Fit(model, hook)
    return hook


def several_steps_are_possible() -> bool:
    """Whether `fit` may run several steps in one execution, which Keras refuses on torch before 3.16."""
    return keras.backend.backend() != "torch" or RELEASE >= (3, 16)


def refresh(callback: keras.callbacks.Callback) -> keras.Model:
    """A callback's model, whose variables are brought up to date on JAX."""
    return callback.model


@contextmanager
def leaving_nothing(callback: keras.callbacks.Callback) -> Iterator[None]:
    """If the work within fails, all that this package put into a callback's model is taken out again.

    Keras tells a callback nothing when `fit` ends with an exception: neither this one, nor others that stand beside it.
    """
    try:
        yield
    except BaseException:
        undo_now(refresh(callback))
        raise


def model_of(callback: keras.callbacks.Callback) -> keras.Model:
    """A callback's model as it is: amid an epoch on JAX its variables are empty, which costs nothing."""
    return callback._model


def without_model(state: dict[str, Any]) -> dict[str, Any]:
    """A callback's attributes with those that Keras sets as they are before any `fit`."""
    return {**state, "params": None, "_model": None}


def keeps_state_elsewhere(model: keras.Model) -> bool:
    """Whether a loop of the user's own trains a model on JAX: only what it puts back is in the model's variables."""
    return keras.backend.backend() == "jax" and not fits_of(model)


def fits_of(model: keras.Model) -> int:
    """How many calls of a model's `fit` are running, each within the one before."""
    return sum(f.f_code.co_name == "fit" and f.f_locals.get("self") is model for f in callers())


def traces_constants() -> bool:
    """Whether a compiled step takes variables that it doesn't carry as they were when it was traced."""
    return keras.backend.backend() == "jax"


def keep_edits(model: keras.Model) -> None:
    """Makes edits between two batches last on JAX, where a step that finds no more data puts the old state back."""
    if getattr(model, "_jax_state", None):
        kinds = ("trainable_variables", "non_trainable_variables", "metrics_variables")
        state = {kind: [v.value for v in getattr(model, kind)] for kind in kinds}
        model._jax_state = state | {"optimizer_variables": [v.value for v in model.optimizer.variables]}


def assign_between_steps(model: keras.Model, variable: Any, value: float) -> None:
    """Assigns one variable of a model's optimizer; the next step of `fit` uses the new value.

    Bringing all variables up to date on JAX for the sake of one number can cost more than a step does, so the number is
    changed in the list, where that can be found.
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
        # It lost its prefix in 3.16.
        (getattr(model, "state_sync", None) or model.jax_state_sync)()


def _live_values(model: keras.Model) -> list[Any] | None:
    """The optimizer's values that JAX's `fit` is about to hand to the next step."""
    for frame in callers():
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is model:
            state = frame.f_locals.get("state")
            values = state[_OPTIMIZER] if isinstance(state, tuple) and len(state) > _OPTIMIZER else None
            return values if isinstance(values, list) else None
    return None


def before_backups(backup: keras.callbacks.BackupAndRestore, call: Callable[[], None]) -> None:
    """Calls `call` right before each backup, instead of what was to be called before."""
    vars(backup)[_SAVE] = partial(_save, backup, call)


def stock_backups(backup: keras.callbacks.BackupAndRestore) -> None:
    """Makes it the callback that it was."""
    vars(backup).pop(_SAVE, None)


def _save(backup: Any, call: Callable[[], None]) -> None:
    call()
    getattr(type(backup), _SAVE)(backup)


def callbacks_beside(callback: keras.callbacks.Callback) -> tuple[list[Any], list[Any]]:
    """The callbacks before and after one in its list, while the list is calling it.

    Keras tells a callback nothing of the others; the list that calls it is found on the stack.
    """
    for frame in callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList) and callback in caller.callbacks:
            place = caller.callbacks.index(callback)
            return caller.callbacks[:place], caller.callbacks[place + 1 :]
    return [], []


def callers() -> Iterator[FrameType]:
    """The frames on the stack, from the one on that called the caller of this function."""
    here = inspect.currentframe()
    caller = here and here.f_back
    return _outward(caller and caller.f_back)


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame:
        yield frame
        frame = frame.f_back
