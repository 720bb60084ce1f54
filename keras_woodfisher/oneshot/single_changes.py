"""What pruning each variable alone to one level would make of it, by each method."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import keras
import numpy as np

from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.model.examples import Examples, read_batches
from keras_woodfisher.model.tokens import checked
from keras_woodfisher.oneshot.reconstruction.allocation import candidates
from keras_woodfisher.oneshot.reconstruction.layerwise import Layerwise, joined
from keras_woodfisher.pruning.fisher import BlockFisher
from keras_woodfisher.pruning.masks import saliencies
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.shrinkage import ridges
from keras_woodfisher.reports.meter import Meter

_EXAMPLES = 1024
"""Layers are reconstructed by so many examples at most."""


class Change(NamedTuple):
    """What pruning each variable to one level would make of it.

    Attributes:
        weights: For each variable its weights then, in weight order.
        pruned: For each variable its pruned weights, bool.
        costs: For each variable the predicted increase of the loss, or None.
        errors: For each variable the relative error of its layer's output, or None.
        notes: For each variable why it couldn't be reconstructed, or "".
    """

    weights: list[np.ndarray]
    pruned: list[np.ndarray]
    costs: Sequence[float | None]
    errors: Sequence[float | None]
    notes: Sequence[str]


@contextmanager
def single_changes(
    pruner: Pruner, source: SampledGradients | None, rows: int, meter: Meter
) -> Iterator[tuple[Callable[[float], Change], int]]:
    """Takes gradients and inverts, once; gives a function of the level, and the number of samples.

    Where no block of the Fisher spans variables, the update of all variables is that of each of them alone. Nothing is
    written.

    Raises:
        FloatingPointError: If a weight or score isn't finite.
    """
    weights = pruner.check_weights()
    if source is None:
        still = np.zeros(weights.shape)
        no_costs = [None] * len(pruner.targets)
        yield lambda level: _change(pruner, weights, still, _chosen(pruner, np.abs(weights), level), no_costs), 0
        return
    keep = ~np.concatenate(pruner.pruned)
    with pruner.gradients(source, rows, 0, meter) as (grads, blocks, share, mean_diagonal):
        kernels = pruner.workspace.kernels
        damp = next(ridges(pruner.options.damp, grads, blocks, mean_diagonal, None, share))
        every = BlockFisher(grads, blocks, damp, kernels, share)
        with meter.phase("inverse", every.touched(), "block") as advance:
            diagonal = every.inverse_diagonal(advance)
        scores = saliencies(weights, keep, diagonal)

        def change(level: float) -> Change:
            new = _chosen(pruner, scores, level)
            prune = new[keep]
            touched = [block for block in blocks if prune[block].any()]
            fisher = BlockFisher(grads, touched, damp, kernels, share)
            with meter.phase(f"update at {level:g}", 2 * fisher.touched(), "block") as advance:
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
    pruner: Pruner, weights: np.ndarray, delta: np.ndarray, new: np.ndarray, costs: Sequence[float | None]
) -> Change:
    edges = np.cumsum([target.size for target in pruner.targets])[:-1]
    changed = np.where(new, 0.0, weights + delta).astype(weights.dtype)
    return Change(
        np.split(changed, edges), np.split(new, edges), costs, [None] * len(pruner.targets), [""] * len(pruner.targets)
    )


def _by_variable(pruner: Pruner, blocks: list[slice], costs: np.ndarray) -> list[float]:
    stops = np.cumsum([int((~pruned).sum()) for pruned in pruner.pruned])
    owners = np.searchsorted(stops, [block.start for block in blocks], side="right")
    return [float(costs[owners == place].sum()) for place in range(len(stops))]


@contextmanager
def reconstructed_changes(
    model: keras.Model, pruner: Pruner, examples: Examples, meter: Meter
) -> Iterator[tuple[Callable[[float], Change], int]]:
    """The same by reconstruction of each variable while all others are dense; no gradients are sampled.

    Raises:
        ValueError: If there is no example.
        MemoryError: If the work doesn't fit into memory.
        FloatingPointError: If a weight, or what a layer gets or gives, isn't finite.
    """
    pruner.check_weights()
    read = read_batches(examples, _EXAMPLES, _EXAMPLES, pruner.options.seed)
    batches = joined(list(checked(model, (batch[0] for batch in read))))
    work = Layerwise(model, pruner, batches, alone=True)
    no_costs = [None] * len(pruner.targets)

    def change(level: float) -> Change:
        allocation = next(iter(candidates(pruner, [level] * len(pruner.targets)).values()))
        with meter.phase(f"reconstruction at {level:g}", work.total, "layer") as advance:
            done = work.run(allocation, advance=advance)
        weights = [target.flatten(kernel) for target, kernel in zip(pruner.targets, done.kernels, strict=True)]
        why = {layer.name: layer.note for layer in done.layers}
        notes = [why.get(target.name, "") for target in pruner.targets]
        return Change(weights, [flat == 0.0 for flat in weights], no_costs, done.errors, notes)

    yield change, 0
