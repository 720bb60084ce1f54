"""Keeps pruned weights at exactly zero while training goes on, inside the compiled step."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_woodfisher.hidden import HiddenVariables, parts_of, slots_of
from keras_woodfisher.targets import Target

_AVERAGING = "_update_model_variables_moving_average"


class MaskConstraint(keras.constraints.Constraint):
    """`where(mask, w, 0)` after each optimizer step, on top of the constraint that was there."""

    def __init__(self, mask: Any, inner: Any, owner: "Enforcement"):
        self.mask = mask
        self.inner = inner
        self.owner = owner

    def __call__(self, w: Any) -> Any:
        if self.inner is not None:
            w = self.inner(w)
        # Bare variables fail inside JAX's conditional.
        w = ops.convert_to_tensor(w)
        return ops.where(ops.convert_to_tensor(self.mask), w, ops.zeros_like(w))


class Enforcement:
    """Masks for some variables of a model, in force from `attach` to `detach`.

    Each mask is a boolean variable that the optimizer carries along, read by the constraint of its weight, which
    every Keras optimizer applies after its update.

    Args:
        model: A compiled model.
        targets: The variables to hold.
        run: Identifies one call of `fit`; what an earlier, broken-off call left behind is replaced.
    """

    def __init__(self, model: keras.Model, targets: Sequence[Target], run: Any = None):
        self._model = model
        self._targets = list(targets)
        self._run = run
        self._masks: list[Any] = []
        self._hidden: HiddenVariables | None = None

    @property
    def attached(self) -> bool:
        return self._hidden is not None

    def attach(self) -> None:
        """Puts all-True masks in place and has the train step rebuilt.

        Raises:
            ValueError: If another callback of the same call of `fit` holds one of the variables.
        """
        optimizer = self._model.optimizer
        if not optimizer.built:
            optimizer.build(self._model.trainable_variables)
        self._replace_leftovers()
        self._hidden = HiddenVariables.of(optimizer)
        for target in self._targets:
            shape = tuple(target.variable.shape)
            mask = self._hidden.add(shape, "bool", "mask")
            mask.assign(np.ones(shape, bool))
            self._masks.append(mask)
            target.variable.constraint = MaskConstraint(mask, target.variable.constraint, self)
        for optimizer in parts_of(self._hidden.optimizer):
            if optimizer.use_ema:
                # Past Keras's __setattr__, which would track it.
                vars(optimizer)[_AVERAGING] = partial(self._average, optimizer)
        # A constraint that is set after the step was traced would do nothing.
        self._model.make_train_function(force=True)

    def hold(self, pruned: Sequence[np.ndarray]) -> None:
        """Sets the masks, and the optimizer's state of pruned weights to zero.

        Args:
            pruned: For each variable its pruned weights, bool in the variable's shape.
        """
        for target, mask, here in zip(self._targets, self._masks, pruned, strict=True):
            mask.assign(~here)
            for slot in slots_of(self._optimizer, target.variable):
                values = ops.convert_to_numpy(slot)
                if values[here].any():
                    slot.assign(np.where(here, np.zeros((), values.dtype), values))

    def apply(self) -> None:
        """Masks the weights now: something other than the optimizer may have changed them."""
        for target, mask in zip(self._targets, self._masks, strict=True):
            values = ops.convert_to_numpy(target.variable)
            here = ops.convert_to_numpy(mask)
            if values[~here].any():
                target.variable.assign(np.where(here, values, np.zeros((), values.dtype)))

    def release(self) -> None:
        """Lets all weights grow again, while the masks stay in place (the train step goes on)."""
        for mask in self._masks:
            mask.assign(np.ones(mask.shape, bool))

    def detach(self) -> None:
        """Puts the constraints back that were there, and takes the masks out of the optimizer."""
        if self._hidden is None:
            return
        mine = {id(mask) for mask in self._masks}
        for target in self._targets:
            constraint = target.variable.constraint
            if isinstance(constraint, MaskConstraint) and id(constraint.mask) in mine:
                target.variable.constraint = constraint.inner
        for optimizer in parts_of(self._hidden.optimizer):
            vars(optimizer).pop(_AVERAGING, None)
        self._hidden.remove(self._masks)
        self._hidden, self._masks = None, []
        # The next `fit` or `train_on_batch` builds its own step.
        self._model.train_function = None

    def _average(self, optimizer: Any, variables: Any) -> None:
        """Keras's update of the averages, which sees weights before their constraint, and then the masks."""
        getattr(type(optimizer), _AVERAGING)(optimizer, variables)
        averages = optimizer._model_variables_moving_average
        place = {id(v): average for v, average in zip(variables, averages, strict=True)}
        for target, mask in zip(self._targets, self._masks, strict=True):
            average = place.get(id(target.variable))
            if average is not None:
                value, keep = ops.convert_to_tensor(average), ops.convert_to_tensor(mask)
                average.assign(ops.where(keep, value, ops.zeros_like(value)))

    @property
    def _optimizer(self) -> Any:
        assert self._hidden is not None
        return self._hidden.optimizer

    def _replace_leftovers(self) -> None:
        for target in self._targets:
            constraint = target.variable.constraint
            if not isinstance(constraint, MaskConstraint):
                continue
            if self._run is not None and constraint.owner._run is self._run:
                raise ValueError(
                    f"Two pruning callbacks of one `fit` hold {target.name!r}. "
                    "Give each its own variables with `params` or `exclude`; "
                    "KeepZeros isn't needed beside WoodFisherPruning."
                )
            constraint.owner.detach()
