"""Callbacks that can be copied and pickled at any time, as tuners and model selection do."""

import copy
from typing import Any

import keras
from keras_woodfisher_backends.keras_internals.training import without_model


class CopiedUnused(keras.callbacks.Callback):
    """A callback of which copies are unused: they have what it was given, and nothing of a model or a training run."""

    _given: dict[str, Any] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        if self._given is None:
            self._given = self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self)) if self._given is None else self._given
        return without_model(state) | {"_given": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo.update({id(shared): shared for shared in self._shared()})
        new = copy.copy(self)
        new.__dict__.update(copy.deepcopy(new.__dict__, memo))
        return new

    def _shared(self) -> list[Any]:
        """What copies share: data may be large, or can't be copied."""
        return []
