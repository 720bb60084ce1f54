"""Layer-wise reconstruction of a whole model."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.engines import whole_value
from keras_woodfisher_backends.keras_internals.models import layers_of
from keras_woodfisher_backends.least_squares.arithmetic import OnDevice
from keras_woodfisher_backends.least_squares.parts import parts_of
from keras_woodfisher_backends.nest import arrays, map_arrays, shapes_of, take
from keras_woodfisher_backends.ranks.ranks import Ranks

from keras_woodfisher.model.batches import cut_evenly
from keras_woodfisher.model.targets import Target
from keras_woodfisher.oneshot.reconstruction.apart import MIXED, learn_rows
from keras_woodfisher.oneshot.reconstruction.footprint import Needs, plan_chunks, size_of
from keras_woodfisher.oneshot.reconstruction.passes import Survey, Surveyed
from keras_woodfisher.oneshot.reconstruction.problem import Choice, Problem
from keras_woodfisher.oneshot.reconstruction.snapshots import amid_bytes
from keras_woodfisher.oneshot.reconstruction.walk import Walk
from keras_woodfisher.pruning.fisher import Advance, no_progress
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.workspace import budget_of
from keras_woodfisher.reports.layer_report import LayerReport

SHARED = "another layer uses its weights, too"
UNCALLED = "the model doesn't call its layer on the examples that were looked at"

_TIMED = 32
"""Examples by which the time of a pass is measured."""


@dataclass(frozen=True)
class Reconstruction:
    """The outcome.

    Attributes:
        kernels: The new values of each target, in its variable's shape.
        layers: What was found, in the order of calls.
        errors: For each target the relative error of its layer's output; None where it wasn't reconstructed.
    """

    kernels: Sequence[np.ndarray]
    layers: tuple[LayerReport, ...]
    errors: Sequence[float | None]


class Layerwise:
    """Sparse kernels for a model, which isn't changed.

    Args:
        model: The dense model.
        pruner: Its pruner, whose variables, memory limit, devices and seed are used.
        batches: Inputs of the model, leaves (N, ...), those of each shape together.
        alone: Whether each variable is solved as if all others stayed dense.

    Attributes:
        total: How many matrices there are to solve.
        examples: How many examples they are fitted to.
        plan: How many examples are worked on at a time.

    Raises:
        MemoryError: If it doesn't fit.
    """

    def __init__(self, model: keras.Model, pruner: Pruner, batches: Sequence[Any], alone: bool = False):
        self._model = model
        self._alone = alone
        self._device = _accelerator(pruner)
        targets = self._targets = pruner.targets
        self._ranks, batches = _shared(pruner.ranks, batches)
        self._batches = batches
        seed = self._seed = pruner.options.seed
        self._values = {id(t.variable): whole_value(t.variable) for t in targets}
        problems = _problems(model, targets, seed, alone)
        one, seen = take(batches[0], slice(0, 1)), list[Surveyed]()
        pruner.backend.dry_call(lambda x: seen.append(Survey(model, problems).order(x)), one)
        called, live, shared = seen[-1]
        mixed = learn_rows(model, problems, pruner.backend, batches)
        self._why = {problem.key: mixed[id(problem.layer)] for problem in problems if id(problem.layer) in mixed}
        self._why |= dict.fromkeys(shared, SHARED)
        # Other processes may have seen other examples.
        told = self._ranks.joined(np.array([[problem.key in self._why for problem in problems]]))
        for place in np.flatnonzero(told.any(axis=0)):
            self._why.setdefault(problems[place].key, MIXED)
        self._ordered = [problem for problem in called if problem.key not in self._why]
        self._learned = {problem.key: problem for problem in self._ordered}
        self.total = len(self._ordered)
        examples = sum(len(arrays(batch)[0]) for batch in batches)
        budget = budget_of(pruner.options)
        needs = Needs(
            size_of(one),
            live,
            [problem.sums for problem in self._ordered],
            max((problem.work for problem in self._ordered), default=0),
            amid_bytes(model),
        )
        self.plan = plan_chunks(examples, needs, budget.limit, budget.reason, budget.free)
        here = sum(len(arrays(part)[0]) for batch in batches for part in cut_evenly(batch, self.plan.chunk))
        self.examples = int(self._ranks.sum(np.array([here]))[0])

    @property
    def dense(self) -> list[np.ndarray]:
        """The kernels of the dense model, one a target."""
        return [self._values[id(target.variable)] for target in self._targets]

    @property
    def operations(self) -> float:
        """About how many multiplications and additions all solutions take, in float64."""
        return sum(problem.operations(self.examples) for problem in self._ordered)

    @property
    def passes(self) -> int:
        """How many passes over all examples it takes."""
        return len(list(groups(self._ordered, self._most(self.plan.chunks * len(self._batches)))))

    def seconds_per_example(self) -> float:
        """Measured seconds of a dense example in a pass, after the one that compiles."""
        some = take(self._batches[0], slice(0, min(self.plan.chunk, _TIMED)))
        survey = Survey(self._model, ())
        seconds = 0.0
        for _ in range(2):
            start = time.perf_counter()
            survey.order(some)
            seconds = time.perf_counter() - start
        return seconds / len(arrays(some)[0])

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
        chunks = [part for batch in used for part in cut_evenly(batch, self.plan.chunk)]
        at_once = not self._ranks.any(len(chunks) > 1)
        made = _problems(self._model, self._targets, self._seed, self._alone)
        found = {problem.key: problem for problem in made}
        problems = [found[key] for key in self._learned]
        for problem in problems:
            problem.calls = self._learned[problem.key].calls
            problem.rows = self._learned[problem.key].rows
            problem.hurried = hurried
            problem.device = self._device
            problem.ranks = self._ranks
        room, number = self.plan.room, sum(len(arrays(chunk)[0]) for chunk in chunks)
        walk = Walk(self._model, problems, choice, self._alone, room=room, examples=number)
        for group in groups(problems, self._ranks.least(self._most(1 if at_once else 2))):
            walk.solve(group, chunks, at_once, advance)
        return self._outcome(problems, [p for key, p in found.items() if key not in self._learned], choice)

    def _most(self, chunks: int) -> int:
        """How many matrices one pass solves; all where each is solved as its layer is called."""
        return len(self._ordered) if chunks == 1 else self.plan.together

    def _outcome(self, problems: Sequence[Problem], uncalled: Sequence[Problem], choice: Choice) -> Reconstruction:
        reports = [problem.report for problem in problems if problem.report is not None]
        solved: dict[int, np.ndarray] = {}
        errors: dict[int, float | None] = {}
        for problem in problems:
            if problem.solution is not None and problem.report is not None:
                solved |= {id(t.variable): problem.solution[name] for name, t in problem.targets.items()}
                errors |= {id(t.variable): problem.report.error for t in problem.targets.values()}
        why = {id(t.variable): self._why.get(p.key, UNCALLED) for p in uncalled for t in p.targets.values()}
        told = {id(t.variable) for problem in problems for t in problem.targets.values()}
        for target in self._targets:
            key = id(target.variable)
            if key not in solved:
                solved[key] = np.where(choice.choose(target, self._values[key]), self._values[key], 0.0)
            if key not in told:
                reason = why.get(key, "its layer isn't a product of its input")
                reports.append(LayerReport(target.name, note=reason))
        keys = [id(target.variable) for target in self._targets]
        return Reconstruction([solved[key] for key in keys], tuple(reports), [errors.get(key) for key in keys])


def _shared(ranks: Ranks, batches: Sequence[Any]) -> tuple[Ranks, Sequence[Any]]:
    """The processes that share examples, and this one's share; where there are too few, each has all of them."""
    if ranks.size == 1:
        return ranks, batches
    shares = []
    for batch in batches:
        each = len(arrays(batch)[0]) // ranks.size
        shares += [take(batch, slice(each * ranks.rank, each * (ranks.rank + 1)))] if each else []
    if ranks.any(not shares):
        return Ranks(), batches
    return ranks, shares


