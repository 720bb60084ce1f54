"""The block-diagonal inverse Fisher over all chosen weights: which block works where."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.stacking import Stack
from keras_woodfisher_backends.kernel.threads import deal, host_threads
from keras_woodfisher_backends.ranks.ranks import Ranks

from keras_woodfisher.memory.store import GradientStore, MemoryStore
from keras_woodfisher.pruning.share import Share


def block_slices(kept: Sequence[int], size: int | None, labels: np.ndarray | None = None) -> list[slice]:
    """Cuts columns into blocks that never span two variables (but for `size=None`: one block).

    >>> [(s.start, s.stop) for s in block_slices([5, 0, 2], 3)]
    [(0, 3), (3, 5), (5, 7)]
    >>> [(s.start, s.stop) for s in block_slices([5, 0, 2], 3, np.array([0, 0, 1, 1, 1, 2, 2]))]
    [(0, 2), (2, 5), (5, 7)]

    Args:
        kept: Number of unpruned weights of each variable.
        size: Weights a block, or None.
        labels: The group of each column: a block ends where a run of one group does, if it isn't longer than a block.
    """
    if size is None:
        return [slice(0, sum(kept))] if sum(kept) else []
    ends = None if labels is None else 1 + np.flatnonzero(np.diff(labels))
    blocks, start = [], 0
    for width in kept:
        stop = start + width
        while start < stop:
            end = min(start + size, stop)
            if ends is not None and end < stop:
                before = ends[: int(np.searchsorted(ends, end, side="right"))]
                end = int(before[-1]) if before.size and before[-1] > start else end
            blocks.append(slice(start, end))
            start = end
    return blocks


Advance = Callable[[], None]
"""Called after each block that is done, for a progress bar."""

Work = Callable[[BlockKernel, Sequence[slice]], None]
"""Does the work on some blocks by the kernel of a device."""


def no_progress() -> None:
    pass


class BlockFisher:
    """`F = damp I + (1/m) G^T G`, block by block, with the blocks dealt out over devices.

    Memory beyond `G` is that of one block at a time a lane, on GPUs of a stack of them. Sources: WoodFisher (arXiv
    2004.14340, section 3), M-FAC (arXiv 2107.03356).

    In its methods `weights` are the unpruned ones, (d,), and `advance` is called after each block that is done.

    Args:
        grads: The gradient samples (m, d) of the unpruned weights.
        blocks: Columns of each block.
        damp: Ridge on the diagonal of the Fisher.
        kernels: One kernel a device.
        share: The columns that this process has, if not all; what the others find is joined with its own.

    Attributes:
        grads, kernels, share: As given.
    """

    def __init__(
        self,
        grads: GradientStore,
        blocks: Sequence[slice],
        damp: float,
        kernels: Sequence[BlockKernel],
        share: Share | None = None,
    ):
        self.grads = grads
        self.share = share or Share(blocks, grads.shape[1], Ranks())
        self._blocks = self.share.own(blocks)
        self._damp = damp
        self.kernels = kernels
        self._diagonal: np.ndarray | None = None

    def inverse_diagonal(self, advance: Advance = no_progress) -> np.ndarray:
        """`diag(F^-1)`, (d,) float64; computed once."""
        if self._diagonal is None:
            out = np.empty(self.share.width)

            def work(kernel: BlockKernel, blocks: Sequence[slice]) -> None:
                found = kernel.inverse_diagonals(self._stack(blocks), self._damp)
                for block, diagonal in zip(blocks, found, strict=True):
                    out[block] = diagonal

            self._each(work, self._blocks, advance, together=True)
            self._diagonal = self.share.joined(out)
        return self._diagonal

    def touched(self, prune: np.ndarray | None = None) -> int:
        """How many blocks this process has of which some weight is to be pruned, (d,) bool; None: of any kind."""
        if prune is None:
            return len(self._blocks)
        own = prune[self.share.columns]
        return sum(bool(own[block].any()) for block in self._blocks)

    def group_costs(
        self, weights: np.ndarray, labels: np.ndarray, number: int, advance: Advance = no_progress
    ) -> np.ndarray:
        """What removing each of n = `number` groups costs, (n,) float64; see `BlockKernel.group_costs`.

        F is block-diagonal, so the cost of a group that lies in several blocks is the sum of those of its parts. That
        of a group without a weight is zero.
        """
        parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        weights, labels = weights[self.share.columns], labels[self.share.columns]

        def work(kernel: BlockKernel, blocks: Sequence[slice]) -> None:
            (block,) = blocks
            grads = self.grads.block(block)
            parts[block.start] = kernel.group_costs(grads, self._damp, weights[block], labels[block])

        self._each(work, self._blocks, advance)
        out = np.zeros(number)
        # In the order of the blocks, whichever was done first: rounding is always the same.
        ordered = [parts[start] for start in sorted(parts)]
        found = np.concatenate([np.zeros(0, np.int64), *(found for found, _ in ordered)])
        costs = np.concatenate([np.zeros(0), *(costs for _, costs in ordered)])
        np.add.at(out, self.share.joined(found), self.share.joined(costs))
        return out

    def cheapest_sets(
        self, weights: np.ndarray, members: np.ndarray, most: int, advance: Advance = no_progress
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each group, all in one block, the sets that cost least; see `BlockKernel.cheapest_sets`."""
        costs = np.full((len(members), most), np.inf)
        sets = np.zeros((len(members), most, members.shape[1]), bool)
        first, last = self.share.columns.start, self.share.columns.stop
        weights, here = weights[self.share.columns], members.max(1)
        # Those of other processes, and those without a weight, are nobody's here.
        members = np.where(members >= 0, members - first, -1)
        members[(here < first) | (here >= last)] = -1
        starts = np.array([block.start for block in self._blocks])
        owner = np.searchsorted(starts, members.max(1), side="right") - 1
        order = np.argsort(owner, kind="stable")
        edges = np.searchsorted(owner[order], np.arange(len(starts) + 1))
        solved = order[edges[0] :]
        groups = {start: order[slice(*pair)] for start, pair in zip(starts.tolist(), pairwise(edges), strict=True)}

        def work(kernel: BlockKernel, blocks: Sequence[slice]) -> None:
            (block,) = blocks
            if (chosen := groups[block.start]).size:
                here = members[chosen]
                here = np.where(here >= 0, here - block.start, -1)
                args = (self.grads.block(block), self._damp, weights[block], here, most)
                costs[chosen], sets[chosen] = kernel.cheapest_sets(*args)

        self._each(work, self._blocks, advance)
        if self.share.ranks.size > 1:
            every = self.share.joined(solved)
            costs[every], sets[every] = self.share.joined(costs[solved]), self.share.joined(sets[solved])
        return costs, sets

    def update(
        self,
        weights: np.ndarray,
        prune: np.ndarray,
        diagonal: np.ndarray | None,
        joint: bool,
        advance: Advance = no_progress,
    ) -> np.ndarray:
        """The change of the kept weights when `prune`, (d,) bool, is removed: (d,) float64, zero where `prune`.

        With `joint` it is the exact update for the set in each block, else the sum of single updates, which `diagonal`
        (from `inverse_diagonal`) is for. Blocks that have no weight to remove are left out.
        """
        columns = self.share.columns
        weights, prune = weights[columns], prune[columns]
        diagonal = None if diagonal is None else diagonal[columns]
        out = np.zeros(weights.shape)

        def work(kernel: BlockKernel, blocks: Sequence[slice]) -> None:
            args = (self._stack(blocks), self._damp, _rows(weights, blocks), _rows(prune, blocks))
            if joint:
                found = kernel.joint_updates(*args)
            else:
                assert diagonal is not None
                found = kernel.independent_updates(*args, _rows(diagonal, blocks))
            for block, change in zip(blocks, found, strict=True):
                out[block] = change

        touched = [block for block in self._blocks if prune[block].any()]
        self._each(work, touched, advance, together=True)
        return self.share.joined(out)

    def costs(self, change: np.ndarray, scale: float = 1.0, advance: Advance = no_progress) -> np.ndarray:
        """The increase of the loss that a change (d,) of the weights stands for, `1/2 delta^T F delta` in each block.

        `scale` is a factor of `(1/m) G^T G`.
        """
        found = {}
        change = change[self.share.columns]

        def work(kernel: BlockKernel, blocks: Sequence[slice]) -> None:
            (block,) = blocks
            delta = change[block]
            grads = self.grads.block(block)
            fit = np.square(kernel.combine(grads, delta)).sum() / grads.shape[0]
            found[block.start] = 0.5 * (self._damp * np.square(delta).sum() + scale * fit)

        # Products with one vector are too short to be shared.
        self._each(work, self._blocks, advance, share=False)
        return self.share.joined(np.array([found[block.start] for block in self._blocks], np.float64))

    def _each(
        self, work: Work, blocks: Sequence[slice], advance: Advance, together: bool = False, share: bool = True
    ) -> None:
        """Deals blocks out: whichever lane of whichever device is free takes the next one.

        If `together`, devices that take several blocks of one width at a time get as many; else each is worked on by
        itself. If `share`, a single block is shared among the lanes of the first device.
        """
        kernels = [kernel.sharing() for kernel in self.kernels] if share and len(blocks) == 1 else self.kernels
        # The first lane of each device, then the second ones: few blocks use all devices.
        most = max(kernel.lanes for kernel in kernels)
        lanes = [kernel for turn in range(most) for kernel in kernels if turn < kernel.lanes]

        def do(kernel: BlockKernel, job: Sequence[slice]) -> None:
            work(kernel, job)
            for _ in job:
                advance()

        for group in self.grads.groups(blocks) if blocks else ():
            queue = _Queue(group, self.grads.shape[0], len(lanes) if together else len(group))
            deal(lanes[: len(group)], queue.take, do, cores=host_threads())

    def _stack(self, blocks: Sequence[slice]) -> Stack:
        joined = isinstance(self.grads, MemoryStore)
        return Stack(self.grads.block, blocks, self.grads.shape[0], joined)


