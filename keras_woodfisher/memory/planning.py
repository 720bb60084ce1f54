"""Chooses a memory plan: a pure function of what is needed and what there is."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from keras_woodfisher.memory.plan import DISK, MEMORY, RECOMPUTED, MemoryNeeds, MemoryPlan
from keras_woodfisher.options.sizes import size_text

_VECTORS = 40
"""Bytes a weight: weights, masks, scores and corrections, most of them float64, with a copy to rank by."""

_JOINED = 32
"""Bytes a weight, where several processes work on blocks: what each has found, and what all have, on its way (at most
31 beside the others, torch, 4 processes)."""

_CANDIDATES = 100
"""Bytes a weight beside them: corrections to choose from, in float32, with the gradient and what is tried."""


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that a plan may use, and what the user chose.

    Attributes:
        limit: Bytes that may be used.
        reason: Where the limit comes from.
        folder: Of temporary files.
        disk: Free bytes there.
        place: `"cpu"` (in memory, or on disk where that is too small), `"disk"`, or the name of a device.
        dtype: Of the gradients.
        pages: The least number of pages where one block spans everything.
        free: Bytes that there are, whatever limit is given.
    """

    limit: int
    reason: str
    folder: str
    disk: int
    place: str = "cpu"
    dtype: str = "float32"
    pages: int = 1
    free: int = sys.maxsize

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2


def plan_memory(needs: MemoryNeeds, budget: MemoryBudget) -> MemoryPlan:
    """The first plan within the limit, of: all in memory, on disk, and a page of columns at a time.

    Work (samples at a time, blocks at a time) is made smaller only where gradients on disk don't make room enough.

    Raises:
        MemoryError: If none is, with what would fit.
    """
    if plan := _first(needs, budget):
        return plan
    raise MemoryError(_refusal(needs, budget))


def least_plan(needs: MemoryNeeds, budget: MemoryBudget) -> MemoryPlan:
    """The plan that takes least, whatever the limit; there has to be one, as where gradients may be in memory."""
    return min(_candidates(needs, replace(budget, limit=0)), key=lambda plan: plan.total)


def _first(needs: MemoryNeeds, budget: MemoryBudget) -> MemoryPlan | None:
    return next((plan for plan in _candidates(needs, budget) if plan.total <= budget.limit), None)


