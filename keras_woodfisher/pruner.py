"""One pruning update of one model: gradients -> Fisher -> scores -> masks -> weights, all or nothing."""

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.devices import expand
from keras_woodfisher_backends.kernel import BlockKernel
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.fisher import BlockFisher, block_slices
from keras_woodfisher.masks import count, grow
from keras_woodfisher.meter import Meter
from keras_woodfisher.options import PruningOptions
from keras_woodfisher.report import PhaseReport
from keras_woodfisher.sources import GradientSource
from keras_woodfisher.targets import Target, find_targets

_DEVICE_SHARE = 0.8
"""Part of a device's free memory that the inverse Fisher may use."""


class Pruner:
    """Prunes a model step by step; what is pruned stays pruned.

    Args:
        model: A built model.
        options: What to prune and how.

    Attributes:
        targets: The variables it prunes.
        pruned: For each variable, its pruned weights in weight order (bool).
        zeros: For each variable the number of its pruned weights.
        sparsity: The fraction of pruned weights over all chosen variables.
        backend: The adapter of the Keras backend.

    Raises:
        ValueError: If a device doesn't exist or there is nothing to prune.
        KeyError: If a name matches nothing.
    """

    def __init__(self, model: keras.Model, options: PruningOptions):
        self._options = options
        self.backend: Backend = get_backend(keras.backend.backend())
        self.targets: list[Target] = find_targets(model, options.params, options.exclude)
        self._devices = expand(options.available_gpus, self.backend.devices())
        self._kernels: list[BlockKernel] = [self.backend.kernel(name) for name in self._devices]
        self._set([np.zeros(target.size, bool) for target in self.targets])

    def find_zeros(self) -> None:
        """Takes the zeros that are there as pruned (but for a variable that is zero as a whole)."""
        self._set([zeros_of(target) for target in self.targets])

    def masks(self) -> list[np.ndarray]:
        """The pruned weights of each variable, bool in the variable's shape."""
        return [t.unflatten(p) for t, p in zip(self.targets, self.pruned, strict=True)]

    def check_weights(self) -> np.ndarray:
        """The weights of all variables, in weight order.

        Raises:
            FloatingPointError: If one isn't finite.
        """
        for target in self.targets:
            if wrong := int((~np.isfinite(target.read())).sum()):
                raise FloatingPointError(
                    f"The model's weights aren't finite: {wrong} of {target.size} of {target.name!r}; nothing was "
                    "pruned. Load weights from before training diverged, or lower the learning rate."
                )
        return np.concatenate([target.read() for target in self.targets])

    def prunes(self, sparsity: Sequence[float]) -> bool:
        """Whether an update to a sparsity would prune anything."""
        counts = self.zeros
        if self._options.global_sparsity:
            return count(sparsity[0], sum(p.size for p in self.pruned)) > sum(counts)
        wanted = (count(s, p.size) for s, p in zip(sparsity, self.pruned, strict=True))
        return any(number > now for number, now in zip(wanted, counts, strict=True))

    def update(
        self, sparsity: Sequence[float], source: GradientSource | None, rows: int, draw: int = 0
    ) -> tuple[list[PhaseReport], int]:
        """Prunes to a sparsity and corrects the weights that are kept.

        Nothing is written before everything is computed; if it fails or is interrupted, the weights are those from
        before.

        Args:
            sparsity: The fraction to reach, one a variable (all the same for global pruning).
            source: Where gradients come from; None for magnitude pruning.
            rows: How many gradient samples to use.
            draw: Number of the update.

        Returns:
            The phases, and the number of samples that were used.

        Raises:
            FloatingPointError: If a score or a new weight isn't finite.
        """
        if not self.prunes(sparsity):
            return [], 0
        meter = Meter(self.backend, self._devices, self._options.verbose)
        weights = self.check_weights()
        if source is None:
            new = self._grow(np.abs(weights), sparsity)
            delta, samples = np.zeros(weights.shape), 0
        else:
            new, delta, samples = self._second_order(weights, sparsity, source, (rows, draw), meter)
        changed = np.where(new, 0.0, weights + delta).astype(weights.dtype)
        if not np.isfinite(changed).all():
            raise FloatingPointError(
                "The corrected weights aren't finite; nothing was changed. A larger damp may help."
            )
        self._write(changed, new)
        return meter.phases, samples

    def _second_order(
        self,
        weights: np.ndarray,
        sparsity: Sequence[float],
        source: GradientSource,
        draw: tuple[int, int],
        meter: Meter,
    ) -> tuple[np.ndarray, np.ndarray, int]:
        kept = [~p for p in self.pruned]
        keep = np.concatenate(kept)
        grads = source.collect(kept, *draw, meter)
        blocks = block_slices([int(k.sum()) for k in kept], self._options.fisher_block_size)
        self._fit_devices(len(grads))
        with meter.phase("inverse", len(blocks), "block") as advance:
            fisher = BlockFisher(grads, blocks, self._options.damp, self._kernels, advance)
            diagonal = fisher.inverse_diagonal()
        # Saliency of Optimal Brain Surgeon: w^2 / (2 [F^-1]_jj).
        scores = np.zeros(weights.shape)
        scores[keep] = weights[keep].astype(np.float64) ** 2 / (2.0 * diagonal)
        new = self._grow(scores, sparsity)
        prune = new[keep]
        delta = np.zeros(weights.shape)
        work = sum(bool(prune[block].any()) for block in blocks)
        with meter.phase("update", work, "block") as advance:
            fisher = BlockFisher(grads, blocks, self._options.damp, self._kernels, advance)
            joint = self._options.update == "joint"
            delta[keep] = fisher.update(weights[keep], prune, diagonal, joint)
        return new, delta, len(grads)

    def _fit_devices(self, rows: int) -> None:
        """Asks each device what it has free now, and makes the panels as narrow as that demands."""
        for name, kernel in zip(self._devices, self._kernels, strict=True):
            free = self.backend.free_memory(name)
            if free is not None:
                kernel.fit(rows, int(_DEVICE_SHARE * free / kernel.lanes))

    def _grow(self, scores: np.ndarray, sparsity: Sequence[float]) -> np.ndarray:
        sizes = [p.size for p in self.pruned]
        if self._options.global_sparsity:
            groups = [(sum(sizes), sparsity[0])]
        else:
            groups = list(zip(sizes, sparsity, strict=True))
        return grow(scores, np.concatenate(self.pruned), groups)

    def _write(self, weights: np.ndarray, pruned: np.ndarray) -> None:
        edges = np.cumsum([p.size for p in self.pruned])[:-1]
        before = [ops.copy(target.variable) for target in self.targets]
        try:
            for target, flat in zip(self.targets, np.split(weights, edges), strict=True):
                target.write(flat)
        except BaseException:
            for target, values in zip(self.targets, before, strict=True):
                target.variable.assign(values)
            raise
        self._set(np.split(pruned, edges))

    def _set(self, pruned: list[np.ndarray]) -> None:
        self.pruned = pruned
        # Training logs them at each step.
        self.zeros = [int(p.sum()) for p in pruned]
        self.sparsity = sum(self.zeros) / sum(p.size for p in pruned)


def zeros_of(target: Target) -> np.ndarray:
    """The weights of a variable that are zero, in weight order; none if all of them are."""
    zero = target.read() == 0
    return np.zeros_like(zero) if zero.all() else zero


def sparsity_of(pruners: Sequence[Pruner]) -> float:
    """The fraction of zeros over all variables that pruners prune, together or one after the other."""
    zeros: dict[int, tuple[int, int]] = {}
    for pruner in pruners:
        for target, number in zip(pruner.targets, pruner.zeros, strict=True):
            known = zeros.get(id(target.variable), (0, 0))
            zeros[id(target.variable)] = max(known, (number, target.size))
    return sum(number for number, _ in zeros.values()) / sum(size for _, size in zeros.values())
