"""The gradient samples that an update would use, for benchmarks of what comes after them."""

from collections.abc import Callable

import keras
import numpy as np

from keras_woodfisher.gradients.footprint import Footprint
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.memory.store import GradientStore, MemoryStore
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner


def gradients(model: keras.Model, data: tuple, rows: int, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """G of the unpruned weights, and their number in each variable."""
    options = PruningOptions(num_grads=rows, seed=seed, verbose=0)
    pruner = Pruner(model, options)
    pruner.find_zeros()
    source = SampledGradients(model, pruner.targets, options, pruner.backend, open_examples(data))
    source.check(rows)
    kept = [~pruned for pruned in pruner.pruned]
    store = MemoryStore((rows, int(sum(mask.sum() for mask in kept))), rows)
    source.fill(store, kept, rows, 0, lambda number: None)
    return store.block(slice(0, store.shape[1])), [int(mask.sum()) for mask in kept]


class GivenGradients:
    """A gradient source that costs nothing: samples taken before, for weights none of which was pruned then."""

    slow_layers = None

    def __init__(self, grads: np.ndarray):
        self._grads = grads

    def check(self, rows: int) -> None:
        """Nothing to check."""

    def footprint(self, rows: int) -> Footprint:
        """Nothing beside what is there already."""
        return Footprint(rows, 0)

    def fill(self, store: GradientStore, kept: list, rows: int, draw: int, advance: Callable[[int], None]) -> float:
        """The samples that were given."""
        for start in range(0, min(rows, len(self._grads)), store.chunk):
            part = self._grads[start : min(start + store.chunk, rows)]
            store.room(len(part))[...] = part
            store.keep(np.ones(len(part), bool))
        advance(rows)
        return sum(float(np.dot(row, row)) for row in self._grads[:rows])
