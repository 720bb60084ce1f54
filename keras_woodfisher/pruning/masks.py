"""Scores to masks: exactly so many zeros, ties included."""

from collections.abc import Container, Sequence

import keras
import numpy as np

from keras_woodfisher.model.targets import ALL, ALL_PRUNABLE, Target, all_targets, named_targets

SPARSE = 0.001
"""Fraction of zeros from which a variable counts as pruned: a few come by chance where many weights are drawn."""

MANY = 0.1
"""The same for variables that aren't prunable by default: embeddings may have rows of zeros for padding."""


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


def zeros_of(model: keras.Model, targets: Sequence[Target], named: Container[str] = ()) -> list[np.ndarray]:
    """The pruned weights of variables, found by their being zero: for each (size,) bool in weight order.

    A variable that is zero as a whole was pruned if others of the model are sparse, or if the user names it. In a dense
    model it only isn't trained yet, as an output layer that begins with zeros: none of its weights is pruned then.
    """
    zeros = [target.read() == 0 for target in targets]
    if any(zero.all() for zero in zeros) and not _is_sparse(model, targets):
        pairs = zip(targets, zeros, strict=True)
        zeros = [np.zeros_like(zero) if zero.all() and target.name not in named else zero for target, zero in pairs]
    return zeros


def _is_sparse(model: keras.Model, targets: Sequence[Target]) -> bool:
    """Whether any of some variables, of all that are prunable, or of all matrices was pruned in part."""
    everything = all_targets(model)
    kernels, matrices = (named_targets(everything, keyword) for keyword in (ALL_PRUNABLE, ALL))
    return any(
        least <= float(np.mean(target.read() == 0)) < 1.0
        for least, chosen in ((SPARSE, [*targets, *kernels]), (MANY, matrices))
        for target in chosen
    )
