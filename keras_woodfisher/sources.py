"""Where the gradient samples of an update come from: given data, or the training run itself."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import keras
import numpy as np
from keras_woodfisher_backends.protocol import Backend, Sampler, SlowLayers

from keras_woodfisher.buffer import GradientBuffer
from keras_woodfisher.examples import open_examples
from keras_woodfisher.gradients import ModelLoss, checked, sample_gradients, usable_rows
from keras_woodfisher.memory import check_memory
from keras_woodfisher.meter import Meter
from keras_woodfisher.options import PruningOptions
from keras_woodfisher.targets import Target


class GradientSource(Protocol):
    """Gives G at an update."""

    def check(self, rows: int) -> None:
        """Raises now what would fail later."""
        ...

    def collect(self, kept: Sequence[np.ndarray], rows: int, draw: int, meter: Meter) -> np.ndarray:
        """(m, d) float32 samples of the unpruned weights, m at most `rows`.

        Args:
            kept: For each variable the bool mask of its unpruned weights, in weight order.
            rows: How many samples to use.
            draw: Number of the update, so that each one draws other examples.
            meter: Measures the phase.
        """
        ...


class SampledGradients:
    """Samples taken from data at the present weights."""

    def __init__(
        self,
        model: keras.Model,
        targets: Sequence[Target],
        options: PruningOptions,
        backend: Backend,
        data: Any,
        loss: Any = None,
    ):
        self._targets = targets
        self._options = options
        self._backend = backend
        self._model = model
        self._examples = open_examples(data)
        self._loss = ModelLoss(model, targets, loss)
        self._sampler: Sampler | None = None

    @property
    def available(self) -> int | None:
        """How many samples the data can give, or None where that isn't known."""
        examples = self._examples.available
        return None if examples is None else examples // self._options.grad_batch_size

    @property
    def slow_layers(self) -> SlowLayers | None:
        """Layers that make sampling slow, as far as they are known by now."""
        return None if self._sampler is None else self._sampler.slow_layers

    def check(self, rows: int) -> None:
        size = self._options.grad_batch_size
        if self.available is not None and self.available < rows:
            raise ValueError(
                f"num_grads={rows} with grad_batch_size={size} needs {rows * size} examples, but data holds "
                f"{self._examples.available}. num_grads={self.available} would fit."
            )
        check_memory(rows, sum(t.size for t in self._targets))
        first = next(self._examples.groups(1, size, self._options.seed), None)
        if first is None:
            raise ValueError(
                f"data holds fewer than grad_batch_size={size} examples (a callable must return a fresh "
                "iterator at each call)."
            )
        self._loss.probe(first)

    def collect(self, kept: Sequence[np.ndarray], rows: int, draw: int, meter: Meter) -> np.ndarray:
        if self._sampler is None:
            variables = [t.variable for t in self._targets]
            self._sampler = self._backend.sampler(self._loss, self._model, variables)
        # The first draw is `default_rng(seed)` itself; each later update has a stream of its own.
        seed = self._options.seed
        stream = [seed, draw] if draw and seed is not None else seed
        groups = self._examples.groups(rows, self._options.grad_batch_size, stream)
        shape = (rows, int(sum(mask.sum() for mask in kept)))
        with meter.phase("gradients", rows, "sample") as advance:
            grads = sample_gradients(
                self._loss,
                self._sampler,
                self._backend,
                groups,
                list(zip(self._targets, kept, strict=True)),
                shape,
                advance,
            )
        if self.slow_layers is not None:
            meter.note(str(self.slow_layers))
        return grads


class BufferedGradients:
    """The most recent gradients of the training run, one row a step."""

    def __init__(self, model: keras.Model, targets: Sequence[Target], capacity: int, backend: Backend):
        check_memory(capacity, sum(t.size for t in targets), copies=2)
        gpus = [device for device in backend.devices() if not device.startswith("cpu")]
        free = backend.free_memory(gpus[0]) if gpus else None
        if free is not None:
            check_memory(capacity, sum(t.size for t in targets), free=free)
        self._buffer = GradientBuffer(model, targets, capacity, backend)

    def check(self, rows: int) -> None:
        pass

    def collect(self, kept: Sequence[np.ndarray], rows: int, draw: int, meter: Meter) -> np.ndarray:
        filled = self._buffer.filled
        if filled == 0:
            raise RuntimeError(
                "No gradient has been buffered yet: no training step came before this update. "
                "Set a later start_epoch, or give data=."
            )
        if filled < rows:
            warnings.warn(
                f"Only {filled} of num_grads={rows} gradients have been buffered; they are used.",
                stacklevel=2,
            )
        with meter.phase("gradients", 1, "buffer") as advance:
            columns = np.concatenate(kept)
            latest = self._buffer.latest(rows)
            good = usable_rows(latest)
            grads = checked(latest[np.ix_(good, columns)], int((~good).sum()), len(latest))
            advance()
        return grads

    def detach(self) -> None:
        """Stops buffering and frees the memory."""
        self._buffer.detach()
