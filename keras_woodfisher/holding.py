"""Callbacks that hold zeros: what `KeepZeros` and `WoodFisherPruning` have in common."""

import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import keras
import numpy as np

from keras_woodfisher.enforcement import Enforcement
from keras_woodfisher.options import names
from keras_woodfisher.pruner import zeros_of
from keras_woodfisher.targets import Target, find_targets


class HoldingCallback(keras.callbacks.Callback):
    """Attaches masks when training begins, fills them before the first batch, and lets go at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._enforcement: Enforcement | None = None
        self._started = False
        self._released = False

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        _check_trainable_here(model)
        self._started = self._released = False
        targets = self._prepare(model)
        self._warn_about_others()
        self._enforcement = Enforcement(model, targets, run=self.params)
        self._enforcement.attach()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._started or self._enforcement is None:
            return
        # Only now: a BackupAndRestore further down the list has restored its weights by then.
        self._started = True
        self.model  # noqa: B018 - on JAX, reading it brings the variables up to date
        self._enforcement.hold(self._start(epoch))
        self._enforcement.apply()

    def on_train_end(self, logs: Any = None) -> None:
        if self._enforcement is None:
            return
        self.model  # noqa: B018
        if not self._released:
            # Averages (use_ema) or restored weights may have replaced the masked ones.
            self._enforcement.apply()
        self._enforcement.detach()
        self._enforcement = None

    def _prepare(self, model: keras.Model) -> list[Target]:
        """Checks everything that can be checked, and says which variables are held."""
        raise NotImplementedError

    def _start(self, epoch: int) -> list[np.ndarray]:
        """The zeros to hold from the first batch on, each in its variable's shape."""
        raise NotImplementedError

    def _warn_about_others(self) -> None:
        """Warns of callbacks in the same list that get in the way."""


class KeepZeros(HoldingCallback):
    """Holds the zeros that are in a model while it is trained further.

    For fine-tuning a pruned model. Weights that are zero when training begins are exactly zero after every
    optimizer step; a variable that is zero as a whole is left free.

        >>> import keras, keras_woodfisher as kw
        >>> model.fit(x, y, epochs=5, callbacks=[kw.KeepZeros()])  # doctest: +SKIP

    Args:
        params: The variables to hold: `"__ALL_PRUNABLE__"` (kernels), `"__ALL__"`, or names and `re:` patterns.
        exclude: Names and patterns to leave free.
    """

    def __init__(self, params: str | Sequence[str] = "__ALL_PRUNABLE__", exclude: Sequence[str] = ()):
        super().__init__()
        self._params_wanted = names("params", params)
        self._exclude = names("exclude", exclude)
        self._targets: list[Target] = []

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config`."""
        return {"params": _plain(self._params_wanted), "exclude": _plain(self._exclude)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KeepZeros":
        """A callback with the arguments of `get_config`."""
        return cls(**config)

    def _prepare(self, model: keras.Model) -> list[Target]:
        exclude = (self._exclude,) if isinstance(self._exclude, str) else self._exclude
        self._targets = find_targets(model, self._params_wanted, exclude)
        return self._targets

    def _start(self, epoch: int) -> list[np.ndarray]:
        return [target.unflatten(zeros_of(target)) for target in self._targets]


def callbacks_beside(callback: keras.callbacks.Callback) -> tuple[list[Any], list[Any]]:
    """The callbacks before and after one in its list, while the list is calling it.

    Keras tells a callback nothing of the others; the list that calls it is found on the stack.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList) and callback in caller.callbacks:
            place = caller.callbacks.index(callback)
            return caller.callbacks[:place], caller.callbacks[place + 1 :]
        frame = frame.f_back
    return [], []


def warn(message: str) -> None:
    """A warning that points at the user's call rather than at this package."""
    warnings.warn(message, stacklevel=4)


def _check_trainable_here(model: keras.Model) -> None:
    if not getattr(model, "compiled", False) or model.optimizer is None:
        raise ValueError(
            "The model must be compiled with an optimizer before training with a pruning callback: "
            "call model.compile(optimizer=..., loss=...)."
        )
    strategy = getattr(model, "distribute_strategy", None)
    replicas = getattr(strategy, "num_replicas_in_sync", 1)
    if replicas > 1 or keras.distribution.distribution() is not None:
        raise ValueError(
            "Pruning while training on several replicas isn't supported. "
            "Prune on one device, or in one shot with keras_woodfisher.prune."
        )


def _plain(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)
