"""Where the work of updates is done, and where gradients are kept meanwhile: devices, and memory by a plan."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import keras
import numpy as np
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.devices import canonical, expand
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.panels import PANEL
from keras_woodfisher_backends.kernel.threads import advice
from keras_woodfisher_backends.protocol import Backend
from keras_woodfisher_backends.ranks.joint import current_ranks
from keras_woodfisher_backends.ranks.shares import row_share

from keras_woodfisher.gradients.footprint import Footprint
from keras_woodfisher.gradients.sources import GradientSource
from keras_woodfisher.memory.device import DeviceStore
from keras_woodfisher.memory.disk import DiskStore, disk_room
from keras_woodfisher.memory.free_memory import SHARE, check_device_memory, give_back_memory, tightest_limit
from keras_woodfisher.memory.plan import DISK, MEMORY, RECOMPUTED, MemoryNeeds, MemoryPlan, SharedBytes
from keras_woodfisher.memory.planning import MemoryBudget, plan_memory
from keras_woodfisher.memory.recomputed import RecomputedStore, Refill
from keras_woodfisher.memory.staged import HalfStore
from keras_woodfisher.memory.store import GradientStore, MemoryStore
from keras_woodfisher.options.pruning_options import CALIBRATED, PruningOptions
from keras_woodfisher.options.sizes import parse_bytes, size_text
from keras_woodfisher.pruning.fisher import block_slices
from keras_woodfisher.pruning.groups import Structure
from keras_woodfisher.pruning.share import ON_THE_WAY, PIECE, Share
from keras_woodfisher.reports.meter import Meter, say


def needs_of(
    uses: Sequence[tuple[int, int]],
    sizes: Sequence[int],
    options: PruningOptions,
    kernels: Sequence[tuple[str, BlockKernel]],
    footprint: Footprint,
    structure: Structure | None = None,
    ranks: int = 1,
) -> MemoryNeeds:
    """What updates take.

    Args:
        uses: For each update its samples (m) and unpruned weights (d).
        sizes: Weights of each variable.
        options: How updates work.
        kernels: Kernels with the names of their devices.
        footprint: Of the source of gradients.
        structure: The groups of weights that are pruned together, if any.
        ranks: How many processes share the work.
    """
    group = 1 if structure is None else structure.largest
    samples, columns = max(uses, key=lambda use: use[0] * use[1])
    most = max(rows for rows, _ in uses)
    widths = [block.stop - block.start for block in block_slices(sizes, options.fisher_block_size)]
    widest = min(max(widths), columns)
    whole = options.update == CALIBRATED

    def shared(rows: int) -> SharedBytes:
        shares = (row_share(rows, rank, ranks) for rank in range(ranks))
        own = 4 * max(share.stop - share.start for share in shares) * columns
        # As wide as a block may make them.
        return SharedBytes(own, 4 * rows * min(columns, -(-columns // ranks) + widest), ON_THE_WAY * min(PIECE, own))

    def block_bytes(rows: int, lanes: int) -> int:
        width = columns if whole else widest
        return sum(_block_bytes(*kernel, rows, (width, columns), lanes, group) for kernel in kernels)

    most_lanes = max(kernel.lanes for _, kernel in kernels)
    return MemoryNeeds(
        samples=samples,
        columns=columns,
        most=most,
        weights=sum(sizes),
        widest=widest,
        blocks=len(widths),
        chunk=footprint.chunk,
        sample_bytes=footprint.sample,
        reading_bytes=footprint.reading,
        ring_bytes=footprint.ring,
        # One block is shared among all lanes.
        lanes=min(most_lanes, len(widths)) if len(widths) > 1 else most_lanes,
        kernels=len(kernels),
        block_bytes=block_bytes,
        panel=PANEL,
        whole=whole,
        structure_bytes=0 if structure is None else structure.bytes,
        shared=shared if ranks > 1 else None,
        usual_bytes=footprint.usual or footprint.sample,
    )


def budget_of(options: PruningOptions) -> MemoryBudget:
    """What there is now; where several processes prune together, for each of them."""
    ranks, budget = current_ranks(), _budget_of_host(options)
    if ranks.size == 1:
        return budget
    beside = ranks.beside()
    limit, free = (ranks.least(size // beside) for size in (budget.limit, budget.free))
    return replace(budget, limit=limit, free=free, reason=f"{budget.reason}, shared by {beside} processes of this host")


def _budget_of_host(options: PruningOptions) -> MemoryBudget:
    (free, tightest), folder = tightest_limit(), tempfile.gettempdir()
    below = f" within {tightest}" if tightest else ""
    limit, reason = int(SHARE * free), f"a quarter of what is free{below}"
    if options.memory_limit is not None:
        limit, reason = parse_bytes("memory_limit", options.memory_limit), "memory_limit"
        if limit > free:
            limit, reason = free, f"all that is free{below}, which is less than memory_limit"
    return MemoryBudget(
        limit,
        reason,
        folder,
        disk_room(folder),
        place=options.grads_device,
        dtype=options.grads_dtype,
        pages=options.num_pages,
        free=free,
    )


def open_store(plan: MemoryPlan, shape: tuple[int, int], blocks: Sequence[slice], fill: Refill) -> GradientStore:
    """An empty place for gradients, as planned.

    Args:
        plan: The plan.
        shape: (m, d) of this update.
        blocks: Its blocks.
        fill: Takes all samples and adds them to a store; used again by one that keeps a part at a time.
    """
    # As long as it is for fewer samples, since frameworks compile once a shape.
    chunk = plan.chunk
    if plan.storage == MEMORY and plan.dtype == "float32":
        return MemoryStore(shape, chunk)
    if plan.storage == MEMORY:
        return HalfStore(shape, chunk, plan.page)
    if plan.storage == DISK:
        return DiskStore(shape, chunk, plan.dtype, plan.page, blocks)
    if plan.storage == RECOMPUTED:
        # An update with more samples has shorter pages, but for whole blocks.
        widest = max((block.stop - block.start for block in blocks), default=1)
        page = max(plan.page * plan.samples // max(shape[0], plan.samples), min(plan.page, widest))
        return RecomputedStore(shape, chunk, plan.dtype, page, blocks, fill)
    return DeviceStore(shape, chunk, plan.dtype, plan.page, plan.storage)


def _block_bytes(device: str, kernel: BlockKernel, rows: int, widths: tuple[int, int], lanes: int, group: int) -> int:
    """Bytes on the host, given the columns of the widest block and of all blocks."""
    widest, every = widths
    lanes = min(lanes, kernel.lanes)
    if device.startswith("cpu"):
        return lanes * kernel.memory(rows, widest, group)
    columns = kernel.staged(rows, widest, every if lanes > 1 else 0)
    if group > 1:
        # The matrices of groups on their way back, twice.
        columns += 16 * max(min(widest, PANEL), group) * min(group, rows, widest)
    return lanes * columns


_DEVICE_SHARE = 0.8
"""Part of a device's free memory that the inverse Fisher may use."""


