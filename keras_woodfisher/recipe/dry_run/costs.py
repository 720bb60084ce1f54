"""What a plan will cost, in bytes and seconds."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_woodfisher.callbacks.pruning_run import Run
from keras_woodfisher.callbacks.update_plan import PlannedUpdate
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.memory.plan import RECOMPUTED, MemoryPlan
from keras_woodfisher.memory.store import MemoryStore
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.model.targets import finals_of
from keras_woodfisher.oneshot.reconstruction.allocation import Allocation, candidates
from keras_woodfisher.oneshot.reconstruction.footprint import Plan
from keras_woodfisher.oneshot.reconstruction.pruning import Examined, effort_of
from keras_woodfisher.options.pruning_options import AUTO
from keras_woodfisher.pruning.fisher import block_slices
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.recipe.modifiers.reconstruction import ReconstructionModifier

_OVERHEAD = 1.8
"""Time of an update without its gradients over that of its useful arithmetic (benchmarks/update_cost.py)."""

_FLOAT = 4


@dataclass(frozen=True)
class Cost:
    """What the updates of one modifier cost.

    Attributes:
        gradient_bytes: Bytes of the gradients at the update that needs most, float32.
        buffer_bytes: Bytes of the ring of gradients that the optimizer carries; 0 where they are sampled.
        host_bytes: Most bytes on the host at one time, beside the training's own: the total of the memory plan.
        device_bytes: Most bytes on each other device.
        gradient_seconds: Seconds for all gradient samples of all updates; None where that isn't known without data.
        inverse_seconds: Seconds for all that comes after them on the CPU; None on other devices.
        memory: The memory plan that the updates will keep to, made from what is free now; None without gradients, or
            where nothing fits.
    """

    gradient_bytes: int = 0
    buffer_bytes: int = 0
    host_bytes: int = 0
    device_bytes: Mapping[str, int] | None = None
    gradient_seconds: float | None = 0.0
    inverse_seconds: float | None = 0.0
    memory: MemoryPlan | None = None


@dataclass(frozen=True)
class ReconstructionCost:
    """What one reconstruction costs.

    Attributes:
        examples: How many examples layers will be fitted to.
        memory: How many at a time, and what that takes.
        passes: Passes over all of them.
        seconds: Of passes and solutions, about.
        without: What takes more than that.
    """

    examples: int
    memory: Plan
    passes: int
    seconds: float
    without: tuple[str, ...] = ()


def reconstruction_cost(
    model: keras.Model, pruner: Pruner, modifier: ReconstructionModifier, data: Any
) -> ReconstructionCost:
    """The cost of a modifier whose pruner is given, by the examples that it will be given.

    Raises:
        ValueError, TypeError, MemoryError: As the work itself would.
    """
    effort = effort_of(modifier.quality, modifier.num_examples, pruner.options.method)
    assert effort is not None
    examined = Examined(model, pruner, open_examples(data), effort.num_examples)
    work = examined.layerwise
    passes = 2 * work.passes * work.examples * work.seconds_per_example()
    seconds = passes + work.operations / _gemm_rate()
    without: tuple[str, ...] = ()
    if math.isfinite(effort.compare) and len(_allocations(pruner, modifier)) > 1:
        without += ("where allocations are compared and layers fitted again",)
    if effort.steps:
        without += (f"for {effort.steps:,} gradient steps",)
    return ReconstructionCost(work.examples, work.plan, work.passes, seconds, without)


def zeros_after(pruner: Pruner, modifier: ReconstructionModifier) -> dict[int, int]:
    """How many zeros each variable will have, by `id(variable)`, in the allocation that is usually the best."""
    return next(iter(_allocations(pruner, modifier).values())).zeros


def _allocations(pruner: Pruner, modifier: ReconstructionModifier) -> dict[str, Allocation]:
    targets, final = pruner.targets, modifier.final_sparsity
    finals = finals_of(targets, modifier.levels) if isinstance(final, Mapping) else [final] * len(targets)
    return candidates(pruner, finals)


def cost_of(run: Run, updates: Sequence[PlannedUpdate], seconds_per_sample: float | None) -> Cost:
    """The cost of the updates of a run whose memory is planned where possible; None is an unknown time of a sample."""
    working = [u for u in updates if u.num_grads]
    if not working:
        return Cost()
    pruner, options, buffered, memory = run.pruner, run.task.options, run.task.buffers, run.pruner.memory
    kernels = dict(zip(pruner.workspace.devices, pruner.workspace.kernels, strict=True))
    sizes = [t.size for t in pruner.targets]
    gradients = max(_FLOAT * u.num_grads * u.kept for u in working)
    ring = _FLOAT * max(options.most_gradients, 1) * sum(sizes) if buffered else 0
    blocks = {
        u: [b.stop - b.start for b in block_slices(kept_of(sizes, u), options.fisher_block_size)] for u in working
    }
    group = 1 if pruner.structure is None else pruner.structure.largest
    workspace = {
        name: max(
            k.memory(u.num_grads, max(widths), group, -(-len(widths) // k.lanes)) * min(k.lanes, len(widths))
            for u, widths in blocks.items()
        )
        for name, k in kernels.items()
    }
    seconds = None
    if set(kernels) == {"cpu"}:
        work = sum(operations_of(u.num_grads, width) for u, widths in blocks.items() for width in widths)
        seconds = options.num_recomputations * _OVERHEAD * work / _gemm_rate()
    samples = options.num_recomputations * sum(u.num_grads for u in working)
    shrinks = options.damp == AUTO and pruner.guard is None
    samples *= passes_of(memory, max(max(widths) for widths in blocks.values()), shrinks)
    return Cost(
        gradients,
        ring,
        0 if memory is None else memory.total,
        {name: size for name, size in workspace.items() if name != "cpu"},
        0.0 if buffered else None if seconds_per_sample is None else samples * seconds_per_sample,
        seconds,
        memory,
    )


def probed_seconds(run: Run) -> float:
    """Measured seconds of one gradient sample: one chunk of the memory plan, after the one that compiles."""
    source, memory = run.source, run.pruner.memory
    assert isinstance(source, SampledGradients) and memory is not None
    rows = memory.chunk if source.available is None else max(1, min(memory.chunk, source.available))
    kept = [np.ones(t.size, bool) for t in run.targets]
    for draw in (0, 1):
        start = time.perf_counter()
        # A new one each time, as in each update: memory takes time when it is handed out.
        store = MemoryStore((rows, sum(t.size for t in run.targets)), rows)
        source.fill(store, kept, rows, draw, lambda number: None)
    return (time.perf_counter() - start) / rows


def passes_of(memory: MemoryPlan | None, widest: int, shrinks: bool) -> int:
    """How often each sample is taken; `shrinks` where the ridge is found from them."""
    if memory is None or memory.storage != RECOMPUTED:
        return 1
    if widest > memory.page:
        # Gram matrix and leverage, then the change of the samples, Gram matrix and correction, each over all pages.
        return (6 if shrinks else 5) * memory.pages
    # For the scores page after page, and for the corrections back to the first one.
    once = memory.pages - 1
    return (3 if shrinks else 2) * once + 1


def kept_of(sizes: Sequence[int], update: PlannedUpdate) -> list[int]:
    """Unpruned weights of each variable, as if they were pruned alike."""
    return [round(size * (update.kept / sum(sizes))) for size in sizes]


def operations_of(samples: int, width: int) -> float:
    """Gram or Fisher matrix, Cholesky factor and solves, by the smaller of the two matrices."""
    small, large = min(samples, width), max(samples, width)
    return 2.0 * small**2 * large + 2.0 * small**3 / 3.0


def _gemm_rate(size: int = 700) -> float:
    """The machine's float64 matrix product rate now, in flop/s."""
    matrix = np.random.default_rng(0).normal(size=(size, size))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)
