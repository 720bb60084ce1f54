"""Steps on the kept weights towards the outputs of the dense model, all layers together.

Least squares takes one layer at a time; what later layers could make up for, only the output of the whole model tells.
The distance of the outputs is the Kullback-Leibler divergence of probabilities, and the mean squared error of all else.
More weights may go meanwhile, see `removal`.
Steps are Adam's (Kingma & Ba, arXiv 1412.6980) with a rate that falls to zero by half a cosine; it is relative to the
root mean square of the weights that a variable keeps, and found by what is nearest on held-out examples.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras_woodfisher_backends.keras_internals.models import infer
from keras_woodfisher_backends.nest import arrays, map_arrays, take
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.gradients.loss import ModelLoss, forward_only
from keras_woodfisher.model.targets import Target
from keras_woodfisher.oneshot.reconstruction.held_out import HUGE, are_probabilities, binary_outputs
from keras_woodfisher.oneshot.reconstruction.removal import Removal
from keras_woodfisher.pruning.fisher import Advance, no_progress

RATES = (0.003, 0.008, 0.02)
"""First steps that are tried."""

_BATCH = 64
_DECAYS = 0.9, 0.999
_TINY = 1e-8


class Refinement:
    """Gradient steps on the kept weights of a model that stays as it is.

    Args:
        model: The dense model.
        targets: The variables that are pruned.
        batches: Inputs, leaves (N, ...).
        backend: Takes gradients.
        seed: Of the order of examples.

    Attributes:
        batch: Examples of a step.
    """

    def __init__(
        self, model: keras.Model, targets: Sequence[Target], batches: Sequence[Any], backend: Backend, seed: int | None
    ):
        self._model = model
        self._targets = targets
        self._batches = [(x, self._outputs(x)) for x in batches]
        outputs = self._batches[0][1]
        binary = iter(binary_outputs(model, len(arrays(outputs))))
        kinds = tree.map_structure(lambda output: _loss_for(output, next(binary)), outputs)
        self._loss = ModelLoss(model, targets, kinds)
        self._sampler = backend.sampler(self._loss, model, [target.variable for target in targets])
        self._seed = seed
        self.batch = min(_BATCH, max(len(arrays(x)[0]) for x in batches))

    def run(
        self,
        kernels: Sequence[np.ndarray],
        steps: int,
        rate: float,
        removal: Removal | None = None,
        advance: Advance = no_progress,
    ) -> list[np.ndarray]:
        """Kernels with zeros in the same places, and more of them where there is a removal.

        Args:
            kernels: Where to begin, one a target, in its variable's shape.
            steps: How many steps of 64 examples.
            rate: The first step, as a part of the root mean square of the kept weights.
            removal: What goes on the way.
            advance: Called after each step.
        """
        kept = [kernel != 0 for kernel in kernels]
        values = [kernel.astype(np.float64) for kernel in kernels]
        scales = [
            rate * math.sqrt(float(np.square(v[k]).mean())) if k.any() else 0.0
            for v, k in zip(values, kept, strict=True)
        ]
        means = [np.zeros(value.shape) for value in values]
        squares = [np.zeros(value.shape) for value in values]
        rng = np.random.default_rng(self._seed)
        first, second = _DECAYS
        with self._loss.sampling_mode():
            _, others = self._loss.values()
            for step in range(1, steps + 1):
                fraction = 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))
                tensors = [
                    ops.convert_to_tensor(value.astype(np.float32), dtype=target.variable.dtype)
                    for value, target in zip(values, self._targets, strict=True)
                ]
                gradients = self._sampler(tensors, others, self._draw(rng))
                for place, gradient in enumerate(gradients):
                    part = np.where(kept[place], gradient[0], 0.0).astype(np.float64)
                    means[place] = first * means[place] + (1 - first) * part
                    squares[place] = second * squares[place] + (1 - second) * np.square(part)
                    root = np.sqrt(squares[place] / (1 - second**step)) + _TINY
                    values[place] -= fraction * scales[place] * means[place] / (1 - first**step) / root
                if removal is not None and (progress := removal.progress(step, steps)) is not None:
                    kept = removal.kept(values, squares, kept, progress)
                    values = [np.where(keep, value, 0.0) for keep, value in zip(kept, values, strict=True)]
                advance()
        return [np.where(keep, value, 0.0).astype(np.float32) for keep, value in zip(kept, values, strict=True)]

    def _draw(self, rng: np.random.Generator) -> Any:
        """One group of examples, (x, y, None), leaves (1, b, ...)."""
        sizes = np.array([len(arrays(x)[0]) for x, _ in self._batches])
        x, y = self._batches[rng.choice(len(sizes), p=sizes / sizes.sum())]
        size = len(arrays(x)[0])
        places = rng.choice(size, min(self.batch, size), replace=False)
        return map_arrays(lambda leaf: leaf[None, places], (x, y, None))

    def _outputs(self, x: Any) -> Any:
        found = []
        size = len(arrays(x)[0])
        with forward_only(), keras.StatelessScope():
            for start in range(0, size, 4 * _BATCH):
                part = map_arrays(ops.convert_to_tensor, take(x, slice(start, start + 4 * _BATCH)))
                found.append(
                    tree.map_structure(
                        lambda leaf: ops.convert_to_numpy(leaf).astype(np.float32), infer(self._model, part)
                    )
                )
        return tree.map_structure(lambda *parts: np.concatenate(parts), *found)


def _loss_for(output: np.ndarray, binary: bool) -> Any:
    kind = are_probabilities(output.reshape(-1, output.shape[-1] if output.ndim > 1 else 1), binary)
    if kind == "classes":
        return keras.losses.KLDivergence()
    return keras.losses.BinaryCrossentropy() if kind == "binary" else _squares


def _squares(wanted: Any, found: Any) -> Any:
    """The mean squared error of numbers that stand for something; see `output_distance`."""
    counted = ops.abs(wanted) < HUGE
    zeros = ops.zeros_like(found)
    return ops.mean(ops.square(ops.where(counted, found, zeros) - ops.where(counted, wanted, zeros)), -1)
