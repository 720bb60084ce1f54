"""Normal equations of a layer: all that sparse least squares needs to know of its inputs and targets.

Letters, beside those of `protocol`: R rows (positions of examples), k inputs of an output, o outputs, g branches that
don't share inputs or weights (groups of a convolution, channels of a depthwise one, experts).
"""

from dataclasses import dataclass

import numpy as np

from keras_woodfisher_backends.least_squares.arithmetic import SINGLE, Arithmetic, OnHost
from keras_woodfisher_backends.ranks.ranks import Ranks

ROWS = 4096
"""Rows to add at a time: their products are summed in float32, and all of them in float64."""


@dataclass
class NormalEquations:
    """Sums over the rows x (k,) and targets t (o,) of one matrix, float64.

    Attributes:
        gram: `sum x x^T`, (g, k, k).
        cross: `sum x t^T`, (g, k, o).
        square: `sum |t|^2`.
        rows: How many rows were added (R).
    """

    gram: np.ndarray
    cross: np.ndarray
    square: float = 0.0
    rows: int = 0

    @classmethod
    def empty(cls, shape: tuple[int, int, int]) -> "NormalEquations":
        """Those of no rows, for a matrix (g, k, o)."""
        branches, inputs, outputs = shape
        return cls(np.zeros((branches, inputs, inputs)), np.zeros((branches, inputs, outputs)))

    def add(self, rows: np.ndarray, targets: np.ndarray, arithmetic: Arithmetic = SINGLE) -> None:
        """Adds rows (g, R, k) with their targets (g, R, o), float32, about `ROWS` of them."""
        if isinstance(arithmetic, OnHost):
            for branch in range(len(rows)):
                # The same array twice: BLAS computes one half.
                self.gram[branch] += rows[branch].T @ rows[branch]
            self.cross += rows.swapaxes(1, 2) @ targets
        else:
            with arithmetic.scope():
                sent = arithmetic.load(rows)
                turned = arithmetic.transposed(sent)
                self.gram += arithmetic.host(turned @ sent)
                self.cross += arithmetic.host(turned @ arithmetic.load(targets))
        self.square += float(np.einsum("gro,gro->", targets, targets, dtype=np.float64))
        self.rows += rows.shape[1]

    def summed(self, ranks: Ranks) -> "NormalEquations":
        """Those of the rows of all processes."""
        if ranks.size == 1:
            return self
        square, rows = ranks.sum(np.array([self.square, self.rows], np.float64))
        return NormalEquations(ranks.sum(self.gram), ranks.sum(self.cross), float(square), int(rows))

    def error(self, matrix: np.ndarray) -> float:
        """The relative squared error `sum |x W - t|^2 / sum |t|^2` of a matrix (g, k, o)."""
        if not self.square:
            return 0.0
        fit = np.sum(matrix * (self.gram @ matrix - 2.0 * self.cross))
        return max(0.0, float(fit) + self.square) / self.square
