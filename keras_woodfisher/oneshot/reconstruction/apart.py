"""Which layers take one example after the other along the first axis of their input.

A walk puts the examples of the dense model before those of the pruned one. That tells nothing in layers of which the
first axis is another one: those that work on a table of positions or on learned queries, on time steps, or on two views
of the examples that were put one after the other.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.nest import arrays, take
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.oneshot.reconstruction.problem import Problem
from keras_woodfisher.oneshot.reconstruction.sides import has_values
from keras_woodfisher.oneshot.reconstruction.walk import Walk

MIXED = "the first axis of its input isn't that of the examples"


def mixed_layers(model: keras.Model, problems: Sequence[Problem], backend: Backend, batch: Any) -> set[int]:
    """The layers of some problems whose examples can't be told apart, by id.

    Shapes tell of most: twice as many examples must give twice as many rows. Where an example has several rows, two
    pairs of examples are looked at that have the first one in common: so must their rows.

    Args:
        model: A built model.
        problems: Whose layers.
        backend: Calls the model for its shapes.
        batch: Some inputs, leaves (N, ...).
    """
    walk, number = Walk(model, problems), len(arrays(batch)[0])

    def sizes(*examples: int) -> dict[int, list[int]]:
        found: list[dict[int, list[int]]] = []
        x = take(batch, np.array(examples))
        backend.dry_call(lambda x: found.append(walk.inputs(x, lambda leaf: int(leaf.shape[0]))), x)
        return found[-1]

    once, twice = sizes(0), sizes(0, number - 1)
    mixed = {layer for layer, rows in once.items() if [2 * size for size in rows] != twice.get(layer)}
    if number > 1 and any(max(rows) > 1 for layer, rows in once.items() if layer not in mixed):
        with_another, with_itself = (
            walk.inputs(take(batch, np.array([0, place])), _values) for place in (number - 1, 0)
        )
        pairs = {layer: zip(found, with_itself[layer], strict=True) for layer, found in with_another.items()}
        mixed |= {layer for layer, calls in pairs.items() if not all(_begin_alike(*call) for call in calls)}
    return mixed


def _values(leaf: Any) -> np.ndarray | None:
    return ops.convert_to_numpy(leaf) if has_values(leaf) else None


def _begin_alike(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return True
    half = len(one) // 2
    return bool(np.allclose(one[:half], other[:half], rtol=1e-3, atol=1e-4 * np.abs(one).max(initial=0.0)))
