"""Keeps pruned weights at exactly zero while training goes on, inside the compiled step."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.keras_internals.engines import assign_whole
from keras_woodfisher_backends.keras_internals.optimizers import follow_averages, trained_variables, unfollow_averages
from keras_woodfisher_backends.keras_internals.training import (
    fits_of,
    forget,
    traces_constants,
    undo_at_next_fit,
)

from keras_woodfisher.model.constraints import MaskConstraint, constraint_of, masks_of, own_constraint
from keras_woodfisher.model.optimizer_variables import HiddenVariables, parts_of, slots_of
from keras_woodfisher.model.targets import Target


class WeightMasks:
    """Masks for some variables of a model, in force from `attach` to `detach`.

    Each mask is a boolean variable that the optimizer carries along, read by the constraint of its weight, which
    every Keras optimizer applies after its update.

    Args:
        model: A compiled model.
        targets: The variables to hold.
        window: The first and last position, in epochs, at which the masks may grow.
    """

    def __init__(self, model: keras.Model, targets: Sequence[Target], window: tuple[float, float] = (0.0, 0.0)):
        self.model = model
        self._targets = list(targets)
        self.window = window
        self._masks: list[Any] = []
        self._given: list[np.ndarray] = []
        self._hidden: HiddenVariables | None = None
        self._in_fit = False

    def attach(self, others: Sequence["WeightMasks"] = ()) -> None:
        """Puts all-True masks in place and has the train step rebuilt.

        Args:
            others: What else is in force in this call of `fit`. Of other masks those stay that hold in a `fit` around
                this one, or in the training of another model; the rest are leftovers, and removed.

        Raises:
            ValueError: If what stays prunes one of the variables at the same time.
        """
        self._remove_interrupted(others)
        self._hidden = HiddenVariables.of(self.model)
        self._in_fit = fits_of(self.model) > 0
        undo_at_next_fit(self.model, self.detach)
        for target in self._targets:
            shape = tuple(target.variable.shape)
            mask = self._hidden.add(shape, "bool", "mask", target.variable)
            assign_whole(mask, np.ones(shape, bool))
            self._masks.append(mask)
            target.variable.constraint = MaskConstraint(mask, target.variable.constraint, self)
        for part in parts_of(self._hidden.optimizer):
            if part.use_ema:
                follow_averages(part, _mask_average)
        # A constraint that is set after the step was traced would do nothing.
        self.model.make_train_function(force=True)
        self._rebuild_others()

    def hold(self, pruned: Sequence[np.ndarray]) -> None:
        """Sets the masks, and the optimizer's state of pruned weights to what it began with.

        Args:
            pruned: For each variable its pruned weights, bool in the variable's shape.
        """
        self.go_on(pruned)
        for target, here in zip(self._targets, pruned, strict=True):
            for slot, value in slots_of(self._optimizer, target.variable):
                values = ops.convert_to_numpy(slot)
                begin = np.asarray(value, values.dtype)
                if (values[here] != begin).any():
                    assign_whole(slot, np.where(here, begin, values))

    def go_on(self, pruned: Sequence[np.ndarray]) -> None:
        """Sets the masks of a run that goes on, whose optimizer is as it was; see `hold`."""
        for mask, here in zip(self._masks, pruned, strict=True):
            assign_whole(mask, ~here)
        self._given = [np.packbits(here) for here in pruned]
        if traces_constants():
            self._rebuild_others()

    def are_overwritten(self) -> bool:
        """Whether something else than this has set the masks."""
        pairs = zip(self.pruned(), self._given, strict=True)
        return bool(self._given) and any((np.packbits(here) != given).any() for here, given in pairs)

    def pruned(self) -> list[np.ndarray]:
        """The weights that are held at zero, each in its variable's shape."""
        return [~ops.convert_to_numpy(mask) for mask in self._masks]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the variables."""
        return [tuple(target.variable.shape) for target in self._targets]

    def apply(self) -> list[str]:
        """Masks the weights now: something other than the optimizer may have changed them.

        Returns:
            Names of the variables of which pruned weights weren't zero.
        """
        changed = []
        for target, mask in zip(self._targets, self._masks, strict=True):
            values = ops.convert_to_numpy(target.variable)
            here = ops.convert_to_numpy(mask)
            if values[~here].any():
                assign_whole(target.variable, np.where(here, values, np.zeros((), values.dtype)))
                changed.append(target.name)
        return changed

    def constrain(self) -> None:
        """Applies the user's own constraints now: corrected weights may break them, and no step may follow."""
        for target in self._targets:
            if own_constraint(target.variable) is not None:
                target.variable.assign(target.variable.constraint(target.variable))

    def release(self) -> None:
        """Lets all weights grow again, while the masks stay in place (the train step goes on)."""
        for mask in self._masks:
            assign_whole(mask, np.ones(mask.shape, bool))
        self._given = []
        if traces_constants():
            self._rebuild_others()

    def detach(self) -> None:
        """Puts the constraints back that were there, and takes the masks out of the optimizer."""
        if self._hidden is None:
            return
        for target in self._targets:
            _unlink(target.variable, self)
        for part in parts_of(self._hidden.optimizer):
            if not any(mask.owner.model is self.model for v in trained_variables(part) for mask in masks_of(v)):
                unfollow_averages(part)
        # A step of the user's own, or of another model, may have been traced with them.
        self.release()
        self._hidden.remove(self._masks)
        self._hidden, self._masks = None, []
        forget(self.model, self.detach)
        self._rebuild_others()
        # The next `fit` or `train_on_batch` builds its own step; one around this is amid its own.
        self.model.train_function = None
        if fits_of(self.model) > 1:
            self.model.make_train_function(force=True)

    def stays_beside(self, model: keras.Model) -> bool:
        """Whether these, of another `fit` or loop than the one of a model that begins, are no leftovers."""
        return fits_of(self.model) > 0 if self._in_fit else self.model is not model

    @property
    def are_attached(self) -> bool:
        """Whether they are in force."""
        return self._hidden is not None

    def is_shared(self) -> bool:
        """Whether another owner's masks are on one of the variables too."""
        return any(mask.owner is not self for target in self._targets for mask in masks_of(target.variable))

    @property
    def _optimizer(self) -> Any:
        assert self._hidden is not None
        return self._hidden.optimizer

    def _remove_interrupted(self, others: Sequence["WeightMasks"]) -> None:
        for target in self._targets:
            for mask in masks_of(target.variable):
                beside = any(mask.owner is other for other in others)
                if not beside and not mask.owner.stays_beside(self.model):
                    mask.owner.detach()
                elif self._overlaps(mask.owner):
                    where = "of one `fit`" if beside else "of two trainings"
                    raise ValueError(
                        f"Two pruning callbacks {where} prune {target.name!r} at the same time, from epoch "
                        f"{max(self.window[0], mask.owner.window[0]):g} on. Give each its own variables with "
                        "`params` or `exclude`, or let one start where the other ends; "
                        "KeepZeros isn't needed beside WoodFisherPruning."
                    )

    def _rebuild_others(self) -> None:
        """Has the steps of other models rebuilt, which were traced with other masks of shared variables."""
        models = [mask.owner.model for target in self._targets for mask in masks_of(target.variable)]
        for model in {id(model): model for model in models if model is not self.model}.values():
            model.make_train_function(force=True)

    def _overlaps(self, other: "WeightMasks") -> bool:
        return self.window[0] < other.window[1] and other.window[0] < self.window[1]


def _unlink(variable: Any, owner: WeightMasks) -> None:
    """Takes an owner's mask off a variable, wherever it stands in the chain."""
    outer: Any = None
    for mask in masks_of(variable):
        if mask.owner is not owner:
            outer = mask
        elif outer is None:
            variable.constraint = mask.inner
        else:
            outer.inner = mask.inner


def _mask_average(variable: Any, average: Any) -> None:
    # Keras averages weights as they are before their constraint.
    constraint = constraint_of(variable)
    if isinstance(constraint, MaskConstraint):
        average.assign(constraint.masked(average))