def _candidates(needs: MemoryNeeds, budget: MemoryBudget) -> Iterator[MemoryPlan]:
    size = budget.itemsize * needs.samples * needs.columns
    elsewhere = budget.place not in ("cpu", DISK)
    whole = budget.place == "cpu" and (budget.pages == 1 or needs.blocks > 1)
    page = _page(needs, budget.pages)
    if needs.shared is not None:
        shared = needs.shared(needs.samples)
        parted = _Layout(MEMORY, shared.columns, 0, page, shared.rows, shared.exchange)
        yield _plan(needs, budget, parted, needs.chunk, needs.lanes)
        yield _less_work(needs, budget, parted)
        return
    memory = _Layout(MEMORY, size, 0, page)
    away = replace(memory, storage=budget.place if elsewhere else DISK, resident=0, stored=size)
    if whole:
        yield _plan(needs, budget, memory, needs.chunk, needs.lanes)
    if elsewhere or size <= budget.disk:
        yield _plan(needs, budget, away, needs.chunk, needs.lanes)
        yield _less_work(needs, budget, away)
        while away.page > needs.panel and needs.widest > away.page:
            away = replace(away, page=max(needs.panel, away.page // 2))
            yield _less_work(needs, budget, away)
    if whole:
        yield _less_work(needs, budget, memory)
    if budget.place == "cpu":
        yield _by_pages(needs, budget)


@dataclass(frozen=True)
class _Layout:
    """A place for gradients: bytes in memory, bytes elsewhere, and columns of a page.

    Of several processes, also the bytes in memory while samples are taken, and while they are exchanged.
    """

    storage: str
    resident: int
    stored: int
    page: int
    parted: int | None = None
    exchange: int = 0

    @property
    def rows(self) -> int:
        return self.resident if self.parted is None else self.parted


def _page(needs: MemoryNeeds, pages: int = 1) -> int:
    """Columns of a page: those of whole blocks, but for blocks that are wide; or one of so many pages."""
    if pages > 1:
        return -(-needs.columns // pages)
    # The kernel takes a block of no more columns than samples as a whole.
    return max(1, min(needs.widest, max(needs.panel, needs.most)))


def _plan(needs: MemoryNeeds, budget: MemoryBudget, layout: _Layout, chunk: int, lanes: int) -> MemoryPlan:
    paged = layout.storage == RECOMPUTED or (layout.storage != MEMORY and needs.widest > layout.page)
    return MemoryPlan(
        limit=budget.limit,
        reason=budget.reason,
        storage=layout.storage,
        dtype=budget.dtype,
        samples=needs.samples,
        columns=needs.columns,
        most=needs.most,
        chunk=chunk,
        lanes=lanes,
        page=layout.page,
        pages=-(-needs.columns // layout.page) if paged else 1,
        folder=budget.folder if layout.storage == DISK else "",
        stored=layout.stored,
        gradients=layout.resident,
        rows=layout.rows,
        exchange=layout.exchange,
        sampling=_sampling(needs, budget, layout, chunk, needs.sample_bytes),
        usual_sampling=_sampling(needs, budget, layout, chunk, needs.usual_bytes),
        blocks=needs.block_bytes(needs.most, lanes)
        + _copies(needs, budget, layout, lanes)
        + (0 if needs.shared is None else _JOINED * needs.weights),
        vectors=_vectors(needs),
        ring=needs.ring_bytes,
    )


def _vectors(needs: MemoryNeeds) -> int:
    return (_VECTORS + (_CANDIDATES if needs.whole else 0)) * needs.weights + needs.structure_bytes


def _sampling(needs: MemoryNeeds, budget: MemoryBudget, layout: _Layout, chunk: int, sample: int) -> int:
    staged = layout.storage != MEMORY or budget.dtype != "float32"
    # A chunk waits in a buffer of its own, and what is written of it at a time is a copy (on a device: all).
    copy = budget.itemsize * needs.columns if layout.storage not in (MEMORY, DISK, RECOMPUTED) else 0
    return needs.reading_bytes + chunk * (sample + (4 * needs.columns + copy if staged else 0))


def _copies(needs: MemoryNeeds, budget: MemoryBudget, layout: _Layout, lanes: int) -> int:
    """Bytes of the gradients of blocks at work, where they aren't views of what is in memory."""
    if layout.storage == MEMORY and budget.dtype == "float32":
        return 0
    wide = needs.width > max(layout.page, needs.most)
    width = min(needs.width, max(layout.page, needs.most))
    # As it is stored, and as float32.
    page = (4 + (2 if budget.dtype == "float16" else 0)) * needs.most * width
    if layout.storage == RECOMPUTED and budget.dtype == "float32":
        page = 0
    lanes *= needs.kernels
    if wide:
        # The page, and for each lane the columns that it works on and those before.
        return page + 2 * lanes * 4 * needs.most * min(width, needs.panel)
    return lanes * page


def _less_work(needs: MemoryNeeds, budget: MemoryBudget, layout: _Layout, room: int | None = None) -> MemoryPlan:
    """As much work at a time as fits in so many bytes (by default what is left); at least one sample and one block."""
    rest = budget.limit - _vectors(needs) - needs.ring_bytes
    of_samples, of_blocks = (rest - layout.rows, rest - layout.resident) if room is None else (room, room)
    chunk, lanes = needs.chunk, needs.lanes
    while chunk > 1 and _sampling(needs, budget, layout, chunk, needs.sample_bytes) > of_samples:
        chunk -= 1
    while lanes > 1 and _plan(needs, budget, layout, chunk, lanes).blocks > of_blocks:
        lanes -= 1
    return _plan(needs, budget, layout, chunk, lanes)


def _by_pages(needs: MemoryNeeds, budget: MemoryBudget) -> MemoryPlan:
    """As many columns a page as fit beside the work, which may have half of what the rest leaves."""
    smallest = _page(needs)
    layout = _Layout(RECOMPUTED, 0, 0, smallest)
    if needs.blocks == 1 or needs.whole:
        # Threads that share the panels of one block would each want a page of their own.
        needs = replace(needs, lanes=1)
    rest = budget.limit - _vectors(needs) - needs.ring_bytes
    column = budget.itemsize * needs.samples
    work = _less_work(needs, budget, layout, room=min(rest // 2, rest - column * smallest))
    page = (rest - max(work.sampling, work.blocks)) // column
    most = _page(needs, budget.pages) if budget.pages > 1 else needs.columns
    page = max(smallest if budget.pages == 1 else min(smallest, most), min(page, most))
    while True:
        plan = _plan(needs, budget, replace(layout, page=page, resident=column * page), work.chunk, work.lanes)
        if plan.total <= budget.limit or page <= smallest:
            return plan
        # A page that holds a wide block as a whole needs more room for copies of it.
        page = max(smallest, page * 3 // 4)


def _refusal(needs: MemoryNeeds, budget: MemoryBudget) -> str:
    remedies = []
    if fewer := _fitting_samples(needs, budget):
        remedies.append(f"num_grads={fewer}")
    smallest = min(_candidates(needs, replace(budget, limit=0)), key=lambda plan: plan.total, default=None)
    wanted = f"num_grads={needs.samples} for {needs.columns:,} weights"
    if smallest is None:
        text = f"{wanted} were to be kept on disk. "
    else:
        text = (
            f"{wanted} needs at least {size_text(smallest.total)} of memory, but {size_text(budget.limit)} may be used "
            f"({budget.reason}). "
        )
        if smallest.total <= budget.free:
            remedies.append(f'memory_limit="{-(-smallest.total // 2**20)} MiB"')
    size = budget.itemsize * needs.samples * needs.columns
    if budget.place in ("cpu", DISK) and size > budget.disk and needs.shared is None:
        text += (
            f"On disk they would take {size_text(size)}, and {size_text(budget.disk)} are free in {budget.folder}: the "
            "environment variable TMPDIR names another folder. "
        )
    if needs.shared is not None:
        remedies.append("more processes, on other machines")
    fits = f"Any one of these would fit: {', '.join(remedies)}; " if remedies else ""
    return f"{text}{fits}params or exclude choose fewer weights."


def _fitting_samples(needs: MemoryNeeds, budget: MemoryBudget) -> int:
    """The most samples that would fit, or 0."""
    low, high = 0, needs.samples
    while high - low > 1:
        middle = (low + high) // 2
        fewer = replace(
            needs,
            samples=middle,
            most=max(1, needs.most * middle // needs.samples),
            ring_bytes=needs.ring_bytes * middle // needs.samples,
        )
        low, high = (middle, high) if _first(fewer, budget) else (low, middle)
    return low