class Workspace:
    """Devices and memory of the updates of one model.

    Args:
        options: What is allowed.
        sizes: Weights of each variable.
        structure: The groups of weights that are pruned together, if any.

    Attributes:
        backend: The adapter of the Keras backend.
        devices: Names of those that share the inverse.
        kernels: One a device, with as many lanes as the plan allows.
        memory: The plan that updates keep to; None before `plan`, when gradients are in memory.
        ranks: The processes that share the work.

    Raises:
        ValueError: If a device doesn't exist.
    """

    def __init__(self, options: PruningOptions, sizes: Sequence[int], structure: Structure | None):
        self._options = replace(options, grads_device=canonical(options.grads_device))
        self._sizes = list(sizes)
        self._structure = structure
        self.backend: Backend = get_backend(keras.backend.backend())
        self.devices = expand(options.available_gpus, self.backend.devices())
        self._kernels: list[BlockKernel] = [self.backend.kernel(name) for name in self.devices]
        self.kernels = self._kernels
        self.ranks = current_ranks()
        self._check_grads_device(options.grads_device)
        self.memory: MemoryPlan | None = None
        self._width = sum(self._sizes)
        self._announced = False

    def plan(self, footprint: Footprint, uses: Sequence[tuple[int, int]]) -> MemoryPlan:
        """Decides where gradients will be, and how many samples and blocks are worked on at a time.

        Args:
            footprint: Of their source.
            uses: For each update its samples (m) and unpruned weights (d).

        Raises:
            MemoryError: If nothing fits (the message says what would).
        """
        kernels = list(zip(self.devices, self._kernels, strict=True))
        needs = needs_of(uses, self._sizes, self._options, kernels, footprint, self._structure, self.ranks.size)
        self._width = needs.width
        plan = self.memory = plan_memory(needs, budget_of(self._options))
        if plan.storage not in (MEMORY, DISK, RECOMPUTED):
            free, itemsize = self.backend.free_memory(plan.storage), 4 if plan.dtype == "float32" else 2
            check_device_memory(plan.samples, plan.columns, plan.storage, free, itemsize)
        self.kernels = [kernel.with_lanes(min(kernel.lanes, plan.lanes)) for kernel in self._kernels]
        self._announced = False
        return plan

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Says what to do where memory runs out in spite of the plan, which NumPy and frameworks don't."""
        try:
            yield
        except Exception as error:
            ours = type(error) is MemoryError and error.args
            if ours or not self.backend.is_out_of_memory(error):
                raise
            plan, said = self.memory, str(error).rstrip(".") or type(error).__name__
            planned = (
                f" {size_text(plan.total)} were planned, of {size_text(plan.limit)} ({plan.reason})." if plan else ""
            )
            raise MemoryError(
                f"There isn't memory enough: {said}.{planned} Give a smaller memory_limit, fewer num_grads, or fewer "
                "weights (params, exclude)."
            ) from error

    def gradients(
        self,
        source: GradientSource,
        kept: list[np.ndarray],
        blocks: Sequence[slice],
        rows: int,
        draw: int,
        meter: Meter,
    ) -> tuple[GradientStore, Share, float]:
        """The gradients of this process's share of the columns, that share, and the sum of the squares of all.

        They are where the plan says. The arguments are those of `GradientSource.fill`, the blocks of the unpruned
        weights, and what shows progress.
        """
        shape = rows, int(sum(mask.sum() for mask in kept))
        if self.memory is None or not self.memory.covers(*shape):
            # More than was foreseen: the same limit holds.
            self.plan(source.footprint(rows), [shape])
        assert self.memory is not None
        if self._options.verbose and not self._announced:
            say(str(self.memory))
            if (faster := advice()) and any(kernel.on_host for kernel in self.kernels):
                say(faster)
            self._announced = True

        def refill(store: GradientStore) -> None:
            source.fill(store, kept, rows, draw, lambda number: None)

        share = Share(blocks, shape[1], self.ranks)
        own = row_share(rows, self.ranks.rank, self.ranks.size)
        store = open_store(self.memory, (own.stop - own.start, shape[1]), blocks, refill)
        squares = 0.0
        try:
            with meter.phase("gradients", own.stop - own.start, "sample") as advance:
                squares = source.fill(store, kept, rows, draw, advance)
                store.finish()
                if self.ranks.size > 1:
                    # What sampling has left with the C library, and the exchange, would be there at the same time.
                    give_back_memory()
                    store = share.exchanged(store)
                    give_back_memory()
            if source.slow_layers is not None:
                meter.note(str(source.slow_layers))
        except BaseException:
            store.close()
            raise
        return store, share, squares

    def fit(self, rows: int) -> None:
        """Asks each device what it has free now, and makes the panels as narrow as that demands."""
        for name, kernel in zip(self.devices, self.kernels, strict=True):
            free = self.backend.free_memory(name)
            if free is not None:
                group = 1 if self._structure is None else self._structure.largest
                kernel.fit(rows, self._width, int(_DEVICE_SHARE * free / kernel.lanes), group)

    def _check_grads_device(self, device: str) -> None:
        options = self._options
        if self.ranks.size > 1 and (options.grads_device != "cpu" or options.grads_dtype != "float32"):
            raise ValueError(
                f"grads_device={device!r} and grads_dtype={options.grads_dtype!r} aren't for {self.ranks.size} "
                "processes that prune together: each holds its part of the gradients in memory, as float32. Leave both "
                "out; with more processes, or fewer num_grads, each holds less."
            )
        if self._options.grads_device not in ("cpu", DISK):
            try:
                self.backend.kernel(device)
            except ValueError as error:
                raise ValueError(f'grads_device: {error} Gradients can also be kept on "disk".') from None
