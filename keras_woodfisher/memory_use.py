"""From an update to its memory plan, and from the plan to the store of its gradients."""

from collections.abc import Callable, Sequence

from keras_woodfisher_backends.kernel import BlockKernel
from keras_woodfisher_backends.panels import PANEL

from keras_woodfisher.fisher import block_slices
from keras_woodfisher.footprint import Footprint
from keras_woodfisher.memory import SHARE, free_memory, parse_bytes
from keras_woodfisher.memory_plan import DISK, MEMORY, RECOMPUTED, MemoryNeeds, MemoryPlan
from keras_woodfisher.memory_planning import Means
from keras_woodfisher.options import CALIBRATED, PruningOptions
from keras_woodfisher.stores.array import HalfStore
from keras_woodfisher.stores.device import DeviceStore
from keras_woodfisher.stores.disk import DiskStore
from keras_woodfisher.stores.recomputed import RecomputedStore
from keras_woodfisher.stores.spool import disk_room, temporary_folder
from keras_woodfisher.stores.store import GradientStore, MemoryStore
from keras_woodfisher.structure import Structure


def needs_of(
    uses: Sequence[tuple[int, int]],
    sizes: Sequence[int],
    options: PruningOptions,
    kernels: Sequence[tuple[str, BlockKernel]],
    footprint: Footprint,
    structure: Structure | None = None,
) -> MemoryNeeds:
    """What updates take.

    Args:
        uses: For each update its samples (m) and unpruned weights (d).
        sizes: Weights of each variable.
        options: How updates work.
        kernels: Kernels with the names of their devices.
        footprint: Of the source of gradients.
        structure: The groups of weights that are pruned together, if any.
    """
    group = 1 if structure is None else structure.largest
    samples, columns = max(uses, key=lambda use: use[0] * use[1])
    most = max(rows for rows, _ in uses)
    widths = [block.stop - block.start for block in block_slices(sizes, options.fisher_block_size)]
    widest = min(max(widths), columns)
    whole = options.update == CALIBRATED

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
    )


def means_of(options: PruningOptions) -> Means:
    """What there is now."""
    free, folder = free_memory(), temporary_folder()
    limit, reason = int(SHARE * free), "a quarter of what is free"
    if options.memory_limit is not None:
        limit, reason = parse_bytes("memory_limit", options.memory_limit), "memory_limit"
        if limit > free:
            limit, reason = free, "all that is free, which is less than memory_limit"
    return Means(limit, reason, folder, disk_room(folder), options.grads_device, options.grads_dtype, options.num_pages)


def open_store(
    plan: MemoryPlan, shape: tuple[int, int], blocks: Sequence[slice], fill: Callable[[GradientStore], object]
) -> GradientStore:
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
        page = max(plan.page * plan.samples // max(shape[0], plan.samples), min(plan.page, _widest(blocks)))
        return RecomputedStore(shape, chunk, plan.dtype, page, blocks, fill)
    return DeviceStore(shape, chunk, plan.dtype, plan.page, plan.storage)


def _widest(blocks: Sequence[slice]) -> int:
    return max((block.stop - block.start for block in blocks), default=1)


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
