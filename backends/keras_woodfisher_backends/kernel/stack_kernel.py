"""Several blocks of equal width at a time, for devices that one block doesn't fill."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from keras_woodfisher_backends.kernel.block_kernel import BlockKernel, Stack, rest_of
from keras_woodfisher_backends.kernel.operators import StackedOperators

STACK = 2**24
"""Entries of `G` in one stack, padding included: 64 MiB, and a few times as much on the device."""


DEVICE_BYTES = 400 * 2**20
"""What a stack takes of the device's memory: enough to keep it busy, and a small part of it."""


class StackKernel(BlockKernel):
    """`BlockKernel` on a device that computes many small matrices at once.

    All blocks of a stack are loaded whole; masks take the place of choosing columns, so that they stay of one shape.

    Args:
        operators: The framework's operators, bound to the device.
        lanes: See `Panels`. With a single one, which is where memory is scarce, blocks are taken one by one.
    """

    def __init__(self, operators: StackedOperators, lanes: int):
        super().__init__(operators, lanes=lanes)
        self._stacked = operators
        self._room = DEVICE_BYTES

    def together(self, samples: int, width: int) -> int:
        if self.lanes == 1 or width > self._panel:
            return 1
        _, rows, columns = self._stacked.padded((1, samples, width))
        number = max(1, min(STACK // (rows * columns), self._room // self._bytes(samples, width)))
        padded, _, _ = self._stacked.padded((number, samples, width))
        # Else zero blocks would take more than there is room for.
        return number if padded == number else padded // 2

    def memory(self, samples: int, width: int, group: int = 1, blocks: int | None = None) -> int:
        single = super().memory(samples, width, group, blocks)
        if self.lanes == 1 or blocks == 1:
            return single
        # Narrower blocks may take more than the widest, but for a bound of all.
        stack = self._room if blocks is None else min(self._room, blocks * self._bytes(samples, width))
        return max(single, stack)

    def staged(self, samples: int, width: int, columns: int) -> int:
        return max(super().staged(samples, width, columns), 4 * min(STACK, samples * columns))

    def fit(self, samples: int, width: int, free: int, group: int = 1) -> None:
        self._room = min(DEVICE_BYTES, free)
        super().fit(samples, width, free, group)

    def inverse_diagonals(self, stack: Stack, damp: float, alone: bool = False) -> list[np.ndarray]:
        def one(place: int) -> np.ndarray:
            return self.inverse_diagonal(stack[place], damp, alone)

        def many(places: Sequence[int]) -> Iterable[np.ndarray]:
            return self._diagonals(stack, places, damp)

        return self._dealt(stack, np.ones(len(stack), bool), one, many)

    def joint_updates(
        self, stack: Stack, damp: float, weights: np.ndarray, prune: np.ndarray, alone: bool = False
    ) -> list[np.ndarray]:
        keep = ~prune
        removed = np.where(prune, weights, 0.0).astype(np.float64)

        def one(place: int) -> np.ndarray:
            return self.joint_update(stack[place], damp, weights[place], prune[place], alone)

        def many(places: Sequence[int]) -> Iterable[np.ndarray]:
            return self._responses(stack, places, damp, removed[places], keep[places])

        # With fewer weights than samples left the other matrix is the smaller one.
        return self._dealt(stack, np.count_nonzero(keep, axis=1) > stack.samples, one, many)

    def independent_updates(
        self,
        stack: Stack,
        damp: float,
        weights: np.ndarray,
        prune: np.ndarray,
        diagonal: np.ndarray,
        alone: bool = False,
    ) -> list[np.ndarray]:
        scaled = np.where(prune, weights / diagonal, 0.0)

        def one(place: int) -> np.ndarray:
            return self.independent_update(stack[place], damp, weights[place], prune[place], diagonal[place], alone)

        def many(places: Sequence[int]) -> Iterable[np.ndarray]:
            return np.where(prune[places], 0.0, self._responses(stack, places, damp, scaled[places], None) / damp)

        return self._dealt(stack, np.full(len(stack), stack.width > stack.samples), one, many)

    def _dealt(
        self,
        stack: Stack,
        stackable: np.ndarray,
        one: Callable[[int], np.ndarray],
        many: Callable[[Sequence[int]], Iterable[np.ndarray]],
    ) -> list[np.ndarray]:
        """Gives blocks that may be stacked to `many`, as many at a time as fit, and others to `one`."""
        out: dict[int, np.ndarray] = {}
        left: list[int] = np.flatnonzero(stackable).tolist()
        while len(places := left[: self.together(stack.samples, stack.width)]) > 1:
            try:
                with self._ops.scope():
                    found = many(places)
            except Exception as error:
                if not self._ops.is_out_of_memory(error):
                    raise
                # Fewer from now on; in the end blocks by themselves, whose panels can be narrowed.
                self._room = min(self._room, len(places) * self._bytes(stack.samples, stack.width) // 2)
                continue
            out.update(zip(places, found, strict=True))
            left = left[len(places) :]
        return [out[place] if place in out else one(place) for place in range(len(stack))]

    def _bytes(self, samples: int, width: int) -> int:
        """What a block takes of the device's memory at most, as one of a stack."""
        _, rows, columns = self._stacked.padded((1, samples, width))
        # Samples in float32, masked, and in float64; matrix, factor, its inverse and a copy.
        return 16 * rows * columns + 4 * 8 * min(rows, columns) ** 2

    def _load(self, stack: Stack, places: Sequence[int]) -> tuple[np.ndarray, Any]:
        return self._stacked.load_stack((len(places), stack.samples, stack.width), stack.parts(places))

    def _diagonals(self, stack: Stack, places: Sequence[int], damp: float) -> np.ndarray:
        ops, m, width = self._stacked, stack.samples, stack.width
        samples, panels = self._load(stack, places)
        if width <= m:
            factors = self._factor(ops.fisher(panels, None), m, damp)
            return ops.inverse_diagonal(factors)[: len(places), :width] * m
        factors = self._factor(ops.gram(panels, None), m, damp)
        sums, spread = (array[: len(places), :width] for array in ops.leverage(factors)(panels))
        return rest_of(ops, partial(ops.one, factors), samples, (sums, spread), damp) / damp

    def _responses(
        self, stack: Stack, places: Sequence[int], damp: float, removed: np.ndarray, keep: np.ndarray | None
    ) -> np.ndarray:
        """`G_K^T (m damp I + G_K G_K^T)^-1 G r` of each block, (k, B) float64; keeps all without `keep`."""
        ops, number = self._stacked, len(places)
        _, panels = self._load(stack, places)
        source = ops.combine(panels, removed)[:number, : stack.samples]
        kept = panels if keep is None else ops.masked(panels, keep)
        dual = ops.solve(self._factor(ops.gram(kept, None), stack.samples, damp), source)
        out = ops.project(kept, dual)[:number, : stack.width]
        return out if keep is None else np.where(keep, out, 0.0)
