"""Scores to masks: exactly so many zeros, ties included."""

from collections.abc import Sequence

import numpy as np

from keras_woodfisher.model.targets import Target


def count(sparsity: float, total: int) -> int:
    """How many of `total` weights are zero at a sparsity: `floor(s N + 0.5)`.

    >>> [count(0.5, 5), count(0.95, 270_896), count(0.0, 7)]
    [3, 257351, 0]
    """
    return int(np.floor(sparsity * total + 0.5))


def lowest(scores: np.ndarray, number: int) -> np.ndarray:
    """The `number` lowest of scores (N,), exactly so many, as (N,) bool; ties fall to the lowest index.

    Raises:
        FloatingPointError: If a score is NaN.
    """
    if np.isnan(scores).any():
        raise FloatingPointError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN.")
    if not 0 < number < scores.size:
        return np.full(scores.shape, number > 0)
    threshold = np.partition(scores, number - 1)[number - 1]
    chosen = scores < threshold
    ties = np.flatnonzero(scores == threshold)
    chosen[ties[: number - np.count_nonzero(chosen)]] = True
    return chosen


def grow(scores: np.ndarray, pruned: np.ndarray, groups: Sequence[tuple[int, float]]) -> np.ndarray:
    """The next set of pruned weights: a superset of the present one, with the exact count.

    Args:
        scores: (N,) saliencies of all weights, variable after variable.
        pruned: (N,) bool, the weights that are pruned now.
        groups: Number of weights and sparsity of each group that is ranked by itself; one group for global pruning,
            one a variable otherwise. Where more is pruned already, nothing changes.

    Returns:
        (N,) bool.
    """
    ranked = np.where(pruned, -np.inf, scores)
    parts, start = [], 0
    for size, sparsity in groups:
        here = slice(start, start + size)
        number = max(count(sparsity, size), int(pruned[here].sum()))
        parts.append(lowest(ranked[here], number))
        start += size
    return np.concatenate(parts)


def saliencies(weights: np.ndarray, keep: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """`w^2 / (2 [F^-1]_jj)` of Optimal Brain Surgeon, zero for what is pruned."""
    values = np.square(weights[keep], dtype=np.float64)
    values /= diagonal
    values *= 0.5
    scores = np.zeros(weights.shape)
    scores[keep] = values
    return scores


def zeros_of(target: Target) -> np.ndarray:
    """The weights of a variable that are zero, in weight order; none if all of them are."""
    zero = target.read() == 0
    return np.zeros_like(zero) if zero.all() else zero
