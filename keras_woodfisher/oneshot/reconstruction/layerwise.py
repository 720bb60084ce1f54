"""Layer-wise reconstruction of a whole model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.models import layers_of
from keras_woodfisher_backends.least_squares.parts import parts_of
from keras_woodfisher_backends.nest import arrays, map_arrays, take

from keras_woodfisher.data.batches import cut
from keras_woodfisher.model.targets import Target
from keras_woodfisher.oneshot.reconstruction.footprint import TOGETHER, plan_chunks
from keras_woodfisher.oneshot.reconstruction.problem import Choice, Problem
from keras_woodfisher.oneshot.reconstruction.walk import Walk
from keras_woodfisher.pruning.fisher import Advance, no_progress
from keras_woodfisher.reports.layer_report import LayerReport


@dataclass(frozen=True)
class Reconstruction:
    """The outcome.

    Attributes:
        kernels: The new values of each target, in its variable's shape.
        layers: What was found, in the order of calls.
    """

    kernels: Sequence[np.ndarray]
    layers: tuple[LayerReport, ...]


class Layerwise:
    """Sparse kernels for a model, which isn't changed.

    Args:
        model: The dense model.
        targets: The variables to prune.
        batches: Inputs of the model, leaves (N, ...), those of each shape together.
        seed: Of the choice of positions.
        limit: Bytes that may be used.
        reason: Where the limit comes from.

    Attributes:
        total: How many matrices there are to solve.
        plan: How many examples are worked on at a time.

    Raises:
        MemoryError: If it doesn't fit.
    """

    def __init__(
        self,
        model: keras.Model,
        targets: Sequence[Target],
        batches: Sequence[Any],
        seed: int | None,
        limit: int,
        reason: str,
    ):
        self._model = model
        self._targets = targets
        self._batches = batches
        self._seed = seed
        self._values = {id(t.variable): keras.ops.convert_to_numpy(t.variable) for t in targets}
        problems = _problems(model, targets, seed)
        ordered, live = Walk(model, problems).order(take(batches[0], slice(0, 1)))
        self._calls = {problem.name: problem.calls for problem in ordered}
        self.total = len(ordered)
        examples = sum(len(arrays(batch)[0]) for batch in batches)
        self.plan = plan_chunks(examples, live, [problem.work for problem in ordered], limit, reason)

    def run(
        self, choice: Choice, share: float = 1.0, advance: Advance = no_progress, hurried: bool = False
    ) -> Reconstruction:
        """Finds them.

        Args:
            choice: Which weights may stay.
            share: The part of the examples to use.
            advance: Called after each matrix.
            hurried: Whether supports may be a little worse, in a part of the time.
        """
        used = [take(batch, slice(0, max(1, int(share * len(arrays(batch)[0]))))) for batch in self._batches]
        chunks = [part for batch in used for part in cut(batch, self.plan.chunk)]
        at_once = len(chunks) == 1
        found = {problem.name: problem for problem in _problems(self._model, self._targets, self._seed)}
        problems = [found[name] for name in self._calls]
        for problem in problems:
            problem.calls = self._calls[problem.name]
            problem.hurried = hurried
        walk = Walk(self._model, problems, choice)
        for group in groups(problems, at_once):
            walk.solve(group, chunks, at_once, advance)
        return self._outcome(problems, [p for name, p in found.items() if name not in self._calls], choice)

    def _outcome(self, problems: Sequence[Problem], uncalled: Sequence[Problem], choice: Choice) -> Reconstruction:
        reports = [problem.report for problem in problems if problem.report is not None]
        solved: dict[int, np.ndarray] = {}
        for problem in problems:
            if problem.solution is not None:
                solved |= {id(t.variable): problem.solution[name] for name, t in problem.targets.items()}
        why = {
            id(t.variable): "the model doesn't call its layer on this data"
            for p in uncalled
            for t in p.targets.values()
        }
        told = {id(t.variable) for problem in problems for t in problem.targets.values()}
        for target in self._targets:
            key = id(target.variable)
            if key not in solved:
                solved[key] = np.where(choice.choose(target, self._values[key]), self._values[key], 0.0)
            if key not in told:
                reason = why.get(key, "its layer isn't a product of its input")
                reports.append(LayerReport(target.name, note=reason))
        return Reconstruction([solved[id(target.variable)] for target in self._targets], tuple(reports))


def groups(problems: Sequence[Problem], at_once: bool) -> Iterator[Sequence[Problem]]:
    """Problems that one pass solves: at once up to a layer that is called more than once, else a few."""
    group: list[Problem] = []
    for problem in problems:
        group.append(problem)
        if problem.calls > 1 or (not at_once and len(group) == TOGETHER):
            yield group
            group = []
    if group:
        yield group


def _problems(model: keras.Model, targets: Sequence[Target], seed: int | None) -> list[Problem]:
    """The matrices of the layers that own the targets."""
    callers = {id(layer.cell): layer for layer in layers_of(model) if hasattr(layer, "cell")}
    chosen = {id(target.variable): target for target in targets}
    owners = {id(target.layer): target.layer for target in targets}
    problems: list[Problem] = []
    for owner in owners.values():
        caller = callers.get(id(owner), owner)
        parts = parts_of(caller)
        variables = {name: getattr(owner, name) for part in parts for name in part.forms}
        if any(id(variable) not in chosen for variable in variables.values()):
            parts = parts_of(caller, apart=True)
        kernels = {name: keras.ops.convert_to_numpy(variable) for name, variable in variables.items()}
        for part in parts:
            mine = {name: chosen[id(variables[name])] for name in part.forms if id(variables[name]) in chosen}
            if mine:
                problems.append(Problem(caller, part, mine, kernels, None if seed is None else [seed, len(problems)]))
    return problems


def joined(batches: Iterable[Any]) -> list[Any]:
    """Batches of the same shapes as one."""
    found: dict[Any, list[Any]] = {}
    for batch in batches:
        found.setdefault(tuple(leaf.shape[1:] for leaf in arrays(batch)), []).append(batch)
    return [map_arrays(lambda *parts: np.concatenate(parts), *alike) for alike in found.values()]
