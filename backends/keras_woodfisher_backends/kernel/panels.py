"""The gradient samples of a block, panel by panel: what bounds the memory of a device, and fills its lanes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from keras_woodfisher_backends.kernel.operators import Operators
from keras_woodfisher_backends.kernel.threads import side_by_side

PANEL = 4096
"""Columns of `G` that are worked on at a time: it bounds the memory when one block spans everything."""

SMALLEST_PANEL = 64
"""A device that has no room for so many columns is too small."""


class Samples(Protocol):
    """The gradient samples of a block: an array, or what reads them from elsewhere panel by panel."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, B)."""
        ...

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        """`samples[rows, columns]`, float32."""
        ...


Result = TypeVar("Result")


class PanelWidth:
    """How many columns a panel may have, by the memory of the device. Several threads may change it.

    Attributes:
        widest: Columns of a panel where there is memory enough.
        now: Columns of a panel at present.
    """

    def __init__(self, widest: int):
        self.widest = self.now = widest

    def fit(self, fits: Callable[[int], bool]) -> None:
        """Halves the widest panel until it `fits`."""
        self.now = self.widest
        while self.now > SMALLEST_PANEL and not fits(self.now):
            self.now //= 2


@dataclass(frozen=True)
class Panels:
    """Cuts the columns of a block into panels that fit a device's memory, and runs work on them.

    Attributes:
        operators: The framework's operators, bound to the device.
        columns: The width of a panel, for all that work on the device.
        lanes: Threads that work on the device at the same time.
        on_host: Whether its lanes share the cores of the host, and their BLAS threads.
        shared: Whether the panels of a block are dealt out to all lanes; else the calling thread takes all of them.
    """

    operators: Operators
    columns: PanelWidth
    lanes: int = 1
    on_host: bool = False
    shared: bool = False

    @property
    def width(self) -> int:
        """Columns of a panel at present."""
        return self.columns.now

    @property
    def in_this_thread(self) -> "Panels":
        """The same, with all panels of a block in the calling thread."""
        return replace(self, shared=False)

    def within_memory(self, work: Callable[[], Result]) -> Result:
        """What `work` returns. Where the device's memory is full, the panel is halved and the work begins anew.

        Raises:
            MemoryError: If the device has no room even for the smallest panel.
        """
        while True:
            width = self.width
            try:
                with self.operators.scope():
                    return work()
            except Exception as error:
                if not self.operators.is_out_of_memory(error):
                    raise
                if width <= SMALLEST_PANEL:
                    raise MemoryError(
                        f"A device has no room for the inverse Fisher of a block, {width} columns at a time: {error}. "
                        "Lower num_grads, or use another device (available_gpus)."
                    ) from error
            # Another lane may have halved it meanwhile.
            self.columns.now = min(self.width, width // 2)

    def for_each(self, work: Callable[[slice, int], None], size: int) -> None:
        """Calls `work(columns, lane)` for each panel of a block of `size` columns."""
        self.run(work, list(self.parts(size)))

    def run(self, work: Callable[[Any, int], None], parts: Sequence[Any]) -> None:
        """Calls `work(part, lane)` for each part."""
        lanes = min(self.lanes, len(parts)) if self.shared else 1
        if lanes < 2:
            for part in parts:
                work(part, 0)
            return

        def within(_: Any, lane: int) -> None:
            with self.operators.scope():
                for part in parts[lane::lanes]:
                    work(part, lane)
                self.operators.finish()

        self.operators.finish()
        # Which panels are summed together doesn't depend on which lane is free: the result is always the same.
        side_by_side(range(lanes), range(lanes), within, cores=self.lanes if self.on_host else lanes)

    def parts(self, size: int) -> Iterator[slice]:
        """Ranges of `size` columns (or rows), each as long as a panel is wide; the last may be shorter."""
        # Another lane may halve the panel meanwhile.
        step = self.width
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))


def take_columns(panel: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The columns of a panel (m, c) that are `chosen`, (c,) bool."""
    # `panel[:, chosen]` would be laid out column after column, which is slow to work on.
    return panel if chosen.all() else np.take(panel, np.flatnonzero(chosen), axis=1)


def block_bytes(samples: int, width: int, group: int, panel: int) -> int:
    """Bytes that the work on one block takes at most; see `BlockKernel.memory`."""
    matrix = 8 * min(samples, width) ** 2
    columns = 8 * samples * min(width, panel)
    # Double panel, product of the panel, and Fisher or Gram matrix, factor, its inverse and a copy.
    single = columns + columns // 2 + 4 * matrix
    if group == 1:
        return single
    rows, largest = min(samples, width), min(group, samples, width)
    gathered = max(min(width, panel // 2), largest)
    # Columns of groups in float32, in float64, solved, and by group; the matrix of each group and its factor.
    return max(single, (4 + 3 * 8) * rows * gathered + 2 * 8 * gathered * largest + 5 * matrix)
