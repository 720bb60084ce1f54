"""Where one pass ended the next one goes on: what comes before a layer is computed once, not anew for each layer.

Where examples are worked on a part at a time, each pass solves a few layers. All that is computed before the first one
of them comes out the same in each later pass, since the layers before it are solved.
"""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras_woodfisher_backends.keras_internals.graphs import Graph, Graphs, Snapshot, is_graph

from keras_woodfisher.oneshot.reconstruction.padding import KnownMasks
from keras_woodfisher.oneshot.reconstruction.passes import Passes

_NUMBER = 4
"""Bytes of a number: passes compute in float32."""


def amid_bytes(model: keras.Model) -> int:
    """Bytes that a model holds of one example between two calls, the median over the places; 0: it can't go on."""
    whole = Graphs(model).whole if is_graph(model) else None
    median = statistics.median(whole.sizes) if whole is not None and whole.sizes else math.inf
    return 0 if math.isinf(median) else int(_NUMBER * median)


class Snapshots:
    """What a functional model holds amid a pass, of each part of the examples.

    Args:
        passes: Of the model.
        room: How many bytes it may be.
        examples: How many there are; of each, both sides are kept.
    """

    def __init__(self, passes: Passes, room: int, examples: int):
        self._passes = passes
        self._graph: Graph | None = passes.graphs.whole if room else None
        self._most = room / (2 * _NUMBER * max(1, examples))
        self._kept: dict[int, Snapshot] = {}

    @contextmanager
    def going_on(self, number: int, layer: Any, masks: KnownMasks) -> Iterator[None]:
        """Has a pass begin at what was kept of a part, and keep what the next one can begin at.

        Args:
            number: Which part of the examples it is over.
            layer: The first layer that isn't solved yet.
            masks: The masks that the pass meets; later passes wouldn't.
        """
        graph = self._graph
        if graph is None:
            yield
            return
        graph.begin, graph.keep_at = self._kept.get(number), self._latest(graph, layer)
        try:
            yield
            kept = graph.kept
        finally:
            graph.begin = graph.keep_at = graph.kept = None
        if masks or self._passes.has_updated():
            self._graph = None
            self._kept.clear()
        elif kept is not None:
            self._kept[number] = kept

    def _latest(self, graph: Graph, layer: Any) -> int | None:
        """The last place before a layer at which what is known is small enough to be kept."""
        place = graph.place_of(layer)
        fitting = (p for p in range(-1 if place is None else place, 0, -1) if graph.sizes[p] <= self._most)
        return next(fitting, None)
