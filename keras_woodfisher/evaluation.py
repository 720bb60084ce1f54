"""The loss of a model on examples, in inference mode and without regularisers."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    return MeanLoss(ModelLoss(model, (), loss))([], batches)


class MeanLoss:
    """The mean loss over examples, as a function of the variables that `loss` is a function of.

    Args:
        loss: The loss of a model.
        compiled: Compiles what is computed of a batch, where that happens often: see `Backend`.
    """

    def __init__(self, loss: ModelLoss, compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f):
        self._loss = loss
        self._of_batch = compiled(
            lambda values, others, batch: loss.measure(batch, loss.predict(values, others, batch))
        )

    def __call__(self, values: Sequence[Any], batches: Iterable[Batch]) -> float:
        """The mean over all examples.

        Args:
            values: A tensor for each of the variables.
            batches: (x, y, sample_weight), leaves (n, ...).
        """
        total = number = 0.0
        with self._loss.sampling_mode(), forward_only():
            _, others = self._loss.values()
            for batch in batches:
                tensors = map_arrays(ops.convert_to_tensor, batch)
                size = len(arrays(batch)[0])
                value = float(ops.convert_to_numpy(self._of_batch(list(values), others, tensors)))
                total += value if self._loss.summed else size * value
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
