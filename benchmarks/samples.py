"""The gradient samples that an update would use, for benchmarks of what comes after them."""

import keras
import numpy as np

from keras_woodfisher.meter import Meter
from keras_woodfisher.options import PruningOptions
from keras_woodfisher.pruner import Pruner
from keras_woodfisher.sources import SampledGradients


def gradients(model: keras.Model, data: tuple, rows: int, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """G of the unpruned weights, and their number in each variable."""
    options = PruningOptions(num_grads=rows, seed=seed, verbose=0)
    pruner = Pruner(model, options)
    pruner.find_zeros()
    source = SampledGradients(model, pruner.targets, options, pruner.backend, data)
    source.check(rows)
    kept = [~pruned for pruned in pruner.pruned]
    grads = source.collect(kept, rows, 0, Meter(pruner.backend, ["cpu"], 0))
    return grads, [int(mask.sum()) for mask in kept]


class GivenGradients:
    """A gradient source that costs nothing: samples taken before, for weights none of which was pruned then."""

    def __init__(self, grads: np.ndarray):
        self._grads = grads

    def check(self, rows: int) -> None:
        """Nothing to check."""

    def collect(self, kept: list[np.ndarray], rows: int, draw: int, meter: Meter) -> np.ndarray:
        """The samples that were given."""
        return self._grads[:rows]
