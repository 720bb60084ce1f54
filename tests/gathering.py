"""All samples of a source as one array."""

import numpy as np

from keras_woodfisher.gradients.footprint import Footprint
from keras_woodfisher.memory.store import MemoryStore


def gathered(source, kept, rows, draw=0, chunk=None):
    """(m, d) float32."""
    store = MemoryStore((rows, int(sum(mask.sum() for mask in kept))), chunk or rows)
    source.fill(store, kept, rows, draw, lambda number: None)
    return store.block(slice(0, store.shape[1]))


def stored(grads):
    """A store of samples (m, d)."""
    store = MemoryStore(grads.shape, max(len(grads), 1))
    store.room(len(grads))[...] = grads
    store.keep(np.ones(len(grads), bool))
    return store


def add_rows(store, rows, good):
    """Puts samples (n, d), of which those that are good are to be kept, into a store, chunk by chunk."""
    for start in range(0, len(rows), store.chunk):
        part = slice(start, min(start + store.chunk, len(rows)))
        store.room(part.stop - start)[...] = rows[part]
        store.keep(good[part])


class GivenGradients:
    """A source whose G is known to the test: (m, all weights) in weight order."""

    def __init__(self, grads):
        self.grads = grads
        self.asked = []

    slow_layers = None

    def check(self, rows):
        pass

    def footprint(self, rows):
        return Footprint(rows, 4 * self.grads.shape[1])

    def fill(self, store, kept, rows, draw, advance):
        self.asked.append((rows, draw))
        part = np.ascontiguousarray(self.grads[:rows, np.concatenate(kept)])
        add_rows(store, part, np.ones(len(part), bool))
        advance(len(part))
        return float(np.square(part, dtype=np.float64).sum())
