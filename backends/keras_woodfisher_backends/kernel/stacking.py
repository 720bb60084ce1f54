"""Several blocks of equal width at a time, for devices that one block doesn't fill."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from keras_woodfisher_backends.kernel.factors import cholesky, one_minus_leverage
from keras_woodfisher_backends.kernel.operators import StackedOperators
from keras_woodfisher_backends.kernel.panels import Samples

STACK = 2**24
"""Entries of `G` in one stack, padding included: 64 MiB, and a few times as much on the device."""

DEVICE_BYTES = 400 * 2**20
"""What a stack takes of the device's memory: enough to keep it busy, and a small part of it."""


class Stack:
    """The samples of blocks of one width, read when they are asked for.

    Args:
        read: Gives the samples of some columns, (m, c) float32.
        blocks: Columns of each block; at least one.
        samples: m.
        joined: Whether neighbours may be read together: `read` copies nothing.
    """

    def __init__(self, read: Callable[[slice], Samples], blocks: Sequence[slice], samples: int, joined: bool = False):
        self._read = read
        self._blocks = blocks
        self._joined = joined
        self.samples = samples
        self.width = blocks[0].stop - blocks[0].start

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, place: int) -> Samples:
        return self._read(self._blocks[place])

    def parts(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """The samples of some blocks, one after the other: (m, B), or (m, k B) of k neighbours."""
        run: slice | None = None
        for place in places:
            block = self._blocks[place]
            if run is not None and self._joined and run.stop == block.start:
                run = slice(run.start, block.stop)
                continue
            if run is not None:
                yield self._read(run)[:, :]
            run = block
        if run is not None:
            yield self._read(run)[:, :]


class Stacking:
    """How a device computes many small matrices at once, and how many of them it has room for.

    All blocks of a stack are loaded whole; masks take the place of choosing columns, so that they stay of one shape.

    Args:
        operators: The framework's operators, bound to the device.
    """

    def __init__(self, operators: StackedOperators):
        self._ops = operators
        self._room = DEVICE_BYTES

    def number(self, samples: int, width: int) -> int:
        """How many blocks are taken at a time."""
        _, rows, columns = self._ops.padded((1, samples, width))
        number = max(1, min(STACK // (rows * columns), self._room // self._bytes(samples, width)))
        padded, _, _ = self._ops.padded((number, samples, width))
        # Else zero blocks would take more than there is room for.
        return number if padded == number else padded // 2

    def memory(self, samples: int, width: int, blocks: int | None) -> int:
        """Bytes of the device's memory that a stack takes at most; see `BlockKernel.memory`."""
        # Narrower blocks may take more than the widest, but for a bound of all.
        return self._room if blocks is None else min(self._room, blocks * self._bytes(samples, width))

    def staged(self, samples: int, columns: int) -> int:
        """Bytes of the samples of a stack on their way to the device."""
        return 4 * min(STACK, samples * columns)

    def fit(self, free: int) -> None:
        """Stays within the free bytes of the device."""
        self._room = min(DEVICE_BYTES, free)

    def attempt(self, work: Callable[[], np.ndarray], number: int, stack: Stack) -> np.ndarray | None:
        """What `work` on so many blocks gives; None if the device is too full for them: fewer are taken from now on."""
        try:
            with self._ops.scope():
                return work()
        except Exception as error:
            if not self._ops.is_out_of_memory(error):
                raise
        # In the end blocks by themselves, whose panels can be narrowed.
        self._room = min(self._room, number * self._bytes(stack.samples, stack.width) // 2)
        return None

    def inverse_diagonals(self, stack: Stack, places: Sequence[int], damp: float) -> np.ndarray:
        """`diag(F^-1)` of each block, (k, B) float64."""
        ops, m, width = self._ops, stack.samples, stack.width
        samples, panels = self._load(stack, places)
        if width <= m:
            factors = cholesky(ops, ops.fisher(panels, None), m, damp)
            return ops.inverse_diagonal(factors)[: len(places), :width] * m
        factors = cholesky(ops, ops.gram(panels, None), m, damp)
        sums, spread = (array[: len(places), :width] for array in ops.leverage(factors)(panels))
        return one_minus_leverage(ops, partial(ops.one, factors), samples, (sums, spread), damp) / damp

    def responses(
        self, stack: Stack, places: Sequence[int], damp: float, removed: np.ndarray, keep: np.ndarray | None = None
    ) -> np.ndarray:
        """`G_K^T (m damp I + G_K G_K^T)^-1 G r` of each block, (k, B) float64; all columns are kept without `keep`."""
        ops, number = self._ops, len(places)
        _, panels = self._load(stack, places)
        source = ops.combine(panels, removed)[:number, : stack.samples]
        kept = panels if keep is None else ops.masked(panels, keep)
        dual = ops.solve(cholesky(ops, ops.gram(kept, None), stack.samples, damp), source)
        out = ops.project(kept, dual)[:number, : stack.width]
        return out if keep is None else np.where(keep, out, 0.0)

    def _bytes(self, samples: int, width: int) -> int:
        """What a block takes of the device's memory at most, as one of a stack."""
        _, rows, columns = self._ops.padded((1, samples, width))
        # Samples in float32, masked, and in float64; matrix, factor, its inverse and a copy.
        return 16 * rows * columns + 4 * 8 * min(rows, columns) ** 2

    def _load(self, stack: Stack, places: Sequence[int]) -> tuple[np.ndarray, Any]:
        return self._ops.load_stack((len(places), stack.samples, stack.width), stack.parts(places))
