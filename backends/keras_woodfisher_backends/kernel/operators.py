"""What a framework provides for the block-wise mathematics: a dozen operators on one device."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np


class Operators(Protocol):
    """The few operators that a framework provides. Device arrays are opaque to the kernel."""

    def scope(self) -> AbstractContextManager[Any]:
        """Entered around each call of the kernel: device placement and precision."""
        ...

    def finish(self) -> None:
        """Waits for what the calling thread has begun, where other threads wouldn't: their work may need it."""
        ...

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether an error says that the device's memory is full. What can be given back to the device is."""
        ...

    def load(self, panel: np.ndarray) -> Any:
        """A float32 panel (m, c) on the device. Zero rows and columns may be added at the end."""
        ...

    def gram(self, panel: Any, total: Any) -> Any:
        """`total + P P^T` (m, m) in float64; what is above the diagonal may be missing.

        `total` is None or what an earlier call returned, and may be overwritten.
        """
        ...

    def fisher(self, panel: Any, total: Any) -> Any:
        """`total + P^T P` (c, c) in the same way."""
        ...

    def plus(self, total: Any, part: Any) -> Any:
        """The sum of what two calls of `gram` returned; may overwrite the first."""
        ...

    def minus(self, total: Any, part: Any) -> Any:
        """Their difference."""
        ...

    def factor(self, matrix: Any, ridge: float) -> Any:
        """What the next four operators need of `matrix + ridge I = L L^T`. May overwrite `matrix`.

        Raises:
            numpy.linalg.LinAlgError: If that isn't positive definite and finite.
        """
        ...

    def leverage(self, factor: Any) -> Any:
        """A function panel -> (leverage, spread), float32 products, as NumPy float64.

        The leverage is the column sums of `(L^-1 P)^2`. The spread is `c @ P^2` with the column sums `c` of
        `(L^-1)^2`: float32 rounding moves a column of `L^-1 P` by about `eps sqrt(spread)`, which is far more than
        its own size tells if `L^-1` is large and most of it cancels (samples that are nearly equal).
        """
        ...

    def leverage_float64(self, factor: Any, panel: Any) -> np.ndarray:
        """The same, all in float64."""
        ...

    def inverse_diagonal(self, factor: Any) -> np.ndarray:
        """The diagonal of `(L L^T)^-1`, as NumPy float64."""
        ...

    def group_gram(self, factor: Any, groups: np.ndarray) -> np.ndarray:
        """`Z_S^T Z_S` for groups of columns of `Z = L^-1 P`, all in float64.

        Args:
            factor: Of a matrix of `rows` rows, or more.
            groups: The columns of each group, (rows, n, g) float32.

        Returns:
            (n, g, g) float64.
        """
        ...

    def solve(self, factor: Any, right: np.ndarray) -> np.ndarray:
        """`(L L^T)^-1 right` in float64. `right` may be shorter than L: the rest is zero."""
        ...

    def host(self, matrix: Any) -> np.ndarray:
        """What `gram` returned, as NumPy float64."""
        ...

    def combine(self, panel: Any, coefficients: np.ndarray) -> np.ndarray:
        """`P u` in float64, for `u` of shape (c,) or (c, k); it may be shorter than the panel: the rest is zero."""
        ...

    def project(self, panel: Any, dual: np.ndarray) -> np.ndarray:
        """`P^T x` in float64, for `x` of shape (m,) or (m, k), in the same way."""
        ...


class StackedOperators(Operators, Protocol):
    """Operators that also take stacks, of n panels (n, m, c), of matrices or factors (n, k, k), of vectors (n, k).

    They do the same with each of the n, and return as many. But for `leverage_float64` and `group_gram`, which take a
    single factor, and for the totals of sums, which are those of single panels.
    """

    def padded(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape that a stack (n, m, c) has on the host and on the device."""
        ...

    def load_stack(self, shape: tuple[int, int, int], parts: Iterable[np.ndarray]) -> tuple[np.ndarray, Any]:
        """Loads n blocks.

        Args:
            shape: (n, m, c).
            parts: The blocks one after the other, float32 arrays (m, c), or (m, k c) of k neighbours.

        Returns:
            The blocks on the host, (n, m, c), and on the device, where zero blocks, rows and columns may follow.
        """
        ...

    def masked(self, panels: Any, keep: np.ndarray) -> Any:
        """Panels with zeros in the columns that aren't kept; `keep` is (n, c) bool."""
        ...

    def one(self, factors: Any, place: int) -> Any:
        """A single factor of a stack."""
        ...


def unstacked(part: np.ndarray, width: int) -> np.ndarray:
    """A view (k, m, c) of k blocks that lie side by side, (m, k c)."""
    return part.reshape(len(part), -1, width).swapaxes(0, 1)


def fill_stack(stack: np.ndarray, parts: Iterable[np.ndarray]) -> None:
    """Copies the parts of `load_stack` to the host's array (n, m, c)."""
    start = 0
    for part in parts:
        blocks = unstacked(part, stack.shape[2])
        stack[start : start + len(blocks)] = blocks
        start += len(blocks)
        # Not beside the next one.
        del part, blocks
