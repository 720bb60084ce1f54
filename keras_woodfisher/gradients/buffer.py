"""Gradient samples without extra work: the training run's own most recent gradients."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.keras_internals.engines import value_here
from keras_woodfisher_backends.keras_internals.optimizers import trained_variables
from keras_woodfisher_backends.keras_internals.training import forget, undo_at_next_fit
from keras_woodfisher_backends.protocol import Backend
from keras_woodfisher_backends.ranks.joint import current_ranks
from keras_woodfisher_backends.ranks.shares import row_share

from keras_woodfisher.gradients.footprint import Footprint, buffered_footprint
from keras_woodfisher.gradients.sampling import Taken, check_samples, usable_rows, warn_of_still
from keras_woodfisher.gradients.trained import refuse_untrained
from keras_woodfisher.memory.free_memory import check_device_memory
from keras_woodfisher.memory.store import GradientStore
from keras_woodfisher.model.batches import between
from keras_woodfisher.model.optimizer_variables import HiddenVariables
from keras_woodfisher.model.targets import Target


class GradientBuffer:
    """A ring of the last `capacity` mean gradients, filled by the optimizer's `apply` inside the train step.

    Every Keras trainer calls `optimizer.apply`, so one hook on the instance sees the gradients on every
    backend, unscaled and before clipping. Rows include the gradients of regularisers.

    Args:
        model: A compiled model.
        targets: Variables whose gradients are kept.
        capacity: Rows of the ring (m).
        backend: Writes a row in place.
    """

    def __init__(self, model: keras.Model, targets: Sequence[Target], capacity: int, backend: Backend):
        self._model = model
        self._targets = list(targets)
        self._backend = backend
        self._hidden = HiddenVariables.of(model)
        width = sum(t.size for t in targets)
        self._rows = self._hidden.add((capacity, width), "float32", "gradients")
        self._seen = self._hidden.add((), "int", "gradients_seen")
        _Apply.of(self._hidden.optimizer).buffers.append(self)
        undo_at_next_fit(model, self.detach)
        model.make_train_function(force=True)

    @property
    def filled(self) -> int:
        """How many rows hold a gradient."""
        return min(int(ops.convert_to_numpy(self._seen)), self._rows.shape[0])

    @property
    def capacity(self) -> int:
        """Rows of the ring."""
        return int(self._rows.shape[0])

    def contents(self) -> tuple[np.ndarray, int]:
        """Its rows as they lie in memory, and how many gradients came in all."""
        return ops.convert_to_numpy(self._rows)[: self.filled], int(ops.convert_to_numpy(self._seen))

    def put(self, rows: np.ndarray, seen: int) -> None:
        """Puts back what `contents` gave."""
        free = np.zeros((self.capacity - len(rows), rows.shape[1]), np.float32)
        self._rows.assign(np.concatenate([rows, free]) if len(free) else rows)
        self._seen.assign(seen)
        # The run that they are from has found all of them trained.
        _Apply.of(self._hidden.optimizer).trained |= {id(target.variable) for target in self._targets}

    def latest(self, count: int, chunk: int | None = None) -> Iterator[np.ndarray]:
        """The `count` newest rows, or as many as there are, oldest first: parts (n, d) float32 in weight order.

        Args:
            count: How many.
            chunk: The most rows of a part: no more than those are copied at a time.
        """
        seen = int(ops.convert_to_numpy(self._seen))
        place = max(0, seen - min(count, self.capacity))
        rows = value_here(self._rows)
        while place < seen:
            slot = place % self.capacity
            number = min(seen - place, self.capacity - slot, chunk or self.capacity)
            part = ops.slice(ops.convert_to_tensor(rows), (slot, 0), (number, self._rows.shape[1]))
            yield ops.convert_to_numpy(part)
            place += number

    @property
    def trained(self) -> set[int]:
        """Variables of which a step had a gradient since buffering began, by id."""
        return _Apply.of(self._hidden.optimizer).trained

    def detach(self) -> None:
        """Takes the hook and the ring out of the optimizer."""
        _Apply.of(self._hidden.optimizer).remove(self)
        self._hidden.remove([self._rows, self._seen])
        forget(self._model, self.detach)
        self._model.train_function = None

    def keep(self, optimizer: Any, grads: dict[int, Any]) -> None:
        """Writes one row, inside the train step; `grads` by the variable's id."""
        row = ops.concatenate([self._flat(t, grads.get(id(t.variable))) for t in self._targets])
        if optimizer.loss_scale_factor is not None:
            row = row / optimizer.loss_scale_factor
        seen = ops.convert_to_tensor(self._seen)
        self._backend.write_row(self._rows, seen % self._rows.shape[0], row)
        # Never true, but it ties the count to the row: on a step that finds no more data TensorFlow still runs
        # whatever doesn't depend on them.
        never = ops.logical_and(ops.isnan(row[0]), ops.isinf(row[0]))
        self._seen.assign(seen + 1 + ops.cast(never, self._seen.dtype))

    @staticmethod
    def _flat(target: Target, grad: Any) -> Any:
        if grad is None:
            return ops.zeros((target.size,), "float32")
        # Embedding gradients are sparse on TensorFlow.
        dense = ops.cast(ops.convert_to_tensor(grad, sparse=False), "float32")
        return ops.reshape(ops.transpose(dense, target.order), (-1,))


