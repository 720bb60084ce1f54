"""How many weights each variable loses, and which ones where layers choose them by their own output."""

from collections.abc import Mapping, Sequence

import numpy as np

from keras_woodfisher.model.targets import Target
from keras_woodfisher.pruning.fisher import no_progress
from keras_woodfisher.pruning.group_masks import select
from keras_woodfisher.pruning.groups import Structure
from keras_woodfisher.pruning.masks import lowest
from keras_woodfisher.pruning.pruner import Pruner

LEAST_SHARE = 0.25
"""The part of the uniform kept fraction that each variable keeps where the two ways are mixed."""


class Allocation:
    """A number of zeros for each variable of a pruner.

    Args:
        pruner: Knows the variables, what is pruned already, and the mask type.
        zeros: How many weights of each variable are zero in the end.
    """

    settled = False

    def __init__(self, pruner: Pruner, zeros: Sequence[int]):
        self._pruned = {id(t.variable): p for t, p in zip(pruner.targets, pruner.pruned, strict=True)}
        self.zeros = {id(t.variable): number for t, number in zip(pruner.targets, zeros, strict=True)}
        covered = [] if pruner.structure is None else pruner.structure.covered
        self._structures = {
            id(target.variable): Structure([target], pruner.options.mask_type)
            for target, inside in zip(pruner.targets, covered, strict=False)
            if inside
        }

    def choose(self, target: Target, values: np.ndarray) -> np.ndarray:
        """The weights of a variable to keep, of the largest values: bool, in the variable's shape."""
        key = id(target.variable)
        flat, pruned, zeros = target.flatten(values), self._pruned[key], self.zeros[key]
        structure = self._structures.get(key)
        if structure is None:
            worth = np.abs(flat)
            worth[pruned] = -1.0
            gone = lowest(worth, zeros)
        else:
            sparsity = zeros / structure.covered[0]
            gone = select(structure, flat, pruned, None, [sparsity], True, no_progress)
        return ~target.unflatten(gone)

    def exchangeable(self, target: Target) -> np.ndarray:
        """The weights that may be kept or not, one in place of another: bool, in the variable's shape."""
        key = id(target.variable)
        alone = key not in self._structures
        return target.unflatten(~self._pruned[key] if alone else np.zeros_like(self._pruned[key]))


class GivenMasks:
    """The masks of another model.

    Args:
        masks: What to keep of each variable, by its identity: bool, in the variable's shape.
    """

    settled = True

    def __init__(self, masks: Mapping[int, np.ndarray]):
        self._masks = masks

    def choose(self, target: Target, values: np.ndarray) -> np.ndarray:
        """The weights of a variable to keep, whatever they are worth."""
        return self._masks[id(target.variable)]

    def exchangeable(self, target: Target) -> np.ndarray:
        """None of them."""
        return np.zeros_like(self._masks[id(target.variable)])


def candidates(pruner: Pruner, finals: Sequence[float]) -> dict[str, Allocation]:
    """Ways to divide the zeros among the variables, by name; the one that is usually the best first.

    `"magnitude"` keeps what is largest of all, `"uniform"` the same fraction of each variable, and `"between"` the
    geometric mean of what these two keep of it, but at least a quarter of the latter: a variable that loses all its
    weights takes the model with it. Where each variable has a sparsity of its own, or groups are pruned,
    there is nothing to choose.
    """
    by_magnitude = _zeros(pruner, pruner.by_magnitude(finals))
    one = {"magnitude": Allocation(pruner, by_magnitude)}
    if not pruner.options.global_sparsity or len(pruner.targets) < 2 or pruner.structure is not None:
        return one
    sizes, total = np.array([target.size for target in pruner.targets]), sum(by_magnitude)
    uniform = _scaled(sizes, np.array(pruner.zeros), np.ones(len(sizes)), total)
    fractions = (sizes - np.array(by_magnitude)) / sizes
    weights = np.sqrt(np.maximum(fractions, LEAST_SHARE**2 * fractions @ sizes / sizes.sum()))
    between = _scaled(sizes, np.array(pruner.zeros), weights, total)
    return {"between": Allocation(pruner, between), **one, "uniform": Allocation(pruner, uniform)}


def _zeros(pruner: Pruner, pruned: np.ndarray) -> list[int]:
    edges = np.cumsum([target.size for target in pruner.targets])[:-1]
    return [int(part.sum()) for part in np.split(pruned, edges)]


def _scaled(sizes: np.ndarray, least: np.ndarray, weights: np.ndarray, total: int) -> list[int]:
    """Zeros such that the kept fractions are as the weights are to each other; exactly `total` of them.

    No variable keeps more than it may: `least` of its weights are zero already.
    """
    most, keep = sizes - least, int(sizes.sum()) - total
    low, high = 0.0, 1.0 / max(float(weights.min()), 1e-12)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(most, middle * weights * sizes).sum() <= keep else (low, middle)
    wanted = np.minimum(most, low * weights * sizes)
    kept = np.floor(wanted).astype(int)
    room = np.flatnonzero(kept < most)
    order = room[np.argsort(-(wanted - kept)[room], kind="stable")]
    kept[order[: keep - int(kept.sum())]] += 1
    return [int(number) for number in sizes - kept]
