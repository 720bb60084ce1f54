"""BatchNorm re-estimation: the moving statistics of a pruned model, measured anew on training examples."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from keras_woodfisher_backends.nest import arrays, map_arrays

from keras_woodfisher.evaluation import mean_loss
from keras_woodfisher.examples import Batch, open_examples
from keras_woodfisher.options import count

_WORSE = 1.25
"""A dense model whose loss on the data grows by this factor doesn't keep its accuracy."""


@dataclass(frozen=True)
class BatchNormReport:
    """The outcome of `reestimate_batchnorm`; `print` it.

    Attributes:
        layers: The layers whose statistics were measured, in the order in which they are called.
        left_alone: BatchNorm layers that are frozen or aren't called.
        examples: Examples that were used.
        dense_loss: The dense model's loss on them with its own statistics, and with measured ones; None without a
            dense model.
    """

    layers: tuple[str, ...]
    left_alone: tuple[str, ...]
    examples: int
    dense_loss: tuple[float, float] | None = None

    @property
    def dense_keeps_accuracy(self) -> bool | None:
        """Whether the data suits the model: its own statistics come out again. None where it wasn't checked."""
        return None if self.dense_loss is None else self.dense_loss[1] <= _WORSE * self.dense_loss[0] + 1e-3

    def __str__(self) -> str:
        lines = [f"BatchNorm: {len(self.layers)} layers re-estimated on {self.examples:,} examples"]
        if self.left_alone:
            lines.append(f"left alone (frozen or not called): {', '.join(self.left_alone)}")
        if self.dense_loss is not None:
            before, after = self.dense_loss
            lines.append(f"the dense model's loss on them: {before:.4f}, re-estimated in the same way {after:.4f}")
        return "\n".join(lines)


def reestimate_batchnorm(
    model: keras.Model,
    data: Any,
    *,
    dense: keras.Model | None = None,
    loss: Any = None,
    num_examples: int | None = None,
    batch_size: int = 256,
    seed: int | None = 0,
) -> BatchNormReport:
    """Measures the moving mean and variance of each BatchNorm layer anew; nothing else is changed.

    Pruning shifts what each layer gets, and the statistics from before don't fit any more. Layer after layer, in the
    order in which they are called, mean and variance of a layer's input over all examples replace its moving
    statistics, the layers before it being done already. No momentum is involved and no average of averages: both are
    exact over the examples, however they are batched. The model runs in inference mode, once a layer up to that layer.

    The examples must be what the model was trained on, *with the training's augmentation*: plain images have other
    statistics than cropped and flipped ones, and with them even a dense model loses accuracy. Give the dense model to
    have that checked.

    Args:
        model: A built Keras model, usually one that was pruned.
        data: Training examples, as in `prune`; labels are needed only with `dense`.
        dense: The model before pruning. Its statistics are measured in the same way, its loss is compared, and a
            warning says if it gets worse; then it is put back as it was.
        loss: A Keras loss for `dense`, by default the one that it was compiled with.
        num_examples: Examples to use; by default all (of arrays), which are drawn with `seed`.
        batch_size: Examples of arrays in one batch. It doesn't influence the result.
        seed: Of the choice of examples from arrays.

    Returns:
        Which layers were done, and the dense model's losses.

    Raises:
        ValueError: If the model has no BatchNorm layer, the data is empty, or a statistic isn't finite (then nothing
            is changed).
    """
    batches = _Batches(data, num_examples, batch_size, seed)
    checked = None if dense is None else dense_loss(dense, batches, loss)
    done, others, number = reestimate(model, batches)
    report = BatchNormReport(done, others, number, checked)
    warn_if_worse(report)
    return report


def dense_loss(model: keras.Model, batches: "_Batches", loss: Any) -> tuple[float, float]:
    """A model's loss on examples with its own statistics and with measured ones; it is left as it was."""
    before = _statistics(model)
    try:
        own = mean_loss(model, batches, loss)
        reestimate(model, batches)
        return own, mean_loss(model, batches, loss)
    finally:
        _restore(before)


def warn_if_worse(report: BatchNormReport) -> None:
    if report.dense_keeps_accuracy is False and report.dense_loss is not None:
        before, after = report.dense_loss
        warnings.warn(
            f"The dense model's loss on this data grows from {before:.4g} to {after:.4g} when its BatchNorm statistics "
            "are measured on it, so the data isn't what the model was trained on, and the pruned model suffers in the "
            "same way. Give training examples with the training's augmentation (a dataset or a callable), or leave "
            "BatchNorm as it is.",
            stacklevel=3,
        )


