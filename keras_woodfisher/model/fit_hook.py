"""What a broken-off `fit` leaves in a model is taken out when the next one begins.

Keras tells a callback nothing when `fit` ends with an exception, so that masks, gradient buffers and hooks stay behind.
"""

from collections.abc import Callable
from typing import Any

import keras

_HOOK = "_assert_compile_called"
"""What every backend's `fit` calls first, with its own name."""


def undo_at_next_fit(model: keras.Model, undo: Callable[[], None]) -> None:
    """Calls `undo` when the next `fit` of a model begins, unless `forget` comes first."""
    hook = vars(model).get(_HOOK)
    if hook is None:
        # Past Keras's __setattr__, which would track it.
        hook = vars(model)[_HOOK] = _Beginning(model)
    hook.undos.append(undo)


def forget(model: keras.Model, undo: Callable[[], None]) -> None:
    """Takes `undo` off the list; without any left the model is a stock model again."""
    hook = vars(model).get(_HOOK)
    if hook is None:
        return
    hook.undos = [known for known in hook.undos if known != undo]
    if not hook.undos:
        vars(model).pop(_HOOK)


class _Beginning:
    def __init__(self, model: keras.Model):
        self._model = model
        self.undos: list[Callable[[], None]] = []

    def __call__(self, method_name: str | None = None) -> Any:
        if method_name == "fit":
            for undo in list(self.undos):
                undo()
        return getattr(type(self._model), _HOOK)(self._model, method_name)
