"""A dry run of a recipe: everything that can be known, and everything that would fail, before any training."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.devices import expand
from keras_woodfisher_backends.keras_internals.training import several_steps_are_possible
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.protocol import SlowLayers

from keras_woodfisher.callbacks.freezing import Participation, Plan
from keras_woodfisher.callbacks.keep_zeros import KeepZeros
from keras_woodfisher.callbacks.learning_rate import RateCallback
from keras_woodfisher.callbacks.mask_callback import check_optimizer, check_trainable_here
from keras_woodfisher.callbacks.update_plan import PlannedUpdate
from keras_woodfisher.callbacks.woodfisher_pruning import WoodFisherPruning
from keras_woodfisher.gradients.footprint import buffered_footprint
from keras_woodfisher.gradients.loss import may_have_loss
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.model.targets import FROZEN, Target, all_targets
from keras_woodfisher.options.checks import count
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.recipe.callbacks import buffers, callback_of
from keras_woodfisher.recipe.dry_run.costs import Cost, cost_of, probed_seconds
from keras_woodfisher.recipe.dry_run.report import CheckedModifier, Problem, RecipeCheck
from keras_woodfisher.recipe.matching import frozen_targets, matched, near_misses, targets_of
from keras_woodfisher.recipe.modifiers.pruning import (
    ConstantPruningModifier,
    Modifier,
    PruningModifier,
    WoodFisherPruningModifier,
)
from keras_woodfisher.recipe.modifiers.training import TrainableParamsModifier
from keras_woodfisher.recipe.recipe import Recipe
from keras_woodfisher.reports.meter import say


def conflicts(model: keras.Model, checked: Sequence[CheckedModifier]) -> Iterator[Problem]:
    """The problems that no modifier has by itself."""
    yield from _overlaps(checked)
    yield from _frozen(model, checked)


def _overlaps(checked: Sequence[CheckedModifier]) -> Iterator[Problem]:
    """Two prunings of one variable at the same time."""
    pruning = [e for e in checked if isinstance(e.modifier, (PruningModifier, ConstantPruningModifier))]
    for place, one in enumerate(pruning):
        for other in pruning[place + 1 :]:
            (a, b), (c, d) = one.window, other.window
            shared = set(one.keys) & set(other.keys)
            if shared and a < d and c < b:
                name = next(n for n, key in zip(one.variables, one.keys, strict=True) if key in shared)
                yield Problem(
                    other.label,
                    f"{name!r} and {len(shared) - 1} other variables are pruned by {one.label} at the same "
                    f"time, from epoch {max(a, c):g} on. Give each its own variables, or let one begin where the other "
                    "ends.",
                )


def _frozen(model: keras.Model, checked: Sequence[CheckedModifier]) -> Iterator[Problem]:
    """Variables that are frozen while they are pruned, or while their gradients are buffered for that."""
    freezing = [(e, e.modifier) for e in checked if isinstance(e.modifier, TrainableParamsModifier) and e.keys]
    if not freezing:
        return
    variables = {id(t.variable): t.variable for t in all_targets(model)}
    participation = Participation(model)
    for entry, freeze in freezing:
        start, end = max(freeze.start_epoch, 0.0), math.inf if freeze.end_epoch == -1 else freeze.end_epoch
        participation.join(Plan([variables[key] for key in entry.keys], freeze.trainable, start, end))
    for entry in checked:
        first, last = 0.0 if entry.source == "buffer" else entry.window[0], entry.window[1]
        for name, key in zip(entry.variables, entry.keys, strict=True):
            pruned = isinstance(entry.modifier, PruningModifier)
            when = participation.frozen_at(variables[key], first, last) if pruned else None
            if when is not None:
                yield Problem(
                    entry.label,
                    f"{name!r} is frozen at epoch {when:g} by TrainableParamsModifier while it is pruned, or while "
                    f"its gradients are collected (epochs {first:g} to {last:g}). Freeze it at another time, or leave "
                    "it out of one of them.",
                )
                break


_REFUSALS = (ValueError, TypeError, KeyError, MemoryError, FloatingPointError)


def check_recipe(
    recipe: Recipe,
    model: keras.Model,
    steps_per_epoch: int | None = None,
    epochs: int | None = None,
    *,
    data: Any = None,
    loss: Any = None,
    verbose: int = 1,
) -> RecipeCheck:
    """Prints what a recipe will do to a model, what that costs, and everything that would fail. Nothing is changed.

    Args:
        recipe: From `load_recipe`.
        model: The built model to train.
        steps_per_epoch: Batches an epoch. Without it, whether a buffer can be full isn't known.
        epochs: Epochs of training; by default as many as the recipe takes.
        data: What will be given to `recipe.callbacks`; a batch of it is used to measure the time of a gradient.
        loss: For a model that isn't compiled yet.
        verbose: 0 prints nothing.

    Returns:
        The same as data: variables, updates, costs and problems. An update without gradients finds nothing to prune,
        or prunes by magnitude. Where one modifier goes on with the
        variables of another, the zeros that it finds are estimated.

    Raises:
        ValueError, TypeError: If `steps_per_epoch` or `epochs` isn't a positive whole number, or `recipe` or `model`
            is something else.
    """
    for name, value, kind, mend in (
        ("recipe", recipe, Recipe, "Read it first: check_recipe(load_recipe(...), model)."),
        ("model", model, keras.Model, "Load it first: keras.models.load_model(...)."),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}. {mend}")
    epochs = recipe.epochs or None if epochs is None else count("epochs", epochs)
    if steps_per_epoch is not None:
        steps_per_epoch = count("steps_per_epoch", steps_per_epoch)
    run = _Run(model, steps_per_epoch, epochs, data, loss)
    # In the order in which they work, since what one leaves is where the next one begins.
    places = sorted(range(len(recipe.modifiers)), key=lambda i: getattr(recipe.modifiers[i], "start_epoch", 0.0))
    labels = _labels(recipe.modifiers)
    with warnings.catch_warnings():
        # The report says it.
        warnings.filterwarnings("ignore", FROZEN)
        found = {place: run.checked(recipe.modifiers[place], labels[place]) for place in places}
    checked = [found[place] for place in sorted(found)]
    problems = [*run.problems_of_training(recipe.modifiers), *(p for entry in checked for p in entry.problems)]
    problems += conflicts(model, checked)
    outcome = RecipeCheck(tuple(checked), tuple(problems), steps_per_epoch, epochs)
    if verbose:
        say(str(outcome))
    return outcome


class _Run:
    """One planned call of `fit`."""

    def __init__(self, model: keras.Model, steps: int | None, epochs: int | None, data: Any, loss: Any):
        self._model = model
        self._steps = steps
        self._epochs = epochs
        self._data = data
        self._loss = loss
        self._zeros: dict[int, int] = {}
        self._slow: SlowLayers | None = None

    def problems_of_training(self, modifiers: Sequence[Modifier]) -> Iterator[Problem]:
        model = self._model
        if not getattr(model, "compiled", False):
            if self._loss is None:
                yield Problem(
                    "", "The model isn't compiled: call model.compile(optimizer=..., loss=...) before training."
                )
            return
        sampled = any(isinstance(m, WoodFisherPruningModifier) and not buffers(m, self._data) for m in modifiers)
        if not sampled and not may_have_loss(model):
            # Sampling says so itself.
            yield Problem(
                "",
                f"The model {model.name!r} is compiled without a loss, so training has nothing to lower. "
                "Compile it with one: model.compile(optimizer=..., loss=...).",
            )
        pruned = any(isinstance(m, (PruningModifier, ConstantPruningModifier)) for m in modifiers)
        steps = getattr(model, "steps_per_execution", 1)
        if steps != 1 and not several_steps_are_possible():
            yield Problem("", f"steps_per_execution={steps} can't be trained with on torch. Compile the model with 1.")
        try:
            (check_trainable_here if pruned else check_optimizer)(model)
        except ValueError as error:
            yield Problem("", str(error))

    def checked(self, modifier: Modifier, label: str) -> CheckedModifier:
        found = self._checked(modifier)
        problems = (Problem(label, problem.message) for problem in found.problems)
        return replace(found, label=label, problems=tuple(problems))

    def _checked(self, modifier: Modifier) -> CheckedModifier:
        entry = CheckedModifier(modifier)
        try:
            targets = targets_of(modifier, self._model)
        except _REFUSALS as error:
            problems = tuple(dict.fromkeys([_problem(modifier, error), *self._others(modifier)]))
            entry = replace(entry, problems=problems)
            if not isinstance(error, KeyError):
                return entry
            # A name that matches nothing; the others may.
            named = matched(modifier, self._model)
            return replace(_meant(entry, named), nearly=tuple(near_misses(modifier, self._model, named)))
        frozen = tuple(t.name for t in frozen_targets(modifier, self._model))
        entry = replace(
            _meant(entry, targets),
            nearly=tuple(near_misses(modifier, self._model, targets)),
            frozen=frozen,
            keys=tuple(id(t.variable) for t in targets),
        )
        if isinstance(modifier, PruningModifier):
            return self._pruning(modifier, entry)
        return replace(entry, problems=tuple(self._others(modifier)))

    def _others(self, modifier: Modifier) -> Iterator[Problem]:
        """What would fail of a modifier that doesn't prune."""
        try:
            callback = None if isinstance(modifier, PruningModifier) else callback_of(modifier, self._data, 0)
            if isinstance(callback, KeepZeros):
                callback.check(self._model, self._epochs)
            elif callback is not None and getattr(self._model, "compiled", False):
                callback.check(self._model)
            if isinstance(callback, RateCallback) and self._epochs is not None:
                callback.check_rates(self._epochs)
        except _REFUSALS as error:
            yield _problem(modifier, error)

    def _pruning(self, modifier: PruningModifier, entry: CheckedModifier) -> CheckedModifier:
        kernels, problems = self._devices(modifier)
        # Devices that are missing are told above; the rest is checked as if they weren't.
        known = {"available_gpus": None} if hasattr(modifier, "available_gpus") else {}
        plain = modifier.model_copy(update=known)
        updates: list[PlannedUpdate] = []
        cost, dense = Cost(), ""
        self._slow = None
        try:
            callback = callback_of(plain, self._data, 0)
            assert isinstance(callback, WoodFisherPruning)
            pruner = Pruner(self._model, callback.options)
            pruner.check_weights()
            dense = pruner.note
            updates = callback.plan(self._model, self._steps, self._epochs, pruned=self._zeros)
            try:
                callback.check_plan(updates, self._steps, self._epochs)
            except ValueError as error:
                problems.append(_problem(modifier, error))
            cost = self._cost(plain, callback, pruner, updates, kernels, problems)
            if updates and modifier.leave_enabled:
                # Taken to be spread evenly, which global pruning needn't do.
                self._zeros |= {id(t.variable): round(updates[-1].sparsity * t.size) for t in pruner.targets}
        except _REFUSALS as error:
            problems.append(_problem(modifier, error))
        source = "" if not any(u.num_grads for u in updates) else "buffer" if buffers(plain, self._data) else "data"
        return replace(
            entry,
            updates=tuple(updates),
            cost=cost,
            source=source,
            slow_layers=self._slow,
            dense=dense,
            problems=tuple(problems),
        )

    def _cost(
        self,
        modifier: PruningModifier,
        callback: WoodFisherPruning,
        pruner: Pruner,
        updates: Sequence[PlannedUpdate],
        kernels: Mapping[str, BlockKernel],
        problems: list[Problem],
    ) -> Cost:
        options, buffered = callback.options, buffers(modifier, self._data)
        uses = [(u.num_grads, u.kept) for u in updates if u.num_grads]
        seconds = None
        if options.second_order:
            try:
                if buffered:
                    footprint = buffered_footprint(pruner.targets, options.most_gradients)
                    pruner.plan_memory(footprint, uses or [(options.most_gradients, 1)])
                else:
                    source = SampledGradients(
                        self._model, pruner.targets, options, pruner.backend, self._data, self._loss
                    )
                    source.check(options.most_gradients)
                    if uses:
                        pruner.plan_memory(source.footprint(max(rows for rows, _ in uses)), uses)
                        seconds = probed_seconds(source, pruner)
                        self._slow = source.slow_layers
            except _REFUSALS as error:
                problems.append(_problem(modifier, error))
        return cost_of(updates, pruner, options, kernels, buffered, pruner.memory if uses else None, seconds)

    def _devices(self, modifier: PruningModifier) -> tuple[dict[str, BlockKernel], list[Problem]]:
        backend = get_backend(keras.backend.backend())
        kernels: dict[str, BlockKernel] = {}
        problems = []
        try:
            wanted = expand(getattr(modifier, "available_gpus", None) or (), backend.devices())
        except ValueError as error:
            wanted = ()
            problems.append(_problem(modifier, error))
        for name in wanted:
            try:
                kernels[name] = backend.kernel(name)
            except ValueError as error:
                problems.append(_problem(modifier, error))
        return kernels or {"cpu": backend.kernel("cpu")}, problems


def _labels(modifiers: Sequence[Modifier]) -> list[str]:
    """The tag of each, with a number where several have the same one."""
    tags = [modifier.tag for modifier in modifiers]
    counted = [f"{tag} {tags[: place + 1].count(tag)}" for place, tag in enumerate(tags)]
    return [tag if tags.count(tag) == 1 else label for tag, label in zip(tags, counted, strict=True)]


def _meant(entry: CheckedModifier, targets: Sequence[Target]) -> CheckedModifier:
    return replace(entry, variables=tuple(t.name for t in targets), weights=sum(t.size for t in targets))


def _problem(modifier: Modifier, error: BaseException) -> Problem:
    # A KeyError's own text is the repr of its message.
    message = str(error.args[0]) if error.args else type(error).__name__
    # Keras colours its messages, and writes them in several lines.
    message = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split())
    return Problem(modifier.tag, message.removeprefix(modifier.tag).lstrip(".: "))
