"""Mean and variance of what BatchNorm layers get, measured layer after layer."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from keras_woodfisher_backends.keras_internals.engines import assign_whole
from keras_woodfisher_backends.keras_internals.models import infer, layers_of, renormalises
from keras_woodfisher_backends.nest import map_arrays

from keras_woodfisher.gradients.loss import forward_only
from keras_woodfisher.model.batches import Batch


def batchnorm_layers(model: keras.Model) -> list[Any]:
    """All BatchNorm layers of a model, frozen ones too, each once."""
    return [layer for layer in layers_of(model) if isinstance(layer, layers.BatchNormalization)]


def call_order(model: keras.Model, found: Sequence[Any], batch: Batch) -> list[tuple[Any, int]]:
    """Those layers that a model calls, in the order of their first calls, with how often they are called."""
    calls: dict[int, int] = {}

    def see(layer: Any, inputs: Any, mask: Any) -> None:
        calls[id(layer)] = calls.get(id(layer), 0) + 1

    with _listening(found, see):
        _run(model, batch)
    known = {id(layer): layer for layer in found}
    return [(known[key], number) for key, number in calls.items()]


def measure(model: keras.Model, layer: Any, calls: int, batches: Sequence[Batch]) -> None:
    """Replaces the moving statistics of one layer by those of what it gets: a pass ends at the last of its `calls`.

    Raises:
        ValueError: If a statistic isn't finite.
    """
    moments = Moments(layer.moving_mean.shape[0])
    for batch in batches:
        left = calls

        def see(layer: Any, inputs: Any, mask: Any) -> None:
            nonlocal left
            moments.add(*_of_each_example(inputs, mask, layer.axis))
            left -= 1
            if not left:
                raise _Reached

        # What isn't finite is reported below.
        with _listening([layer], see), suppress(_Reached), np.errstate(invalid="ignore"):
            _run(model, batch)
    if not (moments.count.all() and np.isfinite(moments.mean).all() and np.isfinite(moments.variance).all()):
        why = "isn't finite" if moments.count.all() else "is masked everywhere"
        raise ValueError(
            f"What the BatchNorm layer {name_of(layer)!r} gets on this data {why}; nothing was changed. Look at the "
            "examples and at the model's outputs on them."
        )
    _write(layer, moments)


class Moments:
    """Mean and variance of a stream, joined in float64 (Chan, Golub & LeVeque 1983), which doesn't cancel.

    Args:
        channels: Channels (C).

    Attributes:
        count: Positions that were seen so far, (C,).
        mean: Their mean, (C,) float64.
    """

    def __init__(self, channels: int):
        self.count = np.zeros(channels)
        self.mean = np.zeros(channels)
        self._squares = np.zeros(channels)

    @property
    def variance(self) -> np.ndarray:
        """The mean squared distance from the mean, (C,) float64, as BatchNorm has it: not the unbiased estimate."""
        return self._squares / np.maximum(self.count, 1.0)

    def add(self, counts: np.ndarray, means: np.ndarray, variances: np.ndarray) -> None:
        """Joins further parts, each given by its own moments, (n, C)."""
        counts = np.vstack([self.count, counts])
        means = np.vstack([self.mean, means])
        total = counts.sum(0)
        mean = (counts * means).sum(0) / np.maximum(total, 1.0)
        within = self._squares + (counts[1:] * variances).sum(0)
        self._squares = within + (counts * np.square(means - mean)).sum(0)
        self.count, self.mean = total, mean


def name_of(layer: Any) -> str:
    return layer.path or layer.name


class _Reached(BaseException):
    """Ends a pass at the layer whose input was wanted."""


def _of_each_example(inputs: Any, mask: Any, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, mean and variance of each example, (n, C) float64; what is masked doesn't count."""
    dtype = keras.backend.result_type(inputs.dtype, "float32")
    values = _by_channel(ops.cast(inputs, dtype), axis)
    if mask is None:
        counts = np.full((values.shape[0], values.shape[2]), float(values.shape[1]))
        means = ops.mean(values, axis=1, keepdims=True)
        variances = ops.mean(ops.square(values - means), axis=1)
        return counts, _float64(means)[:, 0], _float64(variances)
    # As BatchNorm reads a mask: it lacks the last axis, whichever that of the channels is.
    wide = ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), -1), inputs.shape)
    seen = _by_channel(wide, axis)
    sums = ops.sum(ops.cast(seen, dtype), axis=1, keepdims=True)
    divisors = ops.maximum(sums, 1.0)
    # Chosen rather than multiplied: what is masked may be nan.
    means = ops.sum(ops.where(seen, values, 0.0), axis=1, keepdims=True) / divisors
    squares = ops.sum(ops.square(ops.where(seen, values - means, 0.0)), axis=1, keepdims=True)
    return _float64(sums)[:, 0], _float64(means)[:, 0], _float64(squares / divisors)[:, 0]


def _by_channel(inputs: Any, axis: int) -> Any:
    """(n, positions, C)."""
    last = ops.moveaxis(inputs, axis, -1)
    return ops.reshape(last, (last.shape[0], -1, last.shape[-1]))


def _float64(tensor: Any) -> np.ndarray:
    return ops.convert_to_numpy(tensor).astype(np.float64)


def _write(layer: Any, moments: Moments) -> None:
    assign_whole(layer.moving_mean, np.asarray(moments.mean))
    assign_whole(layer.moving_variance, np.asarray(moments.variance))
    if renormalises(layer):
        # Training goes on from these.
        deviation = np.sqrt(moments.variance + layer.epsilon)
        assign_whole(layer.moving_stddev, np.asarray(deviation))
        assign_whole(layer.renorm_mean, np.asarray(moments.mean))
        assign_whole(layer.renorm_stddev, np.asarray(deviation))


@contextmanager
def _listening(found: Sequence[Any], see: Callable[..., None]) -> Iterator[None]:
    """Calls `see(layer, inputs, mask)` before each call of the layers, and leaves no trace."""

    def hook(layer: Any) -> Callable[..., Any]:
        original = layer.call
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            see(layer, next(iter(given.values())), given.get("mask"))
            return original(*args, **kwargs)

        return call

    # Past Keras's __setattr__, which would track it.
    hooks = [(layer, vars(layer).get("call"), hook(layer)) for layer in found]
    try:
        for layer, _, call in hooks:
            vars(layer)["call"] = call
        yield
    finally:
        for layer, own, _ in hooks:
            if own is None:
                vars(layer).pop("call", None)
            else:
                vars(layer)["call"] = own


def _run(model: keras.Model, batch: Batch) -> None:
    """The model's inference; random states and whatever else it would update stay as they are."""
    inputs = map_arrays(ops.convert_to_tensor, batch[0])
    with forward_only(), keras.StatelessScope():
        infer(model, inputs)