def _rows(vector: np.ndarray, blocks: Sequence[slice]) -> np.ndarray:
    """The parts of a vector that belong to blocks of one width, (n, B); of a single one, which may be all, a view."""
    return vector[None, blocks[0]] if len(blocks) == 1 else np.stack([vector[block] for block in blocks])


class _Queue:
    """Blocks in their order, with others of the same width where a device takes several: each lane should get some."""

    def __init__(self, blocks: Sequence[slice], samples: int, lanes: int):
        self._blocks = deque(blocks)
        self._samples = samples
        self._alike: dict[int, deque[slice]] = {}
        for block in blocks:
            self._alike.setdefault(block.stop - block.start, deque()).append(block)
        self._share = {width: -(-len(alike) // lanes) for width, alike in self._alike.items()}
        self._taken: set[int] = set()

    def take(self, kernel: BlockKernel) -> list[slice]:
        """The next blocks for a device.

        Raises:
            StopIteration: If none is left.
        """
        while self._blocks and self._blocks[0].start in self._taken:
            self._blocks.popleft()
        if not self._blocks:
            raise StopIteration
        width = self._blocks[0].stop - self._blocks[0].start
        alike = self._alike[width]
        number = min(len(alike), self._share[width], kernel.together(self._samples, width))
        job = [alike.popleft() for _ in range(number)]
        self._taken.update(block.start for block in job)
        return job
