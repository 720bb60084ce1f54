"""The memory that taking gradient samples needs, as far as it follows from a model."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree
from keras_woodfisher_backends.keras_internals.models import layers_of
from keras_woodfisher_backends.nest import arrays
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.model.batches import chunk_size
from keras_woodfisher.model.examples import GROUPS_AT_A_TIME
from keras_woodfisher.model.targets import Target

_PLAIN_LOSS, _OTHER_LOSS = 4, 8
"""A loss forward and back over the bytes of its predictions: a cross-entropy (at most 3.9), a focal loss of 7 steps."""

_OUTPUTS = 2.5
"""A pass forward and back over the bytes of all layers' outputs (at most 2.3 on three backends and three models)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a source of gradients takes.

    Attributes:
        chunk: Samples that it takes at a time, if it may.
        sample: Bytes of each of them at most, beside the place where it is kept.
        reading: Bytes of the examples that are read at a time.
        ring: Bytes of the ring of buffered gradients.
        usual: Bytes of each of them as they are with layers that are known; 0 where that is what it is at most.
    """

    chunk: int
    sample: int
    reading: int = 0
    ring: int = 0
    usual: int = 0


@dataclass
class PassBytes:
    """Bytes of one pass forward, in float32, from which those of a pass forward and back follow.

    Attributes:
        outputs: Of the outputs of all layers and operations, and of what activations within layers keep.
        widest: Of the shifted copies that the gradient of a convolution's kernel makes of its input, at the most.
        predictions: Of the model's own outputs, which the loss works on.
        plain: Whether that is a loss of few steps.
    """

    outputs: int = 0
    widest: int = 0
    predictions: int = 0
    plain: bool = True

    @property
    def total(self) -> int:
        loss = _PLAIN_LOSS if self.plain else _OTHER_LOSS
        return int(_OUTPUTS * self.outputs) + self.widest + loss * self.predictions


def sampled_footprint(
    model: keras.Model, targets: list[Target], backend: Backend, rows: int, first: Any, passed: PassBytes
) -> Footprint:
    """The footprint of samples that are taken of data.

    Args:
        model: What is run.
        targets: What is differentiated.
        backend: Tells how many samples a chunk should hold.
        rows: The most samples (m).
        first: A group of b examples, leaves (1, b, ...).
        passed: Bytes of a pass over that group.
    """
    sizes = [target.size for target in targets]
    variables = [target.variable for target in targets]
    leaves = arrays(first)
    chunk = min(rows, chunk_size(backend, model, variables, leaves[0].shape[1]))
    # All gradients in the framework and on the host, and of one variable at a time what they are made of.
    sample = 4 * (2 * sum(sizes) + 2 * max(sizes)) + passed.total
    # The host sees what the framework has, or moves one variable after the other; one product of matrices gives those
    # of a Dense layer as they are needed.
    made = max((target.size for target in targets if not isinstance(target.layer, keras.layers.Dense)), default=0)
    usual = 4 * (sum(sizes) + made) + passed.total
    # Groups that are gathered from arrays at a time are there twice: as they come, and joined with what was left over.
    reading = 2 * min(rows, GROUPS_AT_A_TIME) * sum(leaf.nbytes for leaf in leaves)
    return Footprint(chunk, sample, reading, usual=usual)


def buffered_footprint(targets: list[Target], rows: int) -> Footprint:
    """The footprint of a ring of the training's own gradients, which are read from it a few at a time."""
    width = sum(target.size for target in targets)
    return Footprint(min(rows, BUFFERED_CHUNK), 4 * 2 * width, ring=4 * rows * width)


BUFFERED_CHUNK = 16


def is_plain(losses: Sequence[Any]) -> bool:
    """Whether losses, each as a model was given it, are Keras's own, and none is focal; of one's own code who knows."""
    functions = [loss if isinstance(loss, str) else getattr(loss, "fn", loss) for loss in losses]
    modules = ["keras." if isinstance(f, str) else getattr(f, "__module__", "") for f in functions]
    names = [f if isinstance(f, str) else getattr(f, "__name__", "") for f in functions]
    return bool(losses) and all(m.startswith("keras.") for m in modules) and not any("focal" in n for n in names)


@contextmanager
def counted_outputs(model: keras.Model) -> Iterator[PassBytes]:
    """Adds up what all layers, and the operations between them, put out meanwhile."""
    passed, every = PassBytes(), layers_of(model)
    # Of a functional model's graph, those that are no layers.
    every += [operation for part in every for operation in getattr(part, "operations", ())]
    counted = {id(part): part for part in every if not isinstance(part, keras.Model) and "call" not in vars(part)}
    if "call" not in vars(model):
        counted[id(model)] = model
    try:
        for part in counted.values():
            _count(part, passed, part is model)
        yield passed
    finally:
        for part in counted.values():
            vars(part).pop("call", None)


def _count(part: Any, passed: PassBytes, whole: bool) -> None:
    original = part.call
    activation = getattr(part, "activation", None)
    # Neither of these two keeps what it got.
    kept = callable(activation) and activation not in (keras.activations.linear, keras.activations.relu)
    within = 1 if kept and not isinstance(part, keras.layers.Activation) else 0
    kernel = getattr(part, "kernel_size", None)
    copies = 0 if whole or kernel is None else math.prod(kernel[1:])

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        if whole:
            passed.predictions += _float32_bytes(outputs)
        else:
            passed.outputs += (1 + within) * _float32_bytes(outputs)
        passed.widest = max(passed.widest, copies * _float32_bytes(args))
        return outputs

    # Past Keras's __setattr__, which would track it.
    vars(part)["call"] = call


def _float32_bytes(nest: Any) -> int:
    return sum(4 * int(np.prod(leaf.shape)) for leaf in tree.flatten(nest) if hasattr(leaf, "shape"))
