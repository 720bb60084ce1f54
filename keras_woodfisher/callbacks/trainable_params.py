"""A callback that freezes and unfreezes variables."""

from collections.abc import Sequence
from typing import Any

import keras
from keras_woodfisher_backends.keras_internals.training import callbacks_beside, model_of, refresh

from keras_woodfisher.callbacks.epoch_callback import Companion, end_of, start_of
from keras_woodfisher.callbacks.freezing import Participation, Plan
from keras_woodfisher.callbacks.woodfisher_pruning import WoodFisherPruning
from keras_woodfisher.model.optimizer_slots import check_growth
from keras_woodfisher.model.targets import ALL, Target, all_targets, named_targets
from keras_woodfisher.options.checks import flag, names


class TrainableParams(Companion):
    """Freezes or unfreezes variables from `start_epoch` to `end_epoch`.

    A frozen variable is exactly unchanged by training, weight decay and averages included, and keeps its state in the
    optimizer. At `end_epoch`, and in any case when training ends, variables get back the `trainable` that they had,
    so that the model is left as it was. Where several of these callbacks name one variable, the one that began last
    holds. Each change has the train step compiled anew.

    Layers stay what they are: a BatchNormalization of a frozen layer (`layer.trainable = False`) uses its moving
    averages whatever its weights do. A variable that the optimizer didn't know gets fresh state when training begins,
    which isn't saved.

        >>> before = model.get_layer("hidden").get_weights()
        >>> frozen = kw.TrainableParams(["re:hidden/.*"], trainable=False)
        >>> history = model.fit(x, y, callbacks=[frozen], verbose=0)
        >>> all((new == old).all() for new, old in zip(model.get_layer("hidden").get_weights(), before))
        True

    Args:
        params: `"__ALL__"` (every weight, biases and normalisation included), or names and `re:` patterns.
        trainable: Whether they are trained meanwhile.
        start_epoch: Position in epochs, fractions allowed; 0 or -1 means at once.
        end_epoch: Position in epochs; -1 means the end of training.

    Raises:
        ValueError, TypeError: If an argument is out of range, or, before the first batch, if the variables can't be
            trained, or are to be pruned while they are frozen.
        KeyError: Before the first batch, if a name matches no variable.
    """

    def __init__(
        self,
        params: str | Sequence[str] = ALL,
        trainable: bool = True,
        start_epoch: float = 0.0,
        end_epoch: float = -1.0,
    ):
        self._params_wanted = names("params", params)
        self._value = flag("trainable", trainable)
        self._start = start_of(start_epoch)
        self._end = end_of(end_epoch, self._start)
        positions = {"start_epoch": float(start_epoch), "end_epoch": float(end_epoch)}
        super().__init__({"params": self._params_wanted, "trainable": trainable} | positions)
        self._participation: Participation | None = None
        self._pruning: list[WoodFisherPruning] = []
        self._plan: Plan | None = None
        self._checked = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self._check()
        # Early, so that a pruning callback finds trained what it prunes at the first batch.
        self._change(float(epoch), unfreeze_only=True)

    def on_train_end(self, logs: Any = None) -> None:
        refresh(self)
        if self._participation is not None and self._plan is not None:
            self._participation.leave(self._plan)
        self._participation = None

    def check(self, model: keras.Model) -> None:
        super().check(model)
        chosen = self._chosen(model)
        if self._value and chosen and not model.trainable:
            raise ValueError(
                f"{chosen[0].name!r} can't be trained, since the model as a whole is frozen (model.trainable is "
                "False). Set model.trainable = True, and freeze its layers instead."
            )
        check_growth(model, [t.variable for t in chosen] if self._value else [])

    def _prepare(self) -> None:
        chosen = self._chosen(model_of(self))
        self._participation = Participation.of(model_of(self))
        self._plan = Plan([t.variable for t in chosen], self._value, self._start, self._end)
        self._participation.join(self._plan)
        before, after = callbacks_beside(self)
        self._pruning = [c for c in [*before, *after] if isinstance(c, WoodFisherPruning)]
        self._checked = False

    def _chosen(self, model: keras.Model) -> list[Target]:
        everything = all_targets(model)
        params = self._params_wanted
        if isinstance(params, str) and params.upper() == ALL:
            return [t for t in everything if not _quantised(t)]
        chosen = named_targets(everything, params)
        if not chosen:
            raise ValueError(f"params={params!r} names no variable. Write {ALL!r} for all of them.")
        for target in chosen:
            if _quantised(target):
                raise ValueError(
                    f"{target.name!r} belongs to a quantised layer ({target.layer.quantization_mode}), which can't "
                    "be trained. Leave it out of `params`."
                )
        return chosen

    def _check(self) -> None:
        """What can be known only when every callback of the list has prepared itself, before the first batch."""
        if self._participation is None or self._checked:
            return
        self._checked = True
        refresh(self)
        self._participation.prepare()
        for callback in self._pruning:
            _refuse_pruning_of_frozen(callback, self._participation)

    def _apply(self, position: float) -> None:
        self._check()
        self._change(position)

    def _change(self, position: float, unfreeze_only: bool = False) -> None:
        if self._participation is None:
            return
        changes = self._participation.due(position, unfreeze_only)
        if changes:
            refresh(self)
            self._participation.change(changes)


def _quantised(target: Target) -> bool:
    return getattr(target.layer, "quantization_mode", None) is not None


def _refuse_pruning_of_frozen(callback: WoodFisherPruning, participation: Participation) -> None:
    task = callback.run.task
    # Without data, gradients are collected from the first step on.
    start, end = 0.0 if task.buffers else task.schedule.start, task.schedule.end
    for target in callback.run.targets:
        frozen = participation.frozen_at(target.variable, start, end)
        if frozen is not None:
            raise ValueError(
                f"{target.name!r} is frozen at epoch {frozen:g} by TrainableParams, while WoodFisherPruning "
                f"{'collects its gradients or ' if task.buffers else ''}prunes it from epoch "
                f"{start:g} to {end:g}. Freeze it at other times, or put it in `exclude`."
            )
