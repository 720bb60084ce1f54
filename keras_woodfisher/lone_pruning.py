"""Every variable pruned to a level as if it alone were: one inverse Fisher serves all variables and levels."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np

from keras_woodfisher.fisher import BlockFisher, block_slices
from keras_woodfisher.masks import saliencies
from keras_woodfisher.meter import Meter
from keras_woodfisher.pruner import Pruner
from keras_woodfisher.sources import SampledGradients


@dataclass(frozen=True)
class LoneChange:
    """What pruning each variable to one level would make of it.

    Attributes:
        weights: For each variable its weights then, in weight order.
        pruned: For each variable its pruned weights, bool.
        costs: For each variable the predicted increase of the loss; None for magnitude pruning.
    """

    weights: list[np.ndarray]
    pruned: list[np.ndarray]
    costs: list[float] | None


class LonePruner(Pruner):
    """Plans how each variable would be pruned; writes nothing.

    The blocks of the Fisher mustn't span variables, and `global_sparsity` is off. Then the update of all variables is
    that of each of them alone, side by side.
    """

    @contextmanager
    def changes(
        self, source: SampledGradients | None, rows: int, meter: Meter
    ) -> Iterator[tuple[Callable[[float], LoneChange], int]]:
        """Takes gradients and inverts, once; gives a function of the level, and the number of samples.

        Args:
            source: Where gradients come from; None for magnitude pruning.
            rows: How many gradient samples to use.
            meter: Tells of progress.

        Raises:
            FloatingPointError: If a weight or score isn't finite.
        """
        weights = self.check_weights()
        if source is None:
            still = np.zeros(weights.shape)
            yield lambda level: self._change(weights, still, self._at(np.abs(weights), level), None), 0
            return
        kept = [~pruned for pruned in self.pruned]
        keep = np.concatenate(kept)
        blocks = block_slices([int(mask.sum()) for mask in kept], self._options.fisher_block_size)
        store, squares = self.resources.gradients(source, kept, blocks, (rows, 0), meter)
        with closing(store) as grads:
            self.resources.fit(len(grads))
            damp = self._options.damping(squares / (len(grads) * grads.shape[1]))
            with meter.phase("inverse", len(blocks), "block") as advance:
                fisher = BlockFisher(grads, blocks, damp, self.resources.kernels, advance)
                diagonal = fisher.inverse_diagonal()
            scores = saliencies(weights, keep, diagonal)

            def change(level: float) -> LoneChange:
                new = self._at(scores, level)
                prune = new[keep]
                touched = [block for block in blocks if prune[block].any()]
                with meter.phase(f"update at {level:g}", 2 * len(touched), "block") as advance:
                    fisher = BlockFisher(grads, touched, damp, self.resources.kernels, advance)
                    moved = fisher.update(weights[keep], prune, diagonal, self._options.update == "joint")
                    moved[prune] = -weights[keep][prune]
                    costs = fisher.costs(moved, source.square_scale)
                delta = np.zeros(weights.shape)
                delta[keep] = moved
                return self._change(weights, delta, new, self._by_variable(touched, costs))

            yield change, len(grads)

    def _at(self, scores: np.ndarray, level: float) -> np.ndarray:
        return self._grow(scores, [level] * len(self.targets))

    def _change(self, weights: np.ndarray, delta: np.ndarray, new: np.ndarray, costs: list[float] | None) -> LoneChange:
        edges = np.cumsum([target.size for target in self.targets])[:-1]
        changed = np.where(new, 0.0, weights + delta).astype(weights.dtype)
        return LoneChange(np.split(changed, edges), np.split(new, edges), costs)

    def _by_variable(self, blocks: list[slice], costs: np.ndarray) -> list[float]:
        stops = np.cumsum([int((~pruned).sum()) for pruned in self.pruned])
        owners = np.searchsorted(stops, [block.start for block in blocks], side="right")
        return [float(costs[owners == place].sum()) for place in range(len(self.targets))]