def reestimate(model: keras.Model, batches: "_Batches") -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Measures all layers; if one fails, all are as before. Returns those done, the others, and the examples."""
    found = [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]
    if not found:
        raise ValueError(f"The model {model.name!r} has no BatchNormalization layer, so there is nothing to measure.")
    if not model.built:
        raise ValueError("The model isn't built: call it on a batch first.")
    before = _statistics(model)
    try:
        with _forward_only(model):
            ordered = _call_order(model, [layer for layer in found if layer.trainable], batches.first())
            number = 0
            for layer in ordered:
                number = _measure(model, layer, batches)
    except BaseException:
        _restore(before)
        raise
    done = {id(layer) for layer in ordered}
    return tuple(_name(x) for x in ordered), tuple(_name(x) for x in found if id(x) not in done), number


class _Batches:
    """Batches of examples that can be read again and again."""

    def __init__(self, data: Any, most: int | None, size: int, seed: Any):
        self._examples = open_examples(data)
        self._most = None if most is None else count("num_examples", most)
        self._size = count("batch_size", size)
        self._seed = seed

    def __iter__(self) -> Iterator[Batch]:
        most = sys.maxsize // 2 if self._most is None else self._most
        for groups in self._examples.groups(min(most, self._examples.available or most), 1, self._seed):
            whole = map_arrays(lambda array: array[:, 0], groups)
            for start in range(0, len(arrays(whole)[0]), self._size):
                yield map_arrays(lambda array, start=start: array[start : start + self._size], whole)

    def first(self) -> Batch:
        """The first one.

        Raises:
            ValueError: If there is none.
        """
        for batch in self:
            return batch
        raise ValueError("data holds no example. Give training examples, with the training's augmentation.")


class _Reached(BaseException):
    """Ends a pass at the layer whose input was wanted."""


def _call_order(model: keras.Model, found: Sequence[Any], batch: Batch) -> list[Any]:
    """The layers in the order of their first call."""
    order: dict[int, Any] = {}
    with _listening(found, lambda layer, *_: order.setdefault(id(layer), layer)):
        _run(model, batch)
    return list(order.values())


def _measure(model: keras.Model, layer: Any, batches: _Batches) -> int:
    """Mean and variance of a layer's input; returns the number of examples."""
    moments = _Moments(layer)
    calls = _calls(model, layer, batches.first())
    number = 0
    for batch in batches:
        left = calls

        def see(layer: Any, inputs: Any, mask: Any) -> None:
            nonlocal left
            moments.add(inputs, mask)
            left -= 1
            if not left:
                raise _Reached

        with _listening([layer], see), suppress(_Reached):
            _run(model, batch)
        number += len(arrays(batch)[0])
    moments.write()
    return number


def _calls(model: keras.Model, layer: Any, batch: Batch) -> int:
    """How often a model calls a layer."""
    seen = []
    with _listening([layer], lambda *_: seen.append(1)):
        _run(model, batch)
    return len(seen)


class _Moments:
    """Mean and variance of a stream of batches, joined in float64 (Chan, Golub & LeVeque 1983)."""

    def __init__(self, layer: Any):
        self._layer = layer
        self._weight = 0.0
        self._mean = np.zeros(layer.moving_mean.shape)
        self._squares = np.zeros(layer.moving_mean.shape)

    def add(self, inputs: Any, mask: Any) -> None:
        """One more call of the layer."""
        mean, variance, weight = _mean_and_variance(ops.cast(inputs, "float32"), mask, self._layer._reduction_axes)
        if not weight:
            return
        total = self._weight + weight
        step = mean - self._mean
        self._mean = self._mean + step * (weight / total)
        self._squares = self._squares + weight * variance + step**2 * (self._weight * weight / total)
        self._weight = total

    def write(self) -> None:
        variance = self._squares / self._weight
        if not (np.isfinite(self._mean).all() and np.isfinite(variance).all()):
            raise ValueError(f"What {_name(self._layer)} gets on this data isn't finite; nothing was changed.")
        self._layer.moving_mean.assign(self._mean)
        self._layer.moving_variance.assign(variance)


def _mean_and_variance(inputs: Any, mask: Any, axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, float]:
    """Of one call, with the number of positions; those that are masked don't count. Two passes, which don't cancel."""
    size = float(np.prod([inputs.shape[axis] for axis in axes]))
    if mask is None:
        seen = ops.ones((1,) * len(inputs.shape))
    else:
        seen = ops.expand_dims(ops.cast(mask, "float32"), -1)
        size = float(ops.convert_to_numpy(ops.sum(seen)))
    weights = seen / max(size, 1.0)
    mean = ops.sum(inputs * weights, axes, keepdims=True)
    variance = ops.sum(ops.square(inputs - mean) * weights, axes)
    return *(np.asarray(ops.convert_to_numpy(m), np.float64).ravel() for m in (mean, variance)), size


@contextmanager
def _listening(found: Sequence[Any], see: Callable[..., Any]) -> Iterator[None]:
    """Calls `see(layer, inputs, mask)` before each call of the layers, and leaves no trace."""

    def hook(layer: Any) -> Callable[..., Any]:
        original = layer.call

        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            see(layer, inputs, mask)
            return original(inputs, training=training, mask=mask)

        return call

    try:
        for layer in found:
            vars(layer)["call"] = hook(layer)
        yield
    finally:
        for layer in found:
            vars(layer).pop("call", None)


def _run(model: keras.Model, batch: Batch) -> None:
    x = map_arrays(ops.convert_to_tensor, batch[0])
    if model._call_has_training_arg:
        model(x, training=False)
    else:
        model(x)


@contextmanager
def _forward_only(model: keras.Model) -> Iterator[None]:
    """On torch, keeps no graph for a backward pass."""
    torch = sys.modules.get("torch") if keras.backend.backend() == "torch" else None
    with torch.no_grad() if torch else nullcontext():
        yield


def _statistics(model: keras.Model) -> list[tuple[Any, Any]]:
    found = [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]
    return [(v, ops.copy(v)) for layer in found for v in (layer.moving_mean, layer.moving_variance)]


def _restore(statistics: Sequence[tuple[Any, Any]]) -> None:
    for variable, values in statistics:
        variable.assign(values)


def _name(layer: Any) -> str:
    return layer.path or layer.name