class _Apply:
    """Stands in for an optimizer's `apply`, and shows the gradients to the buffers of all pruning callbacks."""

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self.buffers: list[GradientBuffer] = []
        self.trained: set[int] = set()

    @classmethod
    def of(cls, optimizer: Any) -> "_Apply":
        """The one hook of an optimizer, put in place if there is none."""
        hook = vars(optimizer).get("apply")
        if hook is None:
            # Past Keras's __setattr__, which would track it.
            hook = vars(optimizer)["apply"] = cls(optimizer)
        return hook

    def remove(self, buffer: GradientBuffer) -> None:
        """Forgets a buffer; without any left the optimizer's own `apply` is back."""
        self.buffers = [known for known in self.buffers if known is not buffer]
        if not self.buffers:
            vars(self._optimizer).pop("apply", None)

    def __call__(self, grads: Any, trainable_variables: Any = None) -> Any:
        optimizer, grads = self._optimizer, list(grads)
        variables = trained_variables(optimizer) if trainable_variables is None else list(trainable_variables)
        if grads:
            by_variable = {id(v): g for v, g in zip(variables, grads, strict=True)}
            self.trained |= {key for key, grad in by_variable.items() if grad is not None}
            for buffer in self.buffers:
                buffer.keep(optimizer, by_variable)
        return type(optimizer).apply(optimizer, grads, variables)


class BufferedGradients:
    """The most recent gradients of the training run, one row a step, from `attach` to `detach`.

    Args:
        model: A compiled model.
        targets: Variables whose gradients are kept.
        capacity: How many rows are kept (m).
        backend: Writes them.

    Attributes:
        ring: Where they are; None before `attach`.
    """

    slow_layers = None

    def __init__(self, model: keras.Model, targets: Sequence[Target], capacity: int, backend: Backend):
        self._model = model
        self._targets = list(targets)
        self._capacity = capacity
        self._backend = backend
        self.ring: GradientBuffer | None = None

    def attach(self) -> None:
        """Begins buffering."""
        self.ring = GradientBuffer(self._model, self._targets, self._capacity, self._backend)

    def check(self, rows: int) -> None:
        gpus = [device for device in self._backend.devices() if not device.startswith("cpu")]
        if gpus:
            width, free = sum(target.size for target in self._targets), self._backend.free_memory(gpus[0])
            check_device_memory(self._capacity, width, gpus[0], free)

    def untrained(self) -> list[Target]:
        """The variables of which no step had a gradient yet."""
        trained = set() if self.ring is None else self.ring.trained
        return [target for target in self._targets if id(target.variable) not in trained]

    def footprint(self, rows: int) -> Footprint:
        return buffered_footprint(self._targets, self._capacity)

    def fill(
        self, store: GradientStore, kept: Sequence[np.ndarray], rows: int, draw: int, advance: Callable[[int], None]
    ) -> float:
        filled = 0 if self.ring is None else self.ring.filled
        if self.ring is None or filled == 0:
            raise RuntimeError(
                "No gradient has been buffered yet: no training step came before this update, or none that the "
                "compiled optimizer made. Set a later start_epoch, or give data=."
            )
        refuse_untrained(self.untrained())
        if filled < rows:
            warnings.warn(
                f"Only {filled} of num_grads={rows} gradients have been buffered; they are used.",
                stacklevel=2,
            )
        columns, dropped, sums = np.concatenate(kept), 0, list[np.ndarray]()
        edges = np.cumsum([int(mask.sum()) for mask in kept])
        still = np.diff(edges, prepend=0) > 0
        ranks = current_ranks()
        # All processes have the same ring, since their engine has averaged the gradients.
        share = row_share(min(filled, rows), ranks.rank, ranks.size)
        for part in between(self.ring.latest(rows, store.chunk), share.start, share.stop):
            into = store.room(len(part))
            np.compress(columns, part, axis=1, out=into)
            still &= [not rows.any() for rows in np.split(into, edges[:-1], axis=1)]
            good, squares = usable_rows(into)
            store.keep(good)
            sums.append(squares[good])
            dropped += int((~good).sum())
            advance(len(part))
        there = np.diff(edges, prepend=0) > 0
        triples = zip(self._targets, still, there, strict=True)
        taken = Taken.of(sums, dropped, {target.name: not unmoved for target, unmoved, any_ in triples if any_})
        check_samples(taken.kept, taken.dropped, min(filled, rows), where="of training")
        warn_of_still(taken.still)
        return taken.squares

    def detach(self) -> None:
        """Stops buffering and frees the memory."""
        if self.ring is not None:
            self.ring.detach()
            self.ring = None
