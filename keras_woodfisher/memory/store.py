"""What an update asks of the place where its gradients are, and the plain one: an array."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np


class GradientStore(Protocol):
    """G, filled row by row and read block by block.

    Samples come in chunks: write them into `room(n)`, then say with `keep` which are good. Rows that are dropped leave
    no gap.

    Attributes:
        chunk: The most samples that `room` gives at a time.
    """

    chunk: int

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d): samples that were kept so far, and unpruned weights."""
        ...

    def __len__(self) -> int:
        """Samples that were kept so far (m)."""
        ...

    def room(self, number: int) -> np.ndarray:
        """An array (n, d) float32 for the next samples."""
        ...

    def keep(self, good: np.ndarray) -> None:
        """Keeps those samples in the room that are `good`, (n,) bool."""
        ...

    def finish(self) -> None:
        """Ends the filling, and frees what was needed for that alone."""
        ...

    def groups(self, blocks: Sequence[slice]) -> Iterator[Sequence[slice]]:
        """Blocks that can be read at the same time, group after group in any order; `block` gives those of a group."""
        ...

    def block(self, block: slice) -> Any:
        """The samples of a block, (m, B) float32: an array, or what gives arrays as `view[:, columns]`."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


class MemoryStore:
    """The gradients as one float32 array; its blocks are views.

    Args:
        shape: (m, d): the most samples, and unpruned weights.
        chunk: See `GradientStore`.
    """

    def __init__(self, shape: tuple[int, int], chunk: int):
        self.chunk = chunk
        self._array: np.ndarray = np.empty(shape, np.float32)
        self._filled = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self._filled, self._array.shape[1]

    def __len__(self) -> int:
        return self._filled

    def room(self, number: int) -> np.ndarray:
        return self._array[self._filled : self._filled + number]

    def keep(self, good: np.ndarray) -> None:
        number = int(np.count_nonzero(good))
        if number < good.size:
            rows = self._array[self._filled : self._filled + good.size]
            for place, index in enumerate(np.flatnonzero(good)):
                rows[place] = rows[index]
        self._filled += number

    def finish(self) -> None:
        """Nothing to free."""

    def groups(self, blocks: Sequence[slice]) -> Iterator[Sequence[slice]]:
        yield blocks

    def block(self, block: slice) -> np.ndarray:
        return self._array[: self._filled, block]

    def close(self) -> None:
        # A view would keep all of it.
        self._array, self._filled = self._array[:0].copy(), 0


_: type[GradientStore] = MemoryStore
