"""The memory that taking gradient samples needs, as far as it follows from a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree
from keras_woodfisher_backends.keras_internals.models import layers_of
from keras_woodfisher_backends.nest import arrays
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.data.batches import chunk_size
from keras_woodfisher.data.examples import GROUPS_AT_A_TIME
from keras_woodfisher.model.targets import Target

_OUTPUTS = 2.5
"""A pass forward and back over the bytes of all layers' outputs (at most 2.3 on three backends and three models)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a source of gradients takes.

    Attributes:
        chunk: Samples that it takes at a time, if it may.
        sample: Bytes of each of them, beside the place where it is kept.
        reading: Bytes of the examples that are read at a time.
        ring: Bytes of the ring of buffered gradients.
    """

    chunk: int
    sample: int
    reading: int = 0
    ring: int = 0


def sampled_footprint(
    model: keras.Model, targets: list[Target], backend: Backend, rows: int, first: Any, outputs: int
) -> Footprint:
    """The footprint of samples that are taken of data.

    Args:
        model: What is run.
        targets: What is differentiated.
        backend: Tells how many samples a chunk should hold.
        rows: The most samples (m).
        first: A group of b examples, leaves (1, b, ...).
        outputs: Bytes of the outputs of all layers for that group.
    """
    sizes = [target.size for target in targets]
    variables = [target.variable for target in targets]
    leaves = arrays(first)
    chunk = min(rows, chunk_size(backend, model, variables, leaves[0].shape[1]))
    # All gradients in the framework and on the host, and of one variable at a time what they are made of.
    sample = 4 * (2 * sum(sizes) + 2 * max(sizes)) + int(_OUTPUTS * outputs)
    # Groups that are gathered from arrays at a time are there twice: as they come, and joined with what was left over.
    return Footprint(chunk, sample, 2 * min(rows, GROUPS_AT_A_TIME) * sum(leaf.nbytes for leaf in leaves))


def buffered_footprint(targets: list[Target], rows: int) -> Footprint:
    """The footprint of a ring of the training's own gradients, which are read from it a few at a time."""
    width = sum(target.size for target in targets)
    return Footprint(min(rows, BUFFERED_CHUNK), 4 * 2 * width, ring=4 * rows * width)


BUFFERED_CHUNK = 16


@contextmanager
def counted_outputs(model: keras.Model) -> Iterator[list[int]]:
    """Adds up, in a list of one number, the bytes that all layers put out meanwhile, in float32."""
    total = [0]
    layers = [layer for layer in layers_of(model) if not isinstance(layer, keras.Model)]
    layers = [layer for layer in layers if "call" not in vars(layer)]
    try:
        for layer in layers:
            _count(layer, total)
        yield total
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def _count(layer: Any, total: list[int]) -> None:
    original = layer.call

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        total[0] += sum(4 * int(np.prod(leaf.shape)) for leaf in tree.flatten(outputs) if hasattr(leaf, "shape"))
        return outputs

    # Past Keras's __setattr__, which would track it.
    vars(layer)["call"] = call
