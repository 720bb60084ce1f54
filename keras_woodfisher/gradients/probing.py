"""What a loss does with the outputs of a few examples: faults that one example alone hides."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.nest import arrays, map_arrays

from keras_woodfisher.model.batches import Batch

_CHANGE = 0.2
"""Outputs are changed by about this part of themselves, then by as much in all, to see what a loss does."""

Measure = Callable[[Batch, Any], Any]
"""The loss of a group of examples and the model's output for them."""


def check_shapes(model: keras.Model, measure: Measure, batch: Batch, prediction: Any) -> None:
    """Refuses labels and sample weights that one group of examples stretches to its outputs, and a batch wouldn't.

    Args:
        model: Tells which axes of its outputs are of one length whatever the batch.
        measure: The loss.
        batch: One group, leaves (b, ...).
        prediction: The model's output for it.

    Raises:
        ValueError: If the loss of some such groups together can't be computed.
    """
    x, y, weight = batch
    size = arrays(x)[0].shape[0]
    axes = {axis for leaf in arrays((y, weight, prediction)) for axis in leaf.shape[1:]}
    if not arrays((y, weight)) or (size > 1 and size not in axes) or _grows(model, prediction, size):
        return
    times = next(times for times in itertools.count(2) if times * size not in axes)

    def repeated(leaf: Any) -> Any:
        array = ops.convert_to_numpy(leaf)
        several = np.concatenate([array] * times) if array.ndim and array.shape[0] == size else array
        return ops.convert_to_tensor(several)

    try:
        backend = get_backend(keras.backend.backend())
        backend.dry_call(lambda given: measure(*given), map_arrays(repeated, (batch, prediction)))
    except Exception as error:
        given = f"labels of shape {_shapes(y)}" + (f" and sample weights {_shapes(weight)}" if arrays(weight) else "")
        raise ValueError(
            f"data holds {given}, which don't fit the outputs of shape {_shapes(prediction)}: the loss of {size} of "
            f"these examples can be computed, but not that of {times * size}, as training does. Give what `fit` takes. "
            f"({error})"
        ) from error


def _grows(model: keras.Model, prediction: Any, size: int) -> bool:
    """Whether an output may have a further axis as long as the batch, as similarities of its examples do."""
    leaves, outputs = arrays(prediction), arrays(getattr(model, "outputs", None))
    known = [tuple(output.shape) for output in outputs] if len(outputs) == len(leaves) else [()] * len(leaves)
    return any(
        length == size and fixed is None
        for leaf, shape in zip(leaves, known, strict=True)
        for length, fixed in itertools.zip_longest(leaf.shape[1:], shape[1:])
    )


def _shapes(nest: Any) -> str:
    return ", ".join(str(("n", *leaf.shape[1:])).replace("'", "") for leaf in arrays(nest)) or "none"


def depends(measure: Measure, batch: Batch, prediction: Any) -> bool:
    """Whether the loss of a group of examples changes when the model's outputs do."""
    rng = np.random.default_rng(0)

    def somewhere(leaf: Any) -> Any:
        return ops.convert_to_tensor((0.5 + rng.random(leaf.shape)).astype(np.float32))

    def changed(leaf: Any, parts: bool) -> Any:
        array = ops.convert_to_numpy(leaf).astype(np.float32)
        noise = _CHANGE * rng.standard_normal(array.shape)
        return ops.convert_to_tensor((array * (1.0 + noise) if parts else array + noise).astype(np.float32))

    # Zeros stand for outputs that weren't computed, see `Backend.outlined`; losses may have an edge there.
    prediction = map_arrays(lambda leaf: leaf if np.any(ops.convert_to_numpy(leaf)) else somewhere(leaf), prediction)
    before = _value(measure, batch, prediction)
    for parts in (True, False, True, False):
        after = _value(measure, batch, map_arrays(lambda leaf, parts=parts: changed(leaf, parts), prediction))
        if np.isfinite(after) and not abs(after - before) <= 1e-5 * max(1.0, abs(before)):
            return True
    return False


def check_examples_alone(predict: Callable[[Any], Any], measure: Measure, groups: Sequence[Batch]) -> None:
    """Refuses groups that are too small for a loss that compares the examples of a batch with each other.

    Args:
        predict: The model, from inputs to outputs.
        measure: The loss.
        groups: Some groups of examples, leaves (b, ...).

    Raises:
        ValueError: If the loss of none of them depends on the outputs, but that of all of them together does, and isn't
            the mean or the sum of theirs.
    """
    alone = []
    for group in groups:
        value, answers = _look(predict, measure, group)
        if answers:
            return
        alone.append(value)
    together, answers = _look(predict, measure, map_arrays(lambda *leaves: np.concatenate(leaves), *groups))
    # Of a loss that is flat for these examples, another one may not be.
    if not answers or any(abs(together - by(alone)) <= 1e-3 * max(1.0, abs(together)) for by in (np.mean, np.sum)):
        return
    size = len(arrays(groups[0])[0])
    few = "one example alone" if size == 1 else f"{size} examples"
    raise ValueError(
        f"The loss of {few} doesn't depend on the model's outputs, but that of {size * len(groups)} examples "
        "together does: it compares the examples of a batch with each other, as contrastive and triplet losses do. "
        f"Samples of grad_batch_size={size} are all zero then. Give each sample as many examples as a batch of "
        "training has: grad_batch_size=32, say."
    )


def _look(predict: Callable[[Any], Any], measure: Measure, batch: Batch) -> tuple[float, bool]:
    """The loss of a group, and whether it depends on the outputs."""
    tensors = map_arrays(ops.convert_to_tensor, batch)
    prediction = predict(tensors[0])
    return _value(measure, tensors, prediction), depends(measure, tensors, prediction)


def _value(measure: Measure, batch: Batch, prediction: Any) -> float:
    return float(ops.convert_to_numpy(measure(batch, prediction)))
