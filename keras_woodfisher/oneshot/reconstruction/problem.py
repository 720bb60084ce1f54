"""One matrix of one layer, to be made sparse: what was seen of its inputs, and the solution."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from keras_woodfisher_backends.least_squares.arithmetic import Arithmetic, OnDevice, arithmetic_for
from keras_woodfisher_backends.least_squares.exchange import exchange
from keras_woodfisher_backends.least_squares.kept_values import least_squares
from keras_woodfisher_backends.least_squares.normal_equations import ROWS, NormalEquations
from keras_woodfisher_backends.least_squares.parts import Part
from keras_woodfisher_backends.least_squares.paths import SMALL, best_sizes
from keras_woodfisher_backends.least_squares.support import sparse_support
from keras_woodfisher_backends.ranks.ranks import Ranks

from keras_woodfisher.model.targets import Target
from keras_woodfisher.reports.layer_report import LayerReport

SUPPORT_RIDGE, VALUE_RIDGE = 0.01, 0.001
"""Ridges for the choice of weights and for their values, as parts of the mean of H's diagonal."""

_LEAST_ROWS, _ROWS_PER_INPUT, _MANY_ROWS, _FEWER_PER_INPUT = 4096, 100, 100_000, 16

_CHECKED, _TOLERANCE = 64, 1e-2
"""Rows on which a layer is checked to be the product it is taken for, and the largest relative error."""

_TELLING = 8
"""So many of them, at least, have an input that isn't zero, if there are."""

_EIGEN, _ITERATION = 40.0, 400.0
"""Guesses for forecasts: operations of a decomposition, by k^3, and of all iterations, by k^2 o."""


def most_rows(inputs: int) -> float:
    """So many rows are enough for an output of so many inputs: 100 for each, but above 100,000 only 16 for each."""
    return max(_LEAST_ROWS, min(_ROWS_PER_INPUT * inputs, _MANY_ROWS), _FEWER_PER_INPUT * inputs)


class Choice(Protocol):
    """Which weights of each variable may stay.

    Attributes:
        settled: Whether that is known beforehand, whatever the weights are worth.
    """

    settled: bool

    def choose(self, target: Target, values: np.ndarray) -> np.ndarray:
        """The weights to keep, bool, given how much each is worth, by size; both in the variable's shape."""
        ...

    def exchangeable(self, target: Target) -> np.ndarray:
        """The weights that may be kept or not, one in place of another, bool in the variable's shape."""
        ...


class NotAProduct(Exception):
    """A layer doesn't compute what its class says, so it can't be reconstructed."""


