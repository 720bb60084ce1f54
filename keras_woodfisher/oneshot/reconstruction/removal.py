"""Weights that go, a few at a time, while steps fit the ones that stay.

A weight goes if that changes the outputs least, as far as the diagonal of the Fisher matrix tells (Theis et al.,
arXiv 1801.05787): `w^2 E[g^2]`, with the gradients g of the steps. How many are left falls by a cubic ramp (Zhu and
Gupta, arXiv 1710.01878).
"""

from collections.abc import Sequence

import numpy as np

from keras_woodfisher.oneshot.reconstruction.allocation import LEAST_SHARE
from keras_woodfisher.pruning.masks import lowest
from keras_woodfisher.pruning.pruner import Pruner

_EVERY = 16
"""Steps between two removals."""

_PART = 0.75
"""Part of the steps at which all that are to go are gone."""


class Removal:
    """What to remove on the way from one sparsity to another.

    Args:
        pruner: Knows the variables, what is pruned together, and what is ranked together.
        first: The sparsity of each variable at the start.
        finals: The sparsity of each variable in the end.
    """

    def __init__(self, pruner: Pruner, first: Sequence[float], finals: Sequence[float]):
        self._pruner, self._first, self._finals = pruner, first, finals

    def progress(self, step: int, steps: int) -> float | None:
        """How much of the way is done after a step, from 0 to 1; None where nothing is to be removed after it."""
        last = max(1, round(_PART * steps))
        return step / last if step == last or (step < last and step % _EVERY == 0) else None

    def kept(
        self, values: Sequence[np.ndarray], squares: Sequence[np.ndarray], kept: Sequence[np.ndarray], progress: float
    ) -> list[np.ndarray]:
        """What is left, bool, one a variable in its shape.

        Args:
            values: The weights.
            squares: The mean squares of their gradients.
            kept: What there was.
            progress: See `progress`.
        """
        targets = self._pruner.targets
        left = (1.0 - progress) ** 3
        sparsity = [last - (last - first) * left for first, last in zip(self._first, self._finals, strict=True)]
        worth = [target.flatten(np.abs(v) * np.sqrt(s)) for target, v, s in zip(targets, values, squares, strict=True)]
        if self._pruner.options.global_sparsity and self._pruner.structure is None:
            for scores, fraction in zip(worth, sparsity, strict=True):
                # As where layers are solved: one that loses all its weights takes the model with it.
                few = int(LEAST_SHARE * (1.0 - fraction) * scores.size)
                scores[~lowest(scores, scores.size - few)] = np.inf
        gone = np.concatenate([target.flatten(~k) for target, k in zip(targets, kept, strict=True)])
        gone = self._pruner.next_pruned(np.concatenate(worth), gone, sparsity)
        parts = np.split(gone, np.cumsum([target.size for target in targets])[:-1])
        return [~target.unflatten(part) for target, part in zip(targets, parts, strict=True)]
