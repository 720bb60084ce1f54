"""Gradient samples without extra work: the training run's own most recent gradients."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.hidden import HiddenVariables
from keras_woodfisher.targets import Target


class GradientBuffer:
    """A ring of the last `capacity` mean gradients, filled by the optimizer's `apply` inside the train step.

    Every Keras trainer calls `optimizer.apply`, so one hook on the instance sees the gradients on every
    backend, unscaled and before clipping. Rows include the gradients of regularisers.

    Args:
        model: A compiled model with a built optimizer.
        targets: Variables whose gradients are kept.
        capacity: Rows of the ring (m).
        backend: Writes a row in place.
    """

    def __init__(self, model: keras.Model, targets: Sequence[Target], capacity: int, backend: Backend):
        self._model = model
        self._targets = list(targets)
        self._backend = backend
        self._hidden = HiddenVariables.of(model.optimizer)
        width = sum(t.size for t in targets)
        self._rows = self._hidden.add((capacity, width), "float32", "gradients")
        self._seen = self._hidden.add((), "int32", "gradients_seen")
        optimizer = self._hidden.optimizer
        vars(optimizer)["apply"] = partial(self._apply, optimizer)
        model.make_train_function(force=True)

    @property
    def filled(self) -> int:
        """How many rows hold a gradient."""
        return min(int(ops.convert_to_numpy(self._seen)), self._rows.shape[0])

    def latest(self, count: int) -> np.ndarray:
        """The `count` newest rows, or as many as there are: (rows, d) float32 in weight order."""
        seen, capacity = int(ops.convert_to_numpy(self._seen)), self._rows.shape[0]
        wanted = np.arange(max(0, seen - min(count, capacity)), seen) % capacity
        return ops.convert_to_numpy(self._rows)[wanted]

    def detach(self) -> None:
        """Takes the hook and the ring out of the optimizer."""
        vars(self._hidden.optimizer).pop("apply", None)
        self._hidden.remove([self._rows, self._seen])
        self._model.train_function = None

    def _apply(self, optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
        grads = list(grads)
        variables = trainable_variables
        variables = optimizer._trainable_variables if variables is None else list(variables)
        if grads:
            self._keep(optimizer, {id(v): g for v, g in zip(variables, grads, strict=True)})
        return type(optimizer).apply(optimizer, grads, variables)

    def _keep(self, optimizer: Any, grads: dict[int, Any]) -> None:
        row = ops.concatenate([self._flat(t, grads.get(id(t.variable))) for t in self._targets])
        if optimizer.loss_scale_factor is not None:
            row = row / optimizer.loss_scale_factor
        seen = ops.convert_to_tensor(self._seen)
        self._backend.write_row(self._rows, seen % self._rows.shape[0], row)
        self._seen.assign(seen + 1)

    @staticmethod
    def _flat(target: Target, grad: Any) -> Any:
        if grad is None:
            return ops.zeros((target.size,), "float32")
        # Embedding gradients are sparse on TensorFlow.
        dense = ops.cast(ops.convert_to_tensor(grad, sparse=False), "float32")
        return ops.reshape(ops.transpose(dense, target.order), (-1,))
