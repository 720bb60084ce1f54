"""KeepZeros: holds the zeros that are there, and prunes nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.training import keep_edits, model_of, refresh

from keras_woodfisher.callbacks.callback_list import warn, warn_of_dead
from keras_woodfisher.callbacks.epoch_logs import log_each
from keras_woodfisher.callbacks.mask_callback import MaskCallback
from keras_woodfisher.callbacks.mask_constraint import WeightMasks
from keras_woodfisher.model.constraints import masks_of
from keras_woodfisher.model.targets import ALL, ALL_PRUNABLE, Target, all_targets, find_targets, matches
from keras_woodfisher.options.checks import as_json, flag, names, number
from keras_woodfisher.pruning.masks import MANY, zeros_of
from keras_woodfisher.reports.zeros import count_zeros


class KeepZeros(MaskCallback):
    """Holds the zeros that are in a model while it is trained further.

    For fine-tuning a pruned model. Weights that are zero at `start_epoch` are exactly zero after every optimizer step
    from then on, in variables that are frozen now, too, if they are trained later. A variable that is zero as a whole
    was pruned if others are sparse, or if it is named; in a dense model it isn't trained yet, and is left free, with a
    warning.

        >>> report = kw.prune(model, sparsity=0.5, method="magnitude")
        >>> history = model.fit(x, y, callbacks=[kw.KeepZeros()], verbose=0)
        >>> kw.sparsity_report(model).sparsity
        0.5

    Args:
        params: The variables to hold: `"__ALL_PRUNABLE__"` (kernels), `"__ALL__"`, or a list of these, names and `re:`
            patterns. Where others have many zeros a warning names them.
        exclude: Names and patterns to leave free.
        start_epoch: From when on, in epochs, fractions allowed; 0 or -1 means from the start.
        end_epoch: Until when, in epochs; -1 means to the end of training.
        total_epochs: Epochs of the whole training, where a `fit` is only a part of it and a later one goes on.
        log_variables: Put the fraction of zeros of each of these variables into the logs of each epoch, as
            `sparsity/<path>`, for the callbacks after this one.

    Raises:
        ValueError, TypeError: If an argument is out of range, or, before the first batch, doesn't fit the training.
        KeyError: Before the first batch, if a name matches no variable.
    """

    def __init__(
        self,
        params: str | Sequence[str] = "__ALL_PRUNABLE__",
        exclude: Sequence[str] = (),
        start_epoch: float = 0.0,
        end_epoch: float = -1.0,
        total_epochs: int | None = None,
        log_variables: bool = False,
    ):
        super().__init__(total_epochs)
        self._log_variables = flag("log_variables", log_variables)
        self._params_wanted = names("params", params)
        self._exclude = names("exclude", exclude)
        self._start_epoch = _position("start_epoch", start_epoch)
        self._end_epoch = _position("end_epoch", end_epoch)
        if 0 <= self._end_epoch < max(self._start_epoch, 0.0):
            raise ValueError(f"end_epoch={end_epoch:g} lies before start_epoch={start_epoch:g}. Swap or move them.")
        self._targets: list[Target] = []
        self._holds = False

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config`."""
        return {
            "params": as_json(self._params_wanted),
            "exclude": as_json(self._exclude),
            "start_epoch": self._start_epoch,
            "end_epoch": self._end_epoch,
            "total_epochs": self._total_epochs,
            "log_variables": self._log_variables,
        }

    def identity(self) -> dict[str, Any]:
        return {"start_epoch": self._start_epoch, "end_epoch": self._end_epoch} | super().identity()

    def knowledge(self) -> dict[str, np.ndarray]:
        return super().knowledge() | {"holds": np.array(self._holds)}

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_begin(batch, logs)
        position = self._progress.before(batch) + 1e-6
        starts = not self._holds and position >= self._start_epoch
        ends = not self._released and 0 <= self._end_epoch <= position
        if self.weight_masks is None or not (starts or ends):
            return
        refresh(self)
        with self._leaving_nothing("zeros that are held or let go"):
            if starts:
                self._holds = True
                self.weight_masks.hold(self._zeros())
                self._compare()
            if ends:
                self._released = True
                self.weight_masks.release()
            keep_edits(model_of(self))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if self._log_variables:
            refresh(self)
            # Not those of the masks: what isn't held yet, or no longer, counts too.
            log_each(logs, self._targets, [found.pruned for found in count_zeros(self._targets)])

    def check(self, model: keras.Model, epochs: int | None = None) -> list[Target]:
        """The variables that it holds. Nothing is trained or changed.

        Raises:
            ValueError: If training ends before `start_epoch`.
            KeyError: If a name matches no variable.
        """
        if epochs is not None and self._start_epoch >= epochs:
            raise ValueError(
                f"start_epoch={self._start_epoch:g} lies after the last epoch ({epochs}), so no zero would be held. "
                "Train longer, or lower start_epoch; or, where a later fit goes on with this training, give its "
                f"length: total_epochs={math.floor(self._start_epoch) + 1} or more."
            )
        exclude = (self._exclude,) if isinstance(self._exclude, str) else self._exclude
        return find_targets(model, self._params_wanted, exclude, frozen_too=True)

    def _prepare(self, model: keras.Model) -> WeightMasks:
        self._holds = False
        self._targets = self.check(model, self._progress.epochs)
        start = max(self._start_epoch, 0.0)
        return WeightMasks(model, self._targets, (start, start))

    def _start(self, epoch: int) -> list[np.ndarray]:
        # Training that goes on after the end has let its zeros go.
        self._released = 0 <= self._end_epoch <= epoch
        if self._params_wanted == ALL_PRUNABLE and (free := self._free_zeros()):
            warn(
                f"KeepZeros doesn't hold the zeros of {', '.join(free)}, which it holds only when they are named. Give "
                f"params={[ALL_PRUNABLE, *free]!r}, or put them in `exclude`."
            )
        self._holds = epoch >= self._start_epoch
        if self._holds and not self._released:
            return self._zeros()
        return [np.zeros(tuple(target.variable.shape), bool) for target in self._targets]

    def _free_zeros(self) -> list[str]:
        """Names of variables that were pruned, by the look of them, and that no callback holds."""
        exclude = (self._exclude,) if isinstance(self._exclude, str) else self._exclude
        free = [
            target
            for target in all_targets(model_of(self))
            if matches(target, ALL)
            and not masks_of(target.variable)
            and not any(matches(target, item) for item in exclude)
        ]
        return [v.name for v in count_zeros(free) if MANY <= v.sparsity < 1.0]

    def _go_on(self, known: Mapping[str, np.ndarray]) -> None:
        self._holds = bool(known["holds"])

    def _zeros(self) -> list[np.ndarray]:
        params = self._params_wanted
        zeros = zeros_of(model_of(self), self._targets, (params,) if isinstance(params, str) else params)
        warn_of_dead(self._targets, zeros)
        pairs = zip(self._targets, zeros, strict=True)
        if free := [target.name for target, here in pairs if not here.any() and not target.read().any()]:
            warn(
                f"All weights of {', '.join(free)} are zero, and no other variable of the model is sparse: they count "
                "as not trained yet, and KeepZeros doesn't hold them. If they were pruned, name them in `params`."
            )
        return [target.unflatten(here) for target, here in zip(self._targets, zeros, strict=True)]


def _position(name: str, value: Any) -> float:
    value = number(name, value)
    if value < 0 and value != -1:
        raise ValueError(f"{name} must be at least 0, or -1, got {value:g}.")
    return value