def groups(problems: Sequence[Problem], most: int) -> Iterator[Sequence[Problem]]:
    """Problems that one pass solves: so many at most, and none after a layer that is called more than once."""
    group: list[Problem] = []
    for problem in problems:
        group.append(problem)
        if problem.calls > 1 or len(group) == most:
            yield group
            group = []
    if group:
        yield group


def _accelerator(pruner: Pruner) -> OnDevice | None:
    """The first device of `available_gpus`, or of all there are; None where that is the host's processor."""
    options, backend = pruner.options, pruner.backend
    given = pruner.workspace.devices if options.available_gpus else backend.devices()
    names = [name for name in given if options.available_gpus or not name.startswith("cpu")]
    return OnDevice(backend, names[0]) if names and names[0] != "cpu" else None


def _problems(model: keras.Model, targets: Sequence[Target], seed: int | None, alone: bool) -> list[Problem]:
    """The matrices of the layers that own the targets."""
    callers = {id(layer.cell): layer for layer in layers_of(model) if hasattr(layer, "cell")}
    chosen = {id(target.variable): target for target in targets}
    owners = {id(target.layer): target.layer for target in targets}
    problems: list[Problem] = []
    for owner in owners.values():
        caller = callers.get(id(owner), owner)
        parts = parts_of(caller)
        variables = {name: getattr(owner, name) for part in parts for name in part.forms}
        if alone or any(id(variable) not in chosen for variable in variables.values()):
            parts = parts_of(caller, apart=True)
        kernels = {name: whole_value(variable) for name, variable in variables.items()}
        for part in parts:
            mine = {name: chosen[id(variables[name])] for name in part.forms if id(variables[name]) in chosen}
            if mine:
                problems.append(Problem(caller, part, mine, kernels, None if seed is None else [seed, len(problems)]))
    return problems


def joined(batches: Iterable[Any]) -> list[Any]:
    """Batches of the same shapes as one."""
    found: dict[Any, list[Any]] = {}
    for batch in batches:
        found.setdefault(shapes_of(batch), []).append(batch)
    return [map_arrays(lambda *parts: np.concatenate(parts), *alike) for alike in found.values()]
