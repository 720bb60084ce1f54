"""Inputs that are tokens: each must be one that the model has an embedding for.

Frameworks differ in what they make of another one: an error that names neither token nor table, or NaN.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.graphs import looked_up
from keras_woodfisher_backends.nest import arrays

from keras_woodfisher.model.inputs import check_inputs


class TokenInput(NamedTuple):
    """An input of a functional model that goes to an Embedding as it is.

    Attributes:
        place: Among the inputs.
        name: Of the input.
        layer: The Embedding's name.
        number: How many tokens it has.
    """

    place: int
    name: str
    layer: str
    number: int


def token_inputs(model: keras.Model) -> list[TokenInput]:
    """Those of a model; none where its own code says what happens to inputs."""
    return [
        TokenInput(place, model.inputs[place].name, table.name, int(table.input_dim))
        for place, table in looked_up(model)
    ]


def check_tokens(inputs: Iterable[TokenInput], x: Any) -> None:
    """Refuses tokens that an Embedding doesn't have.

    Args:
        inputs: Which inputs to look at.
        x: What the model gets: NumPy arrays, nested as its inputs are, or a dictionary by their names.

    Raises:
        ValueError: With the first such token.
    """
    for place, name, layer, number in inputs:
        leaves = arrays(x)
        values = x.get(name) if isinstance(x, Mapping) else leaves[place] if place < len(leaves) else None
        if values is None or not np.size(values):
            continue
        values = np.asarray(values)
        wrong = values[~((values >= 0) & (values < number))]
        if wrong.size:
            raise ValueError(
                f"data holds the token {wrong[0].item()}, but {layer!r} has {number} embeddings, for the tokens 0 to "
                f"{number - 1}. Use the tokens that the model was trained with, or give the Embedding a larger "
                "input_dim."
            )


def checked(model: keras.Model, batches: Iterable[Any]) -> Iterator[Any]:
    """The same inputs, if they fit the model and each token has an embedding."""
    inputs = token_inputs(model)
    for x in batches:
        check_inputs(model, x)
        check_tokens(inputs, x)
        yield x
