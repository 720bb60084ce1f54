"""Gradients that are nowhere as a whole: a page of columns is kept, and all samples are taken again for the next."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from keras_woodfisher.memory.staged import StagedStore, encoded
from keras_woodfisher.memory.store import GradientStore

Refill = Callable[[GradientStore], object]
"""Takes all samples and adds them to a store."""

_SAME = 1e-3
"""How far a sample's norm may move from pass to pass: frameworks add in any order."""


class RecomputedStore(StagedStore):
    """One page of columns at a time, of the same samples in the same order each time.

    The `blocks` cover all columns in their order; `fill` takes all samples once more and adds them to the store.
    """

    def __init__(
        self, shape: tuple[int, int], chunk: int, dtype: str, page: int, blocks: Sequence[slice], fill: Refill
    ):
        super().__init__(shape, chunk, dtype, page)
        self._fill = fill
        self._norms = np.zeros(shape[0])
        self._array: np.ndarray = np.empty((shape[0], min(page, shape[1])), dtype)
        first = next(_pages(blocks, page), [])
        self._pieces = [slice(block.start, min(block.stop, block.start + page)) for block in first]
        self._passes = 0

    def groups(self, blocks: Sequence[slice]) -> Iterator[Sequence[slice]]:
        pages = list(_pages(blocks, self._page))
        # Backwards where the last page is the one that is there.
        for group in reversed(pages) if pages and self._has(pages[-1]) else pages:
            if group[0].stop - group[0].start <= self._page:
                self._load(group)
            yield group

    def close(self) -> None:
        super().close()
        # A view would keep all of it.
        self._array = self._array[:0].copy()

    def finish(self) -> None:
        # The buffer serves each pass.
        self._passes = 1

    def _has(self, pieces: Sequence[slice]) -> bool:
        return all(piece in self._pieces for piece in pieces)

    def _load(self, pieces: Sequence[slice]) -> None:
        if self._has(pieces):
            return
        self._pieces, before, self._filled = list(pieces), self._filled, 0
        with warnings.catch_warnings():
            # Of samples that are missing the first pass has warned.
            warnings.simplefilter("ignore")
            self._fill(self)
        if self._filled != before:
            raise self._changed(f"{self._filled} usable samples instead of {before}")

    def _write(self, rows: np.ndarray, first: int) -> None:
        here = slice(first, first + len(rows))
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
        if self._passes and not np.allclose(norms, self._norms[here], rtol=_SAME, atol=0.0):
            raise self._changed("other gradients")
        self._norms[here] = norms
        start = 0
        for piece in self._pieces:
            stop = start + piece.stop - piece.start
            self._array[here, start:stop] = encoded(rows[:, piece], self._scales[here], self._dtype)
            start = stop

    def columns(self, columns: slice) -> np.ndarray:
        parts = range(columns.start, columns.stop, self._page)
        if len(parts) > 1:
            pages = [slice(low, min(low + self._page, columns.stop)) for low in parts]
            return np.concatenate([super(RecomputedStore, self).columns(page).copy() for page in pages], axis=1)
        return super().columns(columns)

    def _read(self, columns: slice) -> np.ndarray:
        if columns not in self._pieces:
            self._load([columns])
        start = 0
        for piece in self._pieces[: self._pieces.index(columns)]:
            start += piece.stop - piece.start
        return self._array[: self._filled, start : start + columns.stop - columns.start]

    @staticmethod
    def _changed(what: str) -> ValueError:
        return ValueError(
            f"The memory limit lets gradients be kept a part at a time, so data is read several times, and gave {what} "
            "this time. Give data that is the same each time it is read (no shuffling, no random augmentation), set "
            "TMPDIR to a folder on a disk with room for the gradients, or raise memory_limit."
        )


def _pages(blocks: Sequence[slice], page: int) -> Iterator[list[slice]]:
    """Consecutive blocks that fit on a page together; one that is wider than a page is alone."""
    group: list[slice] = []
    width = 0
    for block in blocks:
        size = block.stop - block.start
        if group and width + size > page:
            yield group
            group, width = [], 0
        group.append(block)
        width += size
    if group:
        yield group


_: type[GradientStore] = RecomputedStore
