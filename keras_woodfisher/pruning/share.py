"""The columns of G that this process holds, where several prune together, and how rows come to be columns.

Each process takes a share of the samples, whole rows, and then holds a share of the columns of all samples, whole
blocks: G is never in one place. A single process has all of both.
"""

from collections.abc import Sequence

import numpy as np
from keras_woodfisher_backends.ranks.ranks import Ranks
from keras_woodfisher_backends.ranks.shares import column_edges

from keras_woodfisher.memory.store import GradientStore, MemoryStore

PIECE = 32 * 2**20
"""Bytes that a process sends at a time."""

ON_THE_WAY = 5
"""How often they are there meanwhile: as they were cut out, as the engine takes, sends and gives them."""


class Share:
    """The columns of one process.

    Args:
        blocks: Columns of all blocks, in their order.
        width: How many columns there are (d).
        ranks: The processes.

    Attributes:
        ranks: As given.
        columns: Those of this process.
    """

    def __init__(self, blocks: Sequence[slice], width: int, ranks: Ranks):
        self.ranks = ranks
        self._edges = column_edges([*(block.stop for block in blocks), width], ranks.size)
        self.columns = slice(*self._edges[ranks.rank : ranks.rank + 2])

    @property
    def width(self) -> int:
        """How many columns it has."""
        return self.columns.stop - self.columns.start

    def own(self, blocks: Sequence[slice]) -> list[slice]:
        """Those of some blocks that it has, by the places of its own columns."""
        start, stop = self.columns.start, self.columns.stop
        return [slice(b.start - start, b.stop - start) for b in blocks if start <= b.start and b.stop <= stop]

    def joined(self, part: np.ndarray, axis: int = 0) -> np.ndarray:
        """What all processes have of something, in the order of columns, given this one's part."""
        return self.ranks.joined(part, axis)

    def exchanged(self, store: GradientStore) -> GradientStore:
        """The own columns of the rows of all processes, given its own rows, which are freed.

        Args:
            store: Its rows (m_r, d), in memory.
        """
        ranks = self.ranks
        if ranks.size == 1:
            return store
        counts = [int(found[0]) for found in ranks.all_gather(np.array([len(store)]))]
        total = sum(counts)
        out = MemoryStore((total, self.width), max(1, total))
        into = out.room(total)
        edges = np.cumsum([0, *counts])
        pieces = max(1, -(-4 * max(counts) * self._edges[-1] // PIECE))
        for number in range(pieces):
            self._exchange([self._piece(rank, number, pieces) for rank in range(ranks.size)], store, into, edges)
        store.close()
        out.keep(np.ones(total, bool))
        return out

    def _exchange(self, parts: Sequence[slice], store: GradientStore, into: np.ndarray, edges: np.ndarray) -> None:
        """Sends a part of the columns of each process, and keeps this one's; what was on its way is freed after it."""
        mine = parts[self.ranks.rank]
        width = slice(mine.start - self.columns.start, mine.stop - self.columns.start)
        found = self.ranks.all_to_all([np.ascontiguousarray(store.block(part)).ravel() for part in parts])
        for start, stop, rows in zip(edges[:-1], edges[1:], found, strict=True):
            into[start:stop, width] = rows.reshape(stop - start, mine.stop - mine.start)

    def _piece(self, rank: int, piece: int, pieces: int) -> slice:
        """One of so many pieces of a process's columns."""
        start, stop = self._edges[rank : rank + 2]
        return slice(*(start + (stop - start) * place // pieces for place in (piece, piece + 1)))
