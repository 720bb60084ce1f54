"""One pruning update of one model: gradients -> Fisher -> scores -> masks -> weights, all or nothing."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import keras
import numpy as np
from keras_woodfisher_backends.protocol import Backend
from keras_woodfisher_backends.ranks.ranks import Ranks

from keras_woodfisher.gradients.sources import GradientSource
from keras_woodfisher.memory.plan import MemoryPlan
from keras_woodfisher.memory.store import GradientStore
from keras_woodfisher.model.restoring import restored
from keras_woodfisher.model.targets import Target, find_targets
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.corrections import BlockCorrector, Corrector, RemovedWeights
from keras_woodfisher.pruning.fisher import Advance, BlockFisher, block_slices, no_progress
from keras_woodfisher.pruning.group_masks import grows, select
from keras_woodfisher.pruning.groups import Structure, arranged, structure_of
from keras_woodfisher.pruning.guard import MagnitudeGuard
from keras_woodfisher.pruning.masks import count, grow, saliencies, zeros_of
from keras_woodfisher.pruning.share import Share
from keras_woodfisher.pruning.shrinkage import ridges
from keras_woodfisher.pruning.workspace import Workspace
from keras_woodfisher.reports.meter import Meter
from keras_woodfisher.reports.stage_report import StageReport


class Pruner:
    """Prunes a model step by step; what is pruned stays pruned.

    Args:
        model: A built model.
        options: What to prune and how.

    Attributes:
        options: See above.
        targets: The variables it prunes.
        pruned: For each variable, its pruned weights in weight order (bool).
        zeros: For each variable the number of its pruned weights.
        sparsity: The fraction of pruned weights over all chosen variables.
        structure: The groups of weights that are pruned together; None where each is pruned by itself.
        workspace: Where updates work and keep their gradients.
        guard: Where an update by the Fisher isn't worth it, one by magnitude is made; None: never.

    Raises:
        ValueError: If a device doesn't exist, there is nothing to prune, or no variable has a group of `mask_type`.
        KeyError: If a name matches nothing.
    """

    def __init__(self, model: keras.Model, options: PruningOptions):
        self.options = options
        self._model = model
        chosen = find_targets(model, options.params, options.exclude)
        self.targets: list[Target] = [arranged(target, options.mask_type) for target in chosen]
        self.structure: Structure | None = structure_of(self.targets, options.mask_type)
        self.guard: MagnitudeGuard | None = None
        self.workspace = Workspace(options, [target.size for target in self.targets], self.structure)
        self._set([np.zeros(target.size, bool) for target in self.targets])

    @property
    def backend(self) -> Backend:
        """The adapter of the Keras backend."""
        return self.workspace.backend

    @property
    def ranks(self) -> Ranks:
        """The processes that prune together."""
        return self.workspace.ranks

    @property
    def memory(self) -> MemoryPlan | None:
        """The plan that updates keep to."""
        return self.workspace.memory

    def open_source(self, source: GradientSource, rows: int, uses: Sequence[tuple[int, int]]) -> None:
        """Checks a source of gradients, and plans the memory of the updates that use it.

        Args:
            source: Gives gradients.
            rows: The most samples that any update may ask for.
            uses: For each update its samples (m) and unpruned weights (d); nothing is planned for none.

        Raises:
            ValueError: If the source doesn't fit the model or the options.
            MemoryError: If the gradients don't fit.
        """
        source.check(rows)
        if uses:
            self.workspace.plan(source.footprint(max(rows for rows, _ in uses)), uses)

    def find_zeros(self) -> None:
        """Takes the zeros that are there as pruned; see `zeros_of`."""
        self._set(zeros_of(self._model, self.targets))

    def take(self, pruned: np.ndarray) -> None:
        """Takes weights (N,) bool as pruned."""
        self._set(np.split(pruned, np.cumsum([p.size for p in self.pruned])[:-1]))

    @property
    def kept(self) -> int:
        """How many weights aren't pruned."""
        return sum(pruned.size for pruned in self.pruned) - sum(self.zeros)

    @property
    def _at_a_time(self) -> int:
        # Examples that a loss is computed of at a time.
        assert self.memory is not None
        return self.memory.chunk * self.options.grad_batch_size

    @property
    def coverage(self) -> list[int]:
        """For each variable the weights that a sparsity is a fraction of: those that belong to a group."""
        return [t.size for t in self.targets] if self.structure is None else self.structure.covered

    @property
    def note(self) -> str:
        """What stays dense since it fills no group, or ""."""
        return "" if self.structure is None else self.structure.note()

    @property
    def reached(self) -> list[float]:
        """The sparsity of each variable as fractions of `coverage` (the same one for all in global pruning)."""
        if self.options.global_sparsity:
            return [sum(self.zeros) / sum(self.coverage)] * len(self.pruned)
        return [zeros / max(size, 1) for zeros, size in zip(self.zeros, self.coverage, strict=True)]

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If the work within fails or is interrupted, weights and masks are what they were."""
        pruned = self.pruned
        try:
            with (
                self.workspace.memory_errors(),
                restored([target.variable for target in self.targets], only_on_failure=True),
            ):
                yield
                # What fails on one process is undone on all.
                self.ranks.settle()
        except BaseException:
            self._set(pruned)
            raise

    def masks(self) -> list[np.ndarray]:
        """The pruned weights of each variable, bool in the variable's shape."""
        return [t.unflatten(p) for t, p in zip(self.targets, self.pruned, strict=True)]

    def check_weights(self) -> np.ndarray:
        """The weights of all variables, in weight order.

        Raises:
            FloatingPointError: If one isn't finite.
        """
        if text := self.not_finite():
            raise FloatingPointError(text)
        return np.concatenate([target.read() for target in self.targets])

    def not_finite(self) -> str:
        """What is wrong with weights that aren't finite, or ""."""
        for target in self.targets:
            if wrong := int((~np.isfinite(target.read())).sum()):
                return (
                    f"The model's weights aren't finite: {wrong} of {target.size} of {target.name!r}; nothing was "
                    "pruned. Load weights from before training diverged, or lower the learning rate."
                )
        return ""

    def prunes(self, sparsity: Sequence[float]) -> bool:
        """Whether an update to a sparsity would prune anything."""
        if self.structure is not None:
            return grows(self.structure, np.concatenate(self.pruned), sparsity, self.options.global_sparsity)
        if self.options.global_sparsity:
            return count(sparsity[0], sum(p.size for p in self.pruned)) > sum(self.zeros)
        return any(count(s, p.size) > now for s, p, now in zip(sparsity, self.pruned, self.zeros, strict=True))

    def update(
        self,
        sparsity: Sequence[float],
        source: GradientSource | None,
        rows: int,
        draw: int = 0,
        corrector: Corrector | None = None,
    ) -> StageReport:
        """Prunes to a sparsity and corrects the weights that are kept.

        Nothing is written before everything is computed; if it fails or is interrupted, the weights are those from
        before.

        Args:
            sparsity: The fraction to reach, one a variable (all the same for global pruning); of a variable's weights,
                or of those that belong to a group.
            source: Where gradients come from; None for magnitude pruning.
            rows: How many gradient samples to use.
            draw: Number of the update.
            corrector: How the weights that stay are corrected; by default block by block.

        Returns:
            What was done; without phases where nothing was to be pruned.

        Raises:
            FloatingPointError: If a score or a new weight isn't finite.
        """
        if not self.prunes(sparsity):
            return StageReport(self.sparsity)
        meter = Meter(self.backend, self.workspace.devices, self.options.verbose)
        weights = self.check_weights()
        done = StageReport(0.0)
        if source is None:
            new = self._select(weights, None, sparsity)
            changed = np.where(new, 0.0, weights)
        else:
            changed, new, done = self._second_order(weights, sparsity, source, rows, draw, corrector, meter)
        changed = changed.astype(weights.dtype)
        if not np.isfinite(changed).all():
            raise FloatingPointError(
                "The corrected weights aren't finite; nothing was changed. A larger damp may help."
            )
        self._write(changed, new)
        return replace(done, sparsity=self.sparsity, phases=tuple(meter.phases))

    @contextmanager
    def gradients(
        self, source: GradientSource, rows: int, draw: int, meter: Meter
    ) -> Iterator[tuple[GradientStore, list[slice], Share, float]]:
        """Gradient samples of the unpruned weights, all blocks, those that are here, and the mean of the diagonal.

        That is of `(1/m) G^T G`.

        For the arguments see `update`; `meter` shows progress.
        """
        kept = [~pruned for pruned in self.pruned]
        labels = None if self.structure is None else self.structure.labels[np.concatenate(kept)]
        blocks = block_slices([int(mask.sum()) for mask in kept], self.options.fisher_block_size, labels)
        store, share, squares = self.workspace.gradients(source, kept, blocks, rows, draw, meter)
        with closing(store) as grads:
            self.workspace.fit(len(grads))
            yield grads, blocks, share, squares / (len(grads) * sum(int(mask.sum()) for mask in kept))

    def _second_order(
        self,
        weights: np.ndarray,
        sparsity: Sequence[float],
        source: GradientSource,
        rows: int,
        draw: int,
        corrector: Corrector | None,
        meter: Meter,
    ) -> tuple[np.ndarray, np.ndarray, StageReport]:
        keep, guard = ~np.concatenate(self.pruned), self.guard
        correct = corrector or BlockCorrector(self.options.update == "joint")
        guarded = None if corrector is not None else guard is not None
        with self.gradients(source, rows, draw, meter) as (grads, blocks, share, mean_diagonal):
            for damp in ridges(self.options.damp, grads, blocks, mean_diagonal, guarded, share):
                fisher = BlockFisher(grads, blocks, damp, self.workspace.kernels, share)
                with meter.phase("inverse", fisher.touched(), "block") as advance:
                    new = self._select(weights, fisher, sparsity, advance)
                removal = RemovedWeights(fisher, weights, keep, new[keep], mean_diagonal, draw, self._at_a_time)
                change, chosen = correct(removal, meter)
                changed = weights.astype(np.float64)
                changed[keep] += change
                changed[new] = 0.0
                done = StageReport(0.0, len(grads), damp, chosen, slow_layers=source.slow_layers)
                if guard is None:
                    return changed, new, done
                plain = self._select(weights, None, sparsity)
                removed = np.where(plain, 0.0, weights)
                if not guard.prefers_magnitude(weights, removed, changed.astype(weights.dtype), self._at_a_time):
                    return changed, new, done
        return removed, plain, replace(done, by_magnitude=True)

    def _select(
        self, weights: np.ndarray, fisher: BlockFisher | None, sparsity: Sequence[float], advance: Advance = no_progress
    ) -> np.ndarray:
        """The next set of pruned weights: scores, by the Fisher of the unpruned ones or by magnitude, and choice."""
        pruned = np.concatenate(self.pruned)
        if fisher is None:
            return self.next_pruned(weights, pruned, sparsity)
        if self.structure is not None:
            together = self.options.global_sparsity
            return select(self.structure, weights, pruned, fisher, sparsity, together, advance)
        return self.choose(saliencies(weights, ~pruned, fisher.inverse_diagonal(advance)), sparsity)

    def by_magnitude(self, sparsity: Sequence[float]) -> np.ndarray:
        """The set of pruned weights (N,) that magnitude pruning to a sparsity gives; nothing is changed.

        Raises:
            FloatingPointError: If a weight isn't finite.
        """
        return self._select(self.check_weights(), None, sparsity)

    def next_pruned(self, values: np.ndarray, pruned: np.ndarray, sparsity: Sequence[float]) -> np.ndarray:
        """What is pruned at a sparsity, (N,) bool, by size of values (N,), or sums of squares of those of a group.

        Args:
            values: The size of each weight, or of what it is worth.
            pruned: What is pruned already, (N,) bool.
            sparsity: The fraction to reach, one a variable.
        """
        if self.structure is None:
            return grow(np.abs(values), pruned, self._ranked(sparsity))
        return select(self.structure, values, pruned, None, sparsity, self.options.global_sparsity, no_progress)

    def write(self, values: Sequence[np.ndarray]) -> None:
        """Takes new values of all variables, each in its variable's shape; what is zero counts as pruned."""
        flat = np.concatenate([t.flatten(value) for t, value in zip(self.targets, values, strict=True)])
        self._write(flat, flat == 0.0)

    def choose(self, scores: np.ndarray, sparsity: Sequence[float]) -> np.ndarray:
        """The set of pruned weights at a sparsity: those that are pruned now, and those of the lowest scores (N,)."""
        return grow(scores, np.concatenate(self.pruned), self._ranked(sparsity))

    def _ranked(self, sparsity: Sequence[float]) -> list[tuple[int, float]]:
        """The groups of weights that are ranked by themselves: how many, and their sparsity."""
        sizes = [p.size for p in self.pruned]
        together = self.options.global_sparsity
        return [(sum(sizes), sparsity[0])] if together else list(zip(sizes, sparsity, strict=True))

    def _write(self, weights: np.ndarray, pruned: np.ndarray) -> None:
        edges = np.cumsum([p.size for p in self.pruned])[:-1]
        with self.all_or_nothing():
            for target, flat in zip(self.targets, np.split(weights, edges), strict=True):
                target.write(flat)
        self._set(np.split(pruned, edges))

    def _set(self, pruned: list[np.ndarray]) -> None:
        self.pruned = pruned
        # Training logs them at each step.
        self.zeros = [int(p.sum()) for p in pruned]
        self.sparsity = sum(self.zeros) / sum(p.size for p in pruned)
