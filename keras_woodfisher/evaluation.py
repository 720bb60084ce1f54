"""The loss of a model on examples, in inference mode and without regularisers."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops
from keras_woodfisher_backends.nest import arrays, map_arrays

from keras_woodfisher.examples import Batch
from keras_woodfisher.gradients import ModelLoss


def mean_loss(model: keras.Model, batches: Iterable[Batch], loss: Any = None) -> float:
    """The mean over all examples.

    Args:
        model: A built model.
        batches: (x, y, sample_weight), leaves (n, ...).
        loss: A Keras loss instead of the compiled one.
    """
    of = ModelLoss(model, (), loss)
    total = number = 0.0
    with of.sampling_mode():
        values, others = of.values()
        for batch in batches:
            tensors = map_arrays(ops.convert_to_tensor, batch)
            size = len(arrays(batch)[0])
            prediction = of.predict(values, others, tensors)
            total += size * float(ops.convert_to_numpy(of.measure(tensors, prediction)))
            number += size
    if not number:
        raise ValueError("data holds no example.")
    return total / number
