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
from keras_woodfisher_backends.nest import arrays, shapes_of, take
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.oneshot.reconstruction.passes import Survey
from keras_woodfisher.oneshot.reconstruction.problem import Problem
from keras_woodfisher.oneshot.reconstruction.sides import has_values

MIXED = "the first axis of its input isn't that of the examples"
ROUTED = "the values of the examples decide which rows its layer gets"

_LOOKED_AT = 4
"""Single examples whose calls are compared, where they may depend on values."""


def learn_rows(
    model: keras.Model, problems: Sequence[Problem], backend: Backend, batches: Sequence[Any]
) -> dict[int, str]:
    """Has problems learn how many rows an example gives in each call of their layer.

    Shapes tell most: twice as many examples must give twice as many rows, and one example as many as another. Where an
    example has several rows, two pairs of examples are looked at that have the first one in common: so must their rows.

    Args:
        model: A built model.
        problems: Which.
        backend: Calls the model for its shapes.
        batches: Inputs of the model, leaves (N, ...), those of each shape together.

    Returns:
        Why examples can't be told apart, for the layers where they can't, by id.
    """
    survey, batch = Survey(model, problems), batches[0]
    number = len(arrays(batch)[0])

    def calls(x: Any) -> dict[int, list[tuple[int, bool]]]:
        found: list[dict[int, list[tuple[int, bool]]]] = []
        backend.dry_call(lambda x: found.append(survey.inputs(x, lambda t: (int(t.shape[0]), has_values(t)))), x)
        return found[-1]

    def sizes(x: Any) -> dict[int, list[int]]:
        return {layer: [rows for rows, _ in found] for layer, found in calls(x).items()}

    first = calls(take(batch, slice(0, 1)))
    once = {layer: [rows for rows, _ in found] for layer, found in first.items()}
    twice = sizes(take(batch, np.array([0, number - 1])))
    why = {layer: MIXED for layer, rows in once.items() if [2 * size for size in rows] != twice.get(layer)}
    if any(valued for found in first.values() for _, valued in found):
        for place in np.unique(np.linspace(0, number - 1, _LOOKED_AT).astype(int))[1:]:
            other = sizes(take(batch, slice(place, place + 1)))
            why |= {layer: ROUTED for layer in {*once, *other} if once.get(layer) != other.get(layer)}
    if number > 1 and any(max(rows) > 1 for layer, rows in once.items() if layer not in why):
        with_another, with_itself = (
            survey.inputs(take(batch, np.array([0, place])), _values) for place in (number - 1, 0)
        )
        apart = {layer for layer, found in with_another.items() if not _begin_alike(found, with_itself.get(layer, []))}
        why = {**dict.fromkeys(apart, MIXED), **why}
    every = {shapes_of(batch): once, **{shapes_of(x): sizes(take(x, slice(0, 1))) for x in batches[1:]}}
    for problem in problems:
        layer = id(problem.layer)
        problem.rows = {shapes: rows[layer] for shapes, rows in every.items() if layer in rows}
    return why


def _values(leaf: Any) -> np.ndarray | None:
    return ops.convert_to_numpy(leaf) if has_values(leaf) else None


def _begin_alike(some: Sequence[np.ndarray | None], others: Sequence[np.ndarray | None]) -> bool:
    """Whether the first halves of the inputs of two series of calls are the same, as far as there are values."""
    if len(some) != len(others):
        return False
    return all(
        _same_half(one, other) for one, other in zip(some, others, strict=True) if one is not None and other is not None
    )


def _same_half(one: np.ndarray, other: np.ndarray) -> bool:
    half = len(one) // 2
    close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(one).max(initial=0.0)}
    return one.shape == other.shape and np.allclose(one[:half], other[:half], **close)
