"""The loss of a model on examples, in inference mode and without regularisers."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
from keras import ops
from keras_woodfisher_backends.nest import arrays, map_arrays

from keras_woodfisher.examples import Batch
from keras_woodfisher.gradients import ModelLoss


def mean_loss(model: keras.Model, batches: Iterable[Batch], loss: Any = None) -> float:
    """The mean over all examples, with the model's present weights.

    Args:
        model: A built model.
        batches: (x, y, sample_weight), leaves (n, ...).
        loss: A Keras loss instead of the compiled one.
    """
    of = ModelLoss(model, (), loss)
    return mean_loss_at(of, [], batches)


def mean_loss_at(loss: ModelLoss, values: Sequence[Any], batches: Iterable[Batch]) -> float:
    """The mean over all examples, with other weights in place of the variables that `loss` is a function of.

    Args:
        loss: The loss of a model.
        values: A tensor for each of those variables.
        batches: (x, y, sample_weight), leaves (n, ...).
    """
    total = number = 0.0
    with loss.sampling_mode(), forward_only():
        _, others = loss.values()
        for batch in batches:
            tensors = map_arrays(ops.convert_to_tensor, batch)
            size = len(arrays(batch)[0])
            prediction = loss.predict(values, others, tensors)
            total += size * float(ops.convert_to_numpy(loss.measure(tensors, prediction)))
            number += size
    if not number:
        raise ValueError("data holds no example.")
    return total / number


@contextmanager
def forward_only() -> Iterator[None]:
    """On torch, keeps no graph for a backward pass."""
    torch = sys.modules.get("torch") if keras.backend.backend() == "torch" else None
    with torch.no_grad() if torch else nullcontext():
        yield
