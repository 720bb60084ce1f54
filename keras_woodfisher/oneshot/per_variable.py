"""What pruning each variable by itself would make of it, planned for all of them side by side; nothing is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.pruning.fisher import BlockFisher
from keras_woodfisher.pruning.masks import saliencies
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.reports.meter import Meter


@dataclass(frozen=True)
class PerVariableChange:
    """What pruning each variable to one level would make of it.

    Attributes:
        weights: For each variable its weights then, in weight order.
        pruned: For each variable its pruned weights, bool.
        costs: For each variable the predicted increase of the loss; None for magnitude pruning.
    """

    weights: list[np.ndarray]
    pruned: list[np.ndarray]
    costs: list[float] | None


@contextmanager
def per_variable_changes(
    pruner: Pruner, source: SampledGradients | None, rows: int, meter: Meter
) -> Iterator[tuple[Callable[[float], PerVariableChange], int]]:
    """Takes gradients and inverts, once; gives a function of the level, and the number of samples.

    Where no block of the Fisher spans variables, the update of all variables is that of each of them alone.

    Args:
        pruner: Of the variables, with blocks that don't span them and `global_sparsity` off.
        source: Where gradients come from; None for magnitude pruning.
        rows: How many gradient samples to use.
        meter: Shows progress.

    Raises:
        FloatingPointError: If a weight or score isn't finite.
    """
    weights = pruner.check_weights()
    if source is None:
        still = np.zeros(weights.shape)
        yield lambda level: _change(pruner, weights, still, _chosen(pruner, np.abs(weights), level), None), 0
        return
    keep = ~np.concatenate(pruner.pruned)
    with pruner.gradients(source, rows, 0, meter) as (grads, blocks, mean_diagonal):
        kernels, damp = pruner.workspace.kernels, pruner.options.damping(mean_diagonal)
        with meter.phase("inverse", len(blocks), "block") as advance:
            diagonal = BlockFisher(grads, blocks, damp, kernels).inverse_diagonal(advance)
        scores = saliencies(weights, keep, diagonal)

        def change(level: float) -> PerVariableChange:
            new = _chosen(pruner, scores, level)
            prune = new[keep]
            touched = [block for block in blocks if prune[block].any()]
            fisher = BlockFisher(grads, touched, damp, kernels)
            with meter.phase(f"update at {level:g}", 2 * len(touched), "block") as advance:
                joint = pruner.options.update == "joint"
                moved = fisher.update(weights[keep], prune, diagonal, joint, advance)
                moved[prune] = -weights[keep][prune]
                costs = fisher.costs(moved, source.square_scale, advance)
            delta = np.zeros(weights.shape)
            delta[keep] = moved
            return _change(pruner, weights, delta, new, _by_variable(pruner, touched, costs))

        yield change, len(grads)


def _chosen(pruner: Pruner, scores: np.ndarray, level: float) -> np.ndarray:
    return pruner.choose(scores, [level] * len(pruner.targets))


def _change(
    pruner: Pruner, weights: np.ndarray, delta: np.ndarray, new: np.ndarray, costs: list[float] | None
) -> PerVariableChange:
    edges = np.cumsum([target.size for target in pruner.targets])[:-1]
    changed = np.where(new, 0.0, weights + delta).astype(weights.dtype)
    return PerVariableChange(np.split(changed, edges), np.split(new, edges), costs)


def _by_variable(pruner: Pruner, blocks: list[slice], costs: np.ndarray) -> list[float]:
    stops = np.cumsum([int((~pruned).sum()) for pruned in pruner.pruned])
    owners = np.searchsorted(stops, [block.start for block in blocks], side="right")
    return [float(costs[owners == place].sum()) for place in range(len(stops))]
