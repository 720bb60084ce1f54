"""The plan that an update keeps to: where its gradients are, what works at the same time, and the bytes of each."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from keras_woodfisher.options.sizes import size_text

MEMORY, DISK, RECOMPUTED = "memory", "disk", "recomputed"
"""Where gradients may be; any other place is the name of a device."""


@dataclass(frozen=True)
class SharedBytes:
    """Bytes of the gradients of one of several processes that share them.

    Attributes:
        rows: Those of its samples, with the columns of all.
        columns: Those of its columns, of all samples.
        moving: On their way between the two.
    """

    rows: int
    columns: int
    moving: int

    @property
    def exchange(self) -> int:
        """While they are exchanged, when all of them are there."""
        return self.rows + self.columns + self.moving


@dataclass(frozen=True)
class MemoryNeeds:
    """What the update that needs most would take, before anything is decided.

    Attributes:
        samples: Gradient samples (m).
        columns: Unpruned weights (d).
        most: The most samples of any update; those that come later have fewer columns.
        weights: All chosen weights, pruned ones too.
        widest: Weights of the widest block.
        blocks: How many blocks there are.
        chunk: Samples that are taken at a time where memory is plenty.
        sample_bytes: Bytes of one sample while it is taken, wherever it is kept, at most.
        usual_bytes: The same as they are with layers that are known.
        reading_bytes: Bytes of the examples that are read at a time.
        ring_bytes: Bytes of the ring that buffers the training's own gradients.
        lanes: Blocks (on a GPU stacks of them) that are worked on at a time where memory is plenty.
        kernels: How many devices work on that many blocks each.
        block_bytes: `block_bytes(m, lanes)`: bytes of so many blocks at work on each, beside their gradients.
        panel: Columns of a block that the kernel asks for at a time, where it is wide.
        whole: Whether corrections span all blocks, whatever their size.
        structure_bytes: Bytes of the groups that are pruned together, and of choosing among them.
        shared: Where several processes share the gradients, `shared(m)`: what one of them holds of m samples.
    """

    samples: int
    columns: int
    most: int
    weights: int
    widest: int
    blocks: int
    chunk: int
    sample_bytes: int
    usual_bytes: int
    reading_bytes: int
    ring_bytes: int
    lanes: int
    kernels: int
    block_bytes: Callable[[int, int], int]
    panel: int
    whole: bool = False
    structure_bytes: int = 0
    shared: Callable[[int], SharedBytes] | None = None

    @property
    def width(self) -> int:
        """Weights of the widest set that the inverse spans: a block, or all of them where corrections do."""
        return self.columns if self.whole else self.widest


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the host's memory that updates take at most, beside those of the model and its training.

    Attributes:
        limit: Bytes that were allowed.
        reason: Where that limit comes from.
        storage: Where gradients are: `"memory"`, `"disk"`, `"recomputed"` page by page, or the name of a device.
        dtype: `"float32"` or `"float16"`.
        samples: Gradient samples (m) of the update that needs most.
        columns: Its unpruned weights (d).
        most: The most samples of any update.
        chunk: Samples that are taken at a time.
        lanes: Blocks (on a GPU stacks of them) that are worked on at a time.
        page: Columns of a page, which is read at a time where the gradients aren't in memory or one block is wider.
        pages: How many such pages there are; 1 where gradients are in memory as a whole.
        folder: Of the temporary file, or "".
        stored: Bytes of the gradients on disk or on a device.
        gradients: Bytes of the gradients in memory while blocks are worked on.
        rows: The same while samples are taken: one of several processes has rows then, and columns later.
        exchange: Bytes of both, and on their way between, while processes exchange them; 0 for a single one.
        sampling: Bytes while samples are taken, at most.
        usual_sampling: The same as they are with layers that are known.
        blocks: Bytes while blocks are worked on.
        vectors: Bytes of weights, scores, masks and corrections.
        ring: Bytes of the ring of buffered gradients.
    """

    limit: int
    reason: str
    storage: str
    dtype: str
    samples: int
    columns: int
    most: int
    chunk: int
    lanes: int
    page: int
    pages: int
    folder: str
    stored: int
    gradients: int
    rows: int
    exchange: int
    sampling: int
    usual_sampling: int
    blocks: int
    vectors: int
    ring: int

    @property
    def total(self) -> int:
        """Bytes at the peak, at most: samples are never taken while blocks are worked on."""
        return self._peak(self.sampling)

    @property
    def expected(self) -> int:
        """Bytes at the peak that are to be expected; the total has room for layers of any kind on any backend."""
        return self._peak(self.usual_sampling)

    def _peak(self, sampling: int) -> int:
        most = max(self.rows + sampling, self.exchange, self.gradients + self.blocks)
        return self.vectors + self.ring + most

    def covers(self, samples: int, columns: int) -> bool:
        """Whether an update of that size is within the plan."""
        return samples <= self.most and samples * columns <= self.samples * self.columns

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, with the peak at most and as it is expected."""
        return asdict(self) | {"total": self.total, "expected": self.expected}

    def __str__(self) -> str:
        return "\n".join(
            [
                f"memory plan: {size_text(self.total)} at the peak, of {size_text(self.limit)} ({self.reason}); "
                f"expected: {size_text(self.expected)}",
                f"  gradients, {self.samples:,} x {self.columns:,} {self.dtype}: {self._place()}",
                f"  taking samples: {size_text(self.sampling)}, {self.chunk} at a time",
                f"  blocks at work: {size_text(self.blocks)}, {self.lanes} at a time",
                f"  weights and scores: {size_text(self.vectors)}",
                *([f"  buffered gradients of training: {size_text(self.ring)}"] if self.ring else []),
            ]
        )

    def _place(self) -> str:
        if self.storage == MEMORY:
            shared = f", {size_text(self.exchange)} while processes exchange them" if self.exchange else ""
            return f"{size_text(self.gradients)} in memory{shared}"
        if self.storage == RECOMPUTED:
            return (
                f"{size_text(self.gradients)} in memory, one of {self.pages} pages of columns; "
                f"taken again for each page"
            )
        place = f"on disk in {self.folder}" if self.storage == DISK else f"on {self.storage}"
        pages = f", read in {self.pages} pages" if self.pages > 1 else ""
        return f"{size_text(self.stored)} {place}{pages}"
