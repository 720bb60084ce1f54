"""The block-diagonal inverse Fisher over all chosen weights: which block works where."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras_woodfisher_backends.kernel import BlockKernel
from keras_woodfisher_backends.lanes import host_threads, side_by_side

from keras_woodfisher.stores.store import GradientStore, as_store


def block_slices(kept: Sequence[int], size: int | None) -> list[slice]:
    """Cuts columns into blocks that never span two variables (but for `size=None`: one block).

    >>> [(s.start, s.stop) for s in block_slices([5, 0, 2], 3)]
    [(0, 3), (3, 5), (5, 7)]

    Args:
        kept: Number of unpruned weights of each variable.
        size: Weights a block, or None.
    """
    if size is None:
        return [slice(0, sum(kept))] if sum(kept) else []
    blocks, start = [], 0
    for width in kept:
        stop = start + width
        blocks += [slice(low, min(low + size, stop)) for low in range(start, stop, size)]
        start = stop
    return blocks


class BlockFisher:
    """`F = damp I + (1/m) G^T G`, block by block, with the blocks dealt out over devices.

    Memory beyond `G` is that of one block at a time a device. Sources: WoodFisher (arXiv 2004.14340,
    section 3), M-FAC (arXiv 2107.03356).

    Args:
        grads: (m, d) float32 gradient samples of the unpruned weights: an array, or the store that they are in.
        blocks: Columns of each block.
        damp: Ridge on the diagonal of the Fisher.
        kernels: One kernel a device.
        advance: Called after each block, for a progress bar.
    """

    def __init__(
        self,
        grads: np.ndarray | GradientStore,
        blocks: Sequence[slice],
        damp: float,
        kernels: Sequence[BlockKernel],
        advance: Callable[[], None] = lambda: None,
    ):
        self._grads = as_store(grads)
        self._blocks = blocks
        self._damp = damp
        self._kernels = kernels
        self._advance = advance

    def inverse_diagonal(self) -> np.ndarray:
        """`diag(F^-1)`, (d,) float64."""
        out = np.empty(self._grads.shape[1])

        def work(kernel: BlockKernel, block: slice) -> None:
            out[block] = kernel.inverse_diagonal(self._grads.block(block), self._damp, alone=len(self._blocks) == 1)

        for blocks in self._grads.groups(self._blocks):
            self._each(work, blocks)
        return out

    def update(self, weights: np.ndarray, prune: np.ndarray, diagonal: np.ndarray, joint: bool) -> np.ndarray:
        """The change of the kept weights when `prune` is removed.

        Args:
            weights: (d,) unpruned weights.
            prune: (d,) bool, those to remove now.
            diagonal: (d,) from `inverse_diagonal` (the independent update uses it).
            joint: The exact update for the set in each block, or the sum of single updates.

        Returns:
            (d,) float64, zero where `prune`.
        """
        out = np.zeros(weights.shape)

        blocks = [block for block in self._blocks if prune[block].any()]
        alone = len(blocks) == 1

        def work(kernel: BlockKernel, block: slice) -> None:
            args = (self._grads.block(block), self._damp, weights[block], prune[block])
            if joint:
                out[block] = kernel.joint_update(*args, alone=alone)
            else:
                out[block] = kernel.independent_update(*args, diagonal[block], alone=alone)

        for group in self._grads.groups(blocks):
            self._each(work, group)
        return out

    def costs(self, change: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """The increase of the loss that a change of the weights stands for, `1/2 delta^T F delta` in each block.

        Args:
            change: (d,) delta of all weights.
            scale: Factor of `(1/m) G^T G`.

        Returns:
            One float64 a block.
        """
        found = {}

        def work(kernel: BlockKernel, block: slice) -> None:
            delta = change[block]
            grads = self._grads.block(block)
            fit = np.square(kernel.combine(grads, delta)).sum() / grads.shape[0]
            found[block.start] = 0.5 * (self._damp * np.square(delta).sum() + scale * fit)

        for group in self._grads.groups(self._blocks):
            self._each(work, group)
        return np.array([found[block.start] for block in self._blocks])

    def _each(self, work: Callable[[BlockKernel, slice], Any], blocks: Sequence[slice]) -> None:
        """Deals blocks out: whichever lane of whichever device is free takes the next one."""

        def one(kernel: BlockKernel, block: slice) -> None:
            work(kernel, block)
            self._advance()

        # The first lane of each device, then the second ones: few blocks use all devices.
        most = max(kernel.lanes for kernel in self._kernels)
        lanes = [kernel for turn in range(most) for kernel in self._kernels if turn < kernel.lanes]
        if blocks:
            side_by_side(lanes[: len(blocks)], blocks, one, cores=host_threads())