class Problem:
    """Sparse least squares for one part of a layer.

    Args:
        layer: The layer whose calls are watched.
        part: The matrix.
        targets: Those of its variables that are pruned, by name.
        kernels: The dense values of all its variables, by name.
        seed: Of the choice of rows.

    Attributes:
        calls: How often the model calls the layer.
        positions: Rows that an example gives, over all calls.
        rows: The first axis of the input of each call, for one example, by the shapes of the model's inputs.
        hurried: Whether the support may be a little worse, in a part of the time.
        device: An accelerator for the products, if there is one.
        ranks: The processes that have seen other rows each.
        solution: The new kernels, once they are known.
        report: What was found.
    """

    def __init__(
        self, layer: Any, part: Part, targets: Mapping[str, Target], kernels: Mapping[str, np.ndarray], seed: Any
    ):
        self.layer = layer
        self.part = part
        self.targets = targets
        self.kernels = kernels
        self.calls = 1
        self.positions = 1
        self.rows: Mapping[tuple[tuple[int, ...], ...], Sequence[int]] = {}
        self.hurried = False
        self.device: OnDevice | None = None
        self.ranks = Ranks()
        self.solution: dict[str, np.ndarray] | None = None
        self.report: LayerReport | None = None
        self._rng = np.random.default_rng(seed)
        self._equations: NormalEquations | None = None
        self._checked = False
        self._seconds = 0.0

    @property
    def name(self) -> str:
        """The names of the variables that are pruned."""
        return ", ".join(target.name for target in self.targets.values())

    @property
    def key(self) -> tuple[int, ...]:
        """What tells it from others, whose variables may have the same names."""
        return tuple(id(target.variable) for target in self.targets.values())

    @property
    def sums(self) -> int:
        """Bytes that it keeps of the rows that it has seen."""
        branches, inputs, outputs = self.part.shape
        return 8 * branches * inputs * (inputs + outputs)

    @property
    def work(self) -> int:
        """Bytes that rows, or the solution, take beside that."""
        branches, inputs, outputs = self.part.shape
        solution = 8 * branches * inputs * (4 * inputs + 7 * outputs)
        return max(solution, 8 * ROWS * branches * (inputs + outputs))

    def operations(self, examples: int) -> float:
        """About how many multiplications and additions it takes, given so many examples."""
        branches, inputs, outputs = self.part.shape
        rows = min(examples * self.positions, most_rows(inputs))
        each = inputs * rows * (inputs + 2.0 * outputs) + inputs**2 * (_EIGEN * inputs + _ITERATION * outputs)
        return branches * each

    @property
    def _arithmetic(self) -> Arithmetic:
        return arithmetic_for(self.part.shape, self.device)

    @property
    def done(self) -> bool:
        """Whether it is solved, or known that it can't be."""
        return self.report is not None

    def give_up(self, why: str) -> None:
        """Leaves the kernels as they were."""
        self.solution, self._equations = None, None
        self.report = LayerReport(self.name, note=why)

    def see(
        self,
        inputs: list[np.ndarray],
        output: np.ndarray,
        places: np.ndarray,
        off: np.ndarray | None = None,
    ) -> None:
        """Adds what one call shows.

        Args:
            inputs: Of the kernels, in the pruned model.
            output: Of the dense layer, before bias and activation.
            places: The positions to use, as `places` gives them.
            off: What is to be taken off the targets, (g, R, o).
        """
        start = time.perf_counter()
        if self._equations is None:
            self._equations = NormalEquations.empty(self.part.shape)
        for first in range(0, len(places), ROWS):
            some = places[first : first + ROWS]
            targets = self.part.targets(output, some)
            if off is not None:
                targets = targets - off[:, first : first + ROWS]
            self._equations.add(self.part.rows(inputs, some), targets, self._arithmetic)
        self._seconds += time.perf_counter() - start

    def places(self, output: Any, mask: np.ndarray | None, share: float) -> np.ndarray:
        """Flat indices of the (example, position)s to use.

        Args:
            output: Of the layer.
            mask: Which positions count, (N, ...) bool for the first axes of the positions; None: all.
            share: The part that this call has in all that will be seen.
        """
        positions = self.part.positions(output)
        examples, each = output.shape[0], int(np.prod(positions))
        most = most_rows(self.part.shape[1]) * share
        if mask is not None and mask.shape[1:] != positions[: mask.ndim - 1]:
            # A convolution without padding has other positions than its input: all of them count.
            mask = None
        if mask is not None:
            inner = (1,) * (1 + len(positions) - mask.ndim)
            found = np.flatnonzero(np.broadcast_to(mask.reshape(*mask.shape, *inner), (examples, *positions)))
            if found.size > most:
                found = np.sort(self._rng.choice(found, max(1, int(most)), replace=False))
            return found
        few = max(1, int(np.ceil(most / examples)))
        if few >= each:
            return np.arange(examples * each)
        chosen = self._rng.random((examples, each), dtype=np.float32).argpartition(few, axis=1)[:, :few]
        return (np.arange(examples)[:, None] * each + np.sort(chosen, axis=1)).ravel()

    def check(self, inputs: Callable[[], list[np.ndarray]], output: np.ndarray, places: np.ndarray) -> None:
        """Makes sure, at the first call, that the layer is the product that it is taken for.

        Args:
            inputs: Gives the inputs of the kernels in the dense model.
            output: Of the dense layer.
            places: As in `see`.

        Raises:
            NotAProduct: If it isn't.
            FloatingPointError: If that isn't finite.
        """
        if self._checked:
            return
        rows, some = self._telling(inputs(), places)
        wanted, found = self.part.targets(output, some), rows @ self.part.matrix(self.kernels)
        if not (np.isfinite(wanted).all() and np.isfinite(found).all()):
            raise self._not_finite()
        size = float(np.abs(wanted).max(initial=0.0))
        same = found.shape == wanted.shape and np.abs(found - wanted).max(initial=0.0) <= _TOLERANCE * size + 1e-6
        if self.ranks.any(not same):
            raise NotAProduct
        self._checked = True

    def _telling(self, inputs: list[np.ndarray], places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows from all over the places, (g, R, k), and where they are; others where nearly all of them are zero."""
        some = places[np.linspace(0, len(places) - 1, min(len(places), _CHECKED)).astype(int)]
        rows = self.part.rows(inputs, some)
        for first in range(0, len(places), ROWS):
            if np.count_nonzero(rows.any(axis=(0, 2))) >= _TELLING:
                break
            block = places[first : first + ROWS]
            more = self.part.rows(inputs, block)
            chosen = np.flatnonzero(more.any(axis=(0, 2)))[:_CHECKED]
            some, rows = np.concatenate([some, block[chosen]]), np.concatenate([rows, more[:, chosen]], axis=1)
        return rows, some

    def solve(self, choice: Choice) -> None:
        """Finds the sparse kernels.

        Raises:
            FloatingPointError: If what was seen, or the solution, isn't finite.
        """
        start = time.perf_counter()
        part = self.part
        equations = self._equations = (self._equations or NormalEquations.empty(part.shape)).summed(self.ranks)
        if not equations.rows:
            self.report = LayerReport(self.name, note="none of its positions counts on this data")
            return
        if not (np.isfinite(equations.square) and np.isfinite(equations.gram).all()):
            raise self._not_finite()

        def project(values: np.ndarray) -> np.ndarray:
            kernels = part.kernels(values)
            return part.matrix({name: choice.choose(self.targets[name], kernel) for name, kernel in kernels.items()})

        dense = part.matrix(self.kernels).astype(np.float64)
        diagonal = np.einsum("gkk->gk", equations.gram)
        # Where no input is ever anything but zero, all weights are alike.
        mean = diagonal.mean() or 1.0
        ridge, pull = mean * np.eye(part.shape[1]), mean * dense
        if choice.settled:
            kept, near = project(dense), dense
        else:
            gram, cross = equations.gram + SUPPORT_RIDGE * ridge, equations.cross + SUPPORT_RIDGE * pull
            kept, near = sparse_support(gram, cross, dense, project, self.hurried, self._arithmetic)
        gram, cross = equations.gram + VALUE_RIDGE * ridge, equations.cross + VALUE_RIDGE * pull
        if not (choice.settled or self.hurried):
            kept = self._exchanged(gram, cross, kept, choice)
        matrix = least_squares(gram, cross, kept, near, self._arithmetic)
        self._finish(matrix, int((diagonal == 0.0).sum()), start)

    def _exchanged(self, gram: np.ndarray, cross: np.ndarray, kept: np.ndarray, choice: Choice) -> np.ndarray:
        """A better support with as many weights of each variable."""
        nothing = {name: np.zeros(self.kernels[name].shape, bool) for name in self.part.forms}
        for name, target in self.targets.items():
            free = self.part.matrix({**nothing, name: choice.exchangeable(target)})
            if free.size <= SMALL:
                kept = best_sizes(gram, cross, kept, free)
            kept = exchange(gram, cross, kept, free)
        return kept

    def _not_finite(self) -> FloatingPointError:
        return FloatingPointError(
            f"What the layer of {self.name} gets or gives on this data isn't finite; nothing was changed. Look for NaN "
            "in data, and for numbers that are too large."
        )

    def _finish(self, matrix: np.ndarray, dead: int, start: float) -> None:
        assert self._equations is not None
        self.solution = {name: kernel.astype(np.float32) for name, kernel in self.part.kernels(matrix).items()}
        self._seconds += time.perf_counter() - start
        rows = self._equations.rows
        inputs = self.part.shape[1]
        self.report = LayerReport(self.name, rows, self._equations.error(matrix), dead, self._seconds, inputs=inputs)
        # H is the largest thing that is kept of a layer.
        self._equations = None
