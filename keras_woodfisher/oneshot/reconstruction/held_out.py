"""How far the outputs of a pruned model are from those of the dense one, on examples that nothing was fitted to."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree
from keras_woodfisher_backends.keras_internals.graphs import Graphs, sigmoid_outputs
from keras_woodfisher_backends.keras_internals.models import float32_computation, infer
from keras_woodfisher_backends.nest import arrays, map_arrays
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.gradients.loss import forward_only
from keras_woodfisher.memory.free_memory import give_back_memory
from keras_woodfisher.model.batches import cut
from keras_woodfisher.model.targets import Target

_TINY = 1e-7
"""Smallest probability that differs from zero, as in Keras's losses."""

HUGE = 1e8
"""Numbers of this size stand for what is ruled out."""

_SUM = 1e-3
"""Numbers whose sums are so close to one are probabilities."""

_CONSTANT = 1e-3
"""An output that differs between examples by less than this part of what the dense one does tells nothing of them."""


class Closeness(NamedTuple):
    """How near a pruned model is to the dense one; the smaller, the nearer.

    Attributes:
        constant: Whether an output no longer depends on the example. Its distance is about that of the mean, smaller
            than that of many an output that tells examples apart, and can be mended.
        distance: See `output_distance`; infinite where an output isn't finite.
    """

    constant: bool
    distance: float


class HeldOutOutputs:
    """The outputs of a model on held-out examples, and the distance of a pruned one's from them.

    Args:
        model: The dense model.
        targets: The variables that are pruned.
        batches: Inputs, leaves (N, ...).
        size: Examples to look at at a time.

    Attributes:
        complete: Whether all outputs of the model tell something of each example.
    """

    def __init__(self, model: keras.Model, targets: Sequence[Target], batches: Sequence[Any], size: int):
        self._model = model
        self._targets = targets
        self._batches = [part for batch in batches for part in cut(batch, size)]
        self.complete = True
        self._dense = self._outputs(None)

    def distance(self, kernels: Sequence[np.ndarray]) -> float:
        """The distance with other kernels, one a target; of several outputs the mean."""
        return self.closeness(kernels).distance

    def closeness(self, kernels: Sequence[np.ndarray]) -> Closeness:
        """The same, and whether an output says nothing any more."""
        each, constant = [], False
        pairs = list(zip(zip(*self._dense, strict=True), zip(*self._outputs(kernels), strict=True), strict=True))
        for (dense, pruned), binary in zip(pairs, binary_outputs(self._model, len(pairs)), strict=True):
            each.append(output_distance(_whole(dense), _whole(pruned), binary))
            constant |= _spread(pruned) < _CONSTANT * _spread(dense)
        # Processes that prune together may have other examples each, and have to choose the same.
        ranks = current_ranks()
        distance = ranks.mean(float(np.mean(each)) if each else math.inf)
        return Closeness(ranks.any(constant), distance if math.isfinite(distance) else math.inf)

    def _outputs(self, kernels: Sequence[np.ndarray] | None) -> list[list[np.ndarray]]:
        found = []
        with (
            forward_only(),
            float32_computation(self._model),
            keras.StatelessScope(),
            Graphs(self._model).watched(),
        ):
            for target, kernel in zip(self._targets, kernels or (), strict=False):
                target.variable.assign(kernel)
            for batch in self._batches:
                output = infer(self._model, map_arrays(ops.convert_to_tensor, batch))
                leaves = outputs_of(output, len(arrays(batch)[0]))
                self.complete &= len(leaves) == len(tree.flatten(output))
                found.append([ops.convert_to_numpy(leaf) for leaf in leaves])
                give_back_memory()
        return found


def binary_outputs(model: keras.Model, number: int) -> list[bool]:
    """Of so many outputs of a model whether each is known to come out of a sigmoid."""
    known = sigmoid_outputs(model)
    return known if len(known) == number else [False] * number


def outputs_of(output: Any, examples: int) -> list[Any]:
    """The arrays of a model's output that tell something of each example."""
    return [leaf for leaf in arrays(output) if len(leaf.shape) and leaf.shape[0] == examples]


def _whole(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([_flat(part) for part in parts])


def _spread(parts: Sequence[np.ndarray]) -> float:
    """How much an output, (n, ...) in each part, differs between the examples of a part."""
    total = 0.0
    for part in parts:
        known = np.where(np.abs(part) < HUGE, part, 0.0).astype(np.float64)
        total += float(np.square(known - known.mean(0)).sum())
    return math.sqrt(total)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1] if array.ndim > 1 else 1).astype(np.float64)


def are_probabilities(output: np.ndarray, binary: bool = False) -> str:
    """`"classes"` for outputs (N, C) whose rows sum to one, `"binary"` for what a sigmoid gives, else ""."""
    if not output.size or not (output.min() >= 0.0 and output.max() <= 1.0):
        return ""
    if output.shape[1] > 1 and np.abs(output.sum(1) - 1.0).max() <= _SUM:
        return "classes"
    return "binary" if binary else ""


def output_distance(dense: np.ndarray, pruned: np.ndarray, binary: bool = False) -> float:
    """How far outputs (N, C) are from those of the dense model.

    For probabilities (rows that sum to one, or what a sigmoid gives) the mean Kullback-Leibler divergence, in nats. For
    all else, logits too, the mean squared error over the variance of the dense output. Numbers that are huge or not
    finite, and the same in both, as those of actions that are masked, don't count.

        >>> dense = np.array([[0.5, 0.5], [0.9, 0.1]])
        >>> output_distance(dense, dense), round(output_distance(dense, dense[::-1]), 3)
        (0.0, 0.439)
        >>> output_distance(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]]))
        0.5
        >>> output_distance(np.array([[1.0, -np.inf], [3.0, -1e9]]), np.array([[1.0, -np.inf], [2.0, -1e9]]))
        0.5

    Args:
        dense: Of the dense model.
        pruned: Of the other one.
        binary: Whether they are what a sigmoid gives.
    """
    if kind := are_probabilities(dense, binary):
        p, q = np.clip(dense, _TINY, 1.0), np.clip(pruned, _TINY, 1.0)
        divergence = dense * np.log(p / q)
        if kind == "binary":
            r, s = np.clip(1.0 - dense, _TINY, 1.0), np.clip(1.0 - pruned, _TINY, 1.0)
            divergence = divergence + (1.0 - dense) * np.log(r / s)
        # Sums that aren't quite one make it a little less than nothing where both are the same.
        return float(np.maximum(divergence.sum(1).mean(), 0.0))
    counted = ~((dense == pruned) & ~(np.abs(dense) < HUGE))
    if not np.isfinite(dense[counted]).all() or not np.isfinite(pruned[counted]).all():
        return math.inf
    number = np.maximum(counted.sum(0), 1)
    known = np.where(counted, dense, 0.0)
    off = np.where(counted, known - known.sum(0) / number, 0.0)
    variance = float(np.square(off).sum() / number.sum())
    error = float(np.square(np.where(counted, pruned, 0.0) - known).sum() / number.sum())
    return error / (variance or 1.0)
