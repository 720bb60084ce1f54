"""How far the outputs of a pruned model are from those of the dense one, on examples that nothing was fitted to."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras_woodfisher_backends.keras_internals.graphs import Graphs
from keras_woodfisher_backends.keras_internals.models import float32_computation, infer
from keras_woodfisher_backends.nest import map_arrays

from keras_woodfisher.data.batches import cut
from keras_woodfisher.gradients.loss import forward_only
from keras_woodfisher.memory.free_memory import give_back_memory
from keras_woodfisher.model.targets import Target

_TINY = 1e-7
"""Smallest probability that differs from zero, as in Keras's losses."""

_SUM = 1e-3
"""Numbers whose sums are so close to one are probabilities."""


class HeldOutOutputs:
    """The outputs of a model on held-out examples, and the distance of a pruned one's from them.

    Args:
        model: The dense model.
        targets: The variables that are pruned.
        batches: Inputs, leaves (N, ...).
        size: Examples to look at at a time.
    """

    def __init__(self, model: keras.Model, targets: Sequence[Target], batches: Sequence[Any], size: int):
        self._model = model
        self._targets = targets
        self._batches = [part for batch in batches for part in cut(batch, size)]
        self._dense = self._outputs(None)

    def distance(self, kernels: Sequence[np.ndarray]) -> float:
        """The distance with other kernels, one a target; of several outputs the mean. See `output_distance`.

        It is infinite where an output isn't finite.
        """
        found = self._outputs(kernels)
        pairs = zip(zip(*self._dense, strict=True), zip(*found, strict=True), strict=True)
        each = [output_distance(*(np.concatenate([_flat(part) for part in parts]) for parts in pair)) for pair in pairs]
        distance = float(np.mean(each))
        return distance if math.isfinite(distance) else math.inf

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
                found.append([ops.convert_to_numpy(leaf) for leaf in tree.flatten(output)])
                give_back_memory()
        return found


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1] if array.ndim > 1 else 1).astype(np.float64)


def are_probabilities(output: np.ndarray) -> str:
    """`"classes"` for outputs (N, C) whose rows sum to one, `"binary"` for others within [0, 1], else ""."""
    if not output.size or output.min() < 0.0 or output.max() > 1.0:
        return ""
    return "binary" if output.shape[1] == 1 or np.abs(output.sum(1) - 1.0).max() > _SUM else "classes"


def output_distance(dense: np.ndarray, pruned: np.ndarray) -> float:
    """How far outputs (N, C) are from those of the dense model.

    For probabilities (rows that sum to one, or numbers within [0, 1]) the mean Kullback-Leibler divergence, in nats.
    For all else, logits too, the mean squared error over the variance of the dense output.

        >>> dense = np.array([[0.5, 0.5], [0.9, 0.1]])
        >>> output_distance(dense, dense), round(output_distance(dense, dense[::-1]), 3)
        (0.0, 0.439)
        >>> output_distance(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]]))
        0.5
    """
    if kind := are_probabilities(dense):
        p, q = np.clip(dense, _TINY, 1.0), np.clip(pruned, _TINY, 1.0)
        divergence = dense * np.log(p / q)
        if kind == "binary":
            r, s = np.clip(1.0 - dense, _TINY, 1.0), np.clip(1.0 - pruned, _TINY, 1.0)
            divergence = divergence + (1.0 - dense) * np.log(r / s)
        # Sums that aren't quite one make it a little less than nothing where both are the same.
        return float(np.maximum(divergence.sum(1).mean(), 0.0))
    variance = float(np.square(dense - dense.mean(0)).mean())
    return float(np.square(pruned - dense).mean()) / (variance or 1.0)
