"""Solves one layer after the other while the dense and the pruned model run side by side.

The first half of each batch is the dense model, the second half the pruned one. Where a layer is called its rows and
targets are at hand; once it is solved, its second half is computed with the new kernel, so that the layers after it see
what they will get in the pruned model.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.keras_internals.models import layers_of
from keras_woodfisher_backends.least_squares.parts import Call, Side
from keras_woodfisher_backends.nest import arrays, map_arrays, shapes_of

from keras_woodfisher.memory.free_memory import give_back_memory
from keras_woodfisher.oneshot.reconstruction.apart import ROUTED
from keras_woodfisher.oneshot.reconstruction.layer_calls import (
    after_bias,
    channel_axis,
    inverse_factors,
    is_linear,
    listening,
    replaced,
    states_of,
    steps_of,
)
from keras_woodfisher.oneshot.reconstruction.padding import KnownMasks
from keras_woodfisher.oneshot.reconstruction.passes import Passes, Stopped
from keras_woodfisher.oneshot.reconstruction.problem import Choice, NotAProduct, Problem
from keras_woodfisher.oneshot.reconstruction.sides import Sides, generators_of, has_values, places_of, rewind
from keras_woodfisher.oneshot.reconstruction.snapshots import Snapshots
from keras_woodfisher.pruning.fisher import Advance, no_progress

_ROUNDS = 1
"""How often a recurrent layer is solved anew with the states that it has then."""

_HIDDEN = "its layer is called within something that the framework compiles, such as a loop"
_WITHIN = "its layer is called within another one that is reconstructed"


class _Reached(BaseException):
    """Ends a pass: no later layer is wanted."""


class Walk:
    """Reconstructs the layers of a model in the order of their calls.

    Args:
        model: A built model, which isn't changed.
        problems: What is to be solved.
        choice: Which weights may stay.
        alone: Whether layers see what they get in the dense model, as if no other were pruned.
        room: Bytes that may be kept from one pass to the next, so that it goes on where the one before ended.
        examples: How many examples there are.
    """

    def __init__(
        self,
        model: keras.Model,
        problems: Sequence[Problem],
        choice: Choice,
        alone: bool = False,
        *,
        room: int = 0,
        examples: int = 0,
    ):
        self._alone = alone
        self._choice = choice
        self._of_layer: dict[int, list[Problem]] = {}
        for problem in problems:
            self._of_layer.setdefault(id(problem.layer), []).append(problem)
        self._passes = Passes(model)
        self._sides = Sides()
        # A layer that holds others to be solved is never called for one side alone.
        self._generators = {
            id(layer): generators_of(layer)
            for layer in layers_of(model)
            if id(layer) in self._of_layer or not any(id(inner) in self._of_layer for inner in layers_of(layer))
        }
        # Rows of a layer that is called more than once are told apart by the calls before.
        again = any(problem.calls > 1 for problem in problems)
        self._snapshots = Snapshots(self._passes, 0 if again else room, examples)
        self._awaited: dict[int, int] = {}
        self._rows: dict[int, list[int]] = {}
        self._share = 1.0
        self._at_once = False
        self._masks = KnownMasks(None)
        self._advance: Advance = no_progress

    def solve(
        self, group: Sequence[Problem], chunks: Sequence[Any], at_once: bool, advance: Advance = no_progress
    ) -> None:
        """Solves some problems, the next ones in the order of calls, in one pass over the examples.

        Args:
            group: The problems. Only the last one may belong to a layer that is called more than once.
            chunks: The inputs of the model, in parts.
            at_once: Whether each is solved where its layer is called, so that the ones after it see its error; all
                examples must be in one chunk then. Else all are solved after the pass.
            advance: Called after each.
        """
        self._advance = advance
        total = sum(len(arrays(chunk)[0]) for chunk in chunks)
        for number, chunk in enumerate(chunks):
            self._sides.examples = len(arrays(chunk)[0])
            self._share = self._sides.examples / total
            self._at_once = at_once
            self._awaited = {id(problem): problem.calls for problem in group}
            self._rows = {key: list(same[0].rows.get(shapes_of(chunk), ())) for key, same in self._of_layer.items()}
            doubled = map_arrays(lambda leaf: np.concatenate([leaf, leaf]), chunk)
            self._masks = KnownMasks(doubled)
            with self._snapshots.going_on(number, group[0].layer, self._masks), suppress(_Reached):
                self._passes.run(doubled, self._side_by_side)
        for problem in group:
            if not problem.done:
                self._solve(problem)

    def _side_by_side(self, layer: Any, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        problems = self._of_layer.get(id(layer), [])
        if self._sides.alone:
            self._give_up(problems, _WITHIN)
            return own(*args, **kwargs)
        self._masks.see(args, kwargs)
        generators = self._generators.get(id(layer), ())
        if not problems:
            if args:
                self._masks.begin(layer, args[0])
            if generators and args and has_values(args[0]):
                return self._sides.alike(generators, own, args, kwargs)
            return own(*args, **kwargs)
        if not has_values(args[0]):
            self._give_up(problems, _HIDDEN)
            return own(*args, **kwargs)
        # Where all examples are worked on at once, there is enough.
        give_back_memory(to_system=not self._at_once)
        each = self._rows[id(layer)].pop(0) if self._rows[id(layer)] else 0
        half = self._sides.examples * each
        if arrays(args[0])[0].shape[0] != 2 * half:
            self._give_up(problems, ROUTED)
            return own(*args, **kwargs)
        (dense_args, dense_kwargs), (pruned_args, pruned_kwargs) = self._sides.split((args, kwargs), half)
        waiting = [problem for problem in problems if self._awaited.get(id(problem)) and not problem.done]
        one, places = self._sides.one(own), places_of(generators)
        with listening(layer) as heard:
            dense = one(*dense_args, **dense_kwargs)
        output = heard[0] if heard else dense
        for problem in waiting:
            new = {**problem.kernels, **self._solutions(problems)}
            call = Call(
                Side(
                    steps_of(layer, dense_args[0]),
                    problem.kernels,
                    partial(states_of, layer, one, dense_args, dense_kwargs),
                ),
                Side(steps_of(layer, pruned_args[0]), new, partial(states_of, layer, one, pruned_args, pruned_kwargs)),
                after_bias(layer, output),
            )
            try:
                self._show(problem, call, steps_of(layer, self._masks.of(args[0])), half)
            except FloatingPointError as error:
                raise Stopped(error) from error
        rewind(generators, places)
        with replaced(layer, self._solutions(problems)):
            pruned = one(*pruned_args, **pruned_kwargs)
        if self._awaited and not any(self._awaited.values()):
            raise _Reached
        return self._sides.join(dense, pruned, half)

    def _give_up(self, problems: Sequence[Problem], why: str) -> None:
        for problem in problems:
            if not problem.done:
                self._advance()
            problem.give_up(why)
            self._awaited.pop(id(problem), None)

    def _show(self, problem: Problem, call: Call, mask: Any, half: int) -> None:
        self._awaited[id(problem)] -= 1
        self._see(problem, call, mask, half)
        if not self._at_once or problem.calls > 1 or problem.done:
            return
        self._solve(problem)
        for _ in range(_ROUNDS if "recurrent_kernel" in problem.part.forms else 0):
            # What the layer remembers depends on the kernels that were just found.
            now = {**call.pruned.kernels, **self._solutions([problem])}
            self._see(problem, call._replace(pruned=call.pruned._replace(kernels=now)), mask, half)
            self._solve(problem, again=True)

    def _see(self, problem: Problem, call: Call, mask: Any, half: int) -> None:
        inputs, output = problem.part.seen(call)
        shown = problem.part.ready([ops.convert_to_numpy(x) for x in inputs])
        (wanted,) = problem.part.ready([ops.convert_to_numpy(output)])
        counted = None if mask is None else ops.convert_to_numpy(mask)[:half].astype(bool)
        places = problem.places(output, counted, self._share / (problem.calls * problem.ranks.size))

        def dense_inputs() -> list[np.ndarray]:
            same = problem.part.seen(call._replace(pruned=call.dense))[0]
            return problem.part.ready([ops.convert_to_numpy(x) for x in same])

        try:
            problem.check(dense_inputs, wanted, places)
        except NotAProduct:
            self._advance()
            problem.give_up("it isn't the product that its class says")
            return
        problem.see(shown, wanted, places, self._error_to_absorb(problem, places, half))

    def _solve(self, problem: Problem, again: bool = False) -> None:
        problem.solve(self._choice)
        if not again:
            self._advance()

    def _error_to_absorb(self, problem: Problem, places: np.ndarray, half: int) -> np.ndarray | None:
        """What the shortcut to which the layer's output is added has too much in the pruned model, at places."""
        found = self._passes.graphs.addition_after(problem.layer)
        if found is None or not is_linear(problem.layer):
            return None
        scalings, other = found
        (error,) = problem.part.ready([ops.convert_to_numpy(other[half:] - other[:half])])
        error = problem.part.targets(error, places)
        branches, _, outputs = problem.part.shape
        for scaling in scalings:
            factors = inverse_factors(scaling)
            if factors.size != branches * outputs or scaling.axis % other.ndim != channel_axis(problem.layer, other):
                return None
            error = error * factors.reshape(branches, 1, outputs)
        return error

    def _solutions(self, problems: Sequence[Problem]) -> dict[str, np.ndarray]:
        if self._alone:
            return {}
        return {name: kernel for problem in problems if problem.solution for name, kernel in problem.solution.items()}
