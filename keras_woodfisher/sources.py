"""Where the gradient samples of an update come from: given data, or the training run itself."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import numpy as np
from keras_woodfisher_backends.protocol import Backend, SlowLayers

from keras_woodfisher.buffer import GradientBuffer
from keras_woodfisher.examples import open_examples
from keras_woodfisher.footprint import Footprint, buffered_footprint, counted_outputs, sampled_footprint
from keras_woodfisher.gradients import ModelLoss, checked, sample_gradients, usable_rows
from keras_woodfisher.halving import HalvingSampler
from keras_woodfisher.memory import check_device_memory
from keras_woodfisher.options import PruningOptions
from keras_woodfisher.stores.store import GradientStore
from keras_woodfisher.targets import Target


class GradientSource(Protocol):
    """Gives G at an update."""

    @property
    def slow_layers(self) -> SlowLayers | None:
        """Layers that make sampling slow, as far as they are known by now."""
        ...

    def check(self, rows: int) -> None:
        """Raises now what would fail later."""
        ...

    def footprint(self, rows: int) -> Footprint:
        """The memory that taking so many samples needs; after `check`."""
        ...

    def fill(
        self,
        store: GradientStore,
        kept: Sequence[np.ndarray],
        rows: int,
        draw: int,
        advance: Callable[[int], None],
    ) -> None:
        """Puts samples of the unpruned weights into a store, the same ones at each call with the same arguments.

        Args:
            store: Takes (m, d) float32, m at most `rows`.
            kept: For each variable the bool mask of its unpruned weights, in weight order.
            rows: How many samples to use.
            draw: Number of the update, so that each one draws other examples.
            advance: Called with the number of samples that were taken.
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
        self._targets = list(targets)
        self._options = options
        self._backend = backend
        self._model = model
        self._examples = open_examples(data)
        self._loss = ModelLoss(model, targets, loss)
        self._sampler: HalvingSampler | None = None
        self._probed: tuple[Any, int] | None = None

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
        first = next(self._examples.groups(1, size, self._options.seed), None)
        if first is None:
            raise ValueError(
                f"data holds fewer than grad_batch_size={size} examples (a callable must return a fresh "
                "iterator at each call)."
            )
        with counted_outputs(self._model) as outputs:
            self._loss.probe(first)
        self._probed = first, outputs[0]

    def footprint(self, rows: int) -> Footprint:
        if self._probed is None:
            self.check(rows)
        assert self._probed is not None
        return sampled_footprint(self._targets, self._backend, rows, *self._probed)

    def fill(
        self,
        store: GradientStore,
        kept: Sequence[np.ndarray],
        rows: int,
        draw: int,
        advance: Callable[[int], None],
    ) -> None:
        if self._sampler is None:
            variables = [t.variable for t in self._targets]
            sampler = self._backend.sampler(self._loss, self._model, variables)
            self._sampler = HalvingSampler(sampler, self._backend)
        # The first draw is `default_rng(seed)` itself; each later update has a stream of its own.
        seed = self._options.seed
        stream = [seed, draw] if draw and seed is not None else seed
        groups = self._examples.groups(rows, self._options.grad_batch_size, stream)
        pairs = list(zip(self._targets, kept, strict=True))
        sample_gradients(self._loss, self._sampler, self._backend, groups, pairs, rows, store, advance)


class BufferedGradients:
    """The most recent gradients of the training run, one row a step."""

    slow_layers = None

    def __init__(self, model: keras.Model, targets: Sequence[Target], capacity: int, backend: Backend):
        gpus = [device for device in backend.devices() if not device.startswith("cpu")]
        if gpus:
            check_device_memory(capacity, sum(t.size for t in targets), gpus[0], backend.free_memory(gpus[0]))
        self._targets = list(targets)
        self._buffer = GradientBuffer(model, targets, capacity, backend)

    def check(self, rows: int) -> None:
        pass

    def footprint(self, rows: int) -> Footprint:
        return buffered_footprint(self._targets, self._buffer.capacity)

    def fill(
        self,
        store: GradientStore,
        kept: Sequence[np.ndarray],
        rows: int,
        draw: int,
        advance: Callable[[int], None],
    ) -> None:
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
        columns, dropped = np.concatenate(kept), 0
        for part in self._buffer.latest(rows, store.chunk):
            good = usable_rows(part)
            np.compress(columns, part, axis=1, out=store.room(len(part)))
            store.keep(good)
            dropped += int((~good).sum())
            advance(len(part))
        checked(store, dropped, min(filled, rows))

    def detach(self) -> None:
        """Stops buffering and frees the memory."""
        self._buffer.detach()
