"""Several blocks of equal width at a time, for devices that one block doesn't fill."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from keras_woodfisher_backends.kernel import BlockKernel, Stack, rest_of
from keras_woodfisher_backends.operators import StackedOperators

STACK = 2**24
"""Entries of `G` in one stack, 64 MiB: enough to keep a device busy, and a small part of its memory."""


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

    def together(self, samples: int, width: int) -> int:
        if self.lanes == 1 or width > self._panel:
            return 1
        # Where the device is small, stacks shrink with the panel.
        return max(1, STACK * self._panel // self._widest // (samples * width))

    def memory(self, samples: int, width: int, group: int = 1, blocks: int | None = None) -> int:
        number = self.together(samples, width)
        number = number if blocks is None else min(number, blocks)
        # In float32, masked, and in float64; matrix, factor, its inverse and a copy.
        stack = number * (16 * samples * width + 4 * 8 * min(samples, width) ** 2)
        return max(super().memory(samples, width, group, blocks), stack if number > 1 else 0)

    def staged(self, samples: int, width: int, columns: int) -> int:
        return max(super().staged(samples, width, columns), 4 * min(STACK, samples * columns))

    def inverse_diagonals(self, stack: Stack, damp: float) -> list[np.ndarray]:
        def one(place: int) -> np.ndarray:
            return self.inverse_diagonal(stack[place], damp)

        def many(places: Sequence[int]) -> Iterable[np.ndarray]:
            return self._diagonals(stack, places, damp)

        return self._dealt(stack, np.ones(len(stack), bool), one, many)

    def joint_updates(self, stack: Stack, damp: float, weights: np.ndarray, prune: np.ndarray) -> list[np.ndarray]:
        keep = ~prune
        removed = np.where(prune, weights, 0.0).astype(np.float64)

        def one(place: int) -> np.ndarray:
            return self.joint_update(stack[place], damp, weights[place], prune[place])

        def many(places: Sequence[int]) -> Iterable[np.ndarray]:
            return self._responses(stack, places, damp, removed[places], keep[places])

        # With fewer weights than samples left the other matrix is the smaller one.
        return self._dealt(stack, np.count_nonzero(keep, axis=1) > stack.samples, one, many)

    def independent_updates(
        self, stack: Stack, damp: float, weights: np.ndarray, prune: np.ndarray, diagonal: np.ndarray
    ) -> list[np.ndarray]:
        scaled = np.where(prune, weights / diagonal, 0.0)

        def one(place: int) -> np.ndarray:
            return self.independent_update(stack[place], damp, weights[place], prune[place], diagonal[place])

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

        def work() -> tuple[list[int], Iterable[np.ndarray]]:
            # Where the device was full, it takes fewer now.
            places = left[: self.together(stack.samples, stack.width)]
            return places, many(places) if len(places) > 1 else []

        while left:
            places, found = self._within_memory(work)
            if len(places) < 2:
                break
            out.update(zip(places, found, strict=True))
            left = left[len(places) :]
        return [out[place] if place in out else one(place) for place in range(len(stack))]

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
