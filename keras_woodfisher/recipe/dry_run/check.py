"""A dry run of a recipe: everything that can be known, and everything that would fail, before any training."""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.devices import expand
from keras_woodfisher_backends.keras_internals.training import several_steps_are_possible
from keras_woodfisher_backends.ranks.joint import jointly

from keras_woodfisher.callbacks.keep_zeros import KeepZeros
from keras_woodfisher.callbacks.learning_rate import LearningRateCallback
from keras_woodfisher.callbacks.mask_callback import check_optimizer, check_trainable_here
from keras_woodfisher.callbacks.pruning_run import Run
from keras_woodfisher.callbacks.update_plan import PlannedUpdate
from keras_woodfisher.gradients.loss import may_have_loss
from keras_woodfisher.model.targets import FROZEN, Target
from keras_woodfisher.options.checks import count
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.recipe.callbacks import callback_of, samples
from keras_woodfisher.recipe.dry_run.conflicts import conflicts
from keras_woodfisher.recipe.dry_run.costs import cost_of, probed_seconds, reconstruction_cost, zeros_after
from keras_woodfisher.recipe.dry_run.process_costs import ProcessCost, Processes, process_cost
from keras_woodfisher.recipe.dry_run.report import CheckedModifier, Problem, RecipeCheck
from keras_woodfisher.recipe.matching import considered, frozen_targets, matched, near_misses, targets_of
from keras_woodfisher.recipe.modifiers.pruning import Modifier, PruningModifier
from keras_woodfisher.recipe.modifiers.reconstruction import PRUNING, ReconstructionModifier
from keras_woodfisher.recipe.recipe import Recipe
from keras_woodfisher.reports.left_out import NOTHING
from keras_woodfisher.reports.meter import say

_REFUSALS = (ValueError, TypeError, KeyError, MemoryError, FloatingPointError)


@jointly
def check_recipe(  # noqa: PLR0913
    recipe: Recipe,
    model: keras.Model,
    steps_per_epoch: int | None = None,
    epochs: int | None = None,
    *,
    data: Any = None,
    loss: Any = None,
    ranks: int | None = None,
    hosts: int | None = None,
    verbose: int = 1,
) -> RecipeCheck:
    """Prints what a recipe will do to a model, what that costs, and everything that would fail. Nothing is changed.

        >>> rate = {"SetLearningRateModifier": {"learning_rate": 0.1, "start_epoch": 2.0}}
        >>> recipe = kw.load_recipe({"modifiers": [rate]})
        >>> kw.check_recipe(recipe, model, epochs=3, verbose=0).problems
        ()

    Args:
        recipe: From `load_recipe`.
        model: The built model to train.
        steps_per_epoch: Batches an epoch. Without it, whether a buffer can be full isn't known.
        epochs: Epochs of training; by default as many as the recipe takes.
        data: What will be given to `recipe.callbacks`; a batch of it is used to measure the time of a gradient.
        loss: For a model that isn't compiled yet.
        ranks: How many processes would prune together: what each of them would hold, send and compute is told, and how
            many would fit if these don't.
        hosts: On how many machines like this one; by default on one.
        verbose: 0 prints nothing.

    Returns:
        The same as data: variables, updates, costs and problems. An update without gradients finds nothing to prune,
        or prunes by magnitude. Where one modifier goes on with the variables of another, its zeros are estimated.

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
    training = _Training(model, steps_per_epoch, epochs, data, loss, Processes.checked(ranks, hosts))
    labels = _labels(recipe.modifiers)
    # In the order in which they work, since what one leaves is where the next one begins.
    ordered = sorted(zip(recipe.modifiers, labels, strict=True), key=lambda pair: pair[0].first_epoch)
    with warnings.catch_warnings():
        # The report says it.
        warnings.filterwarnings("ignore", FROZEN)
        found = {label: training.checked(modifier, label) for modifier, label in ordered}
        checked = [found[label] for label in labels]
        sound = [entry.modifier for entry in checked if isinstance(entry.modifier, PRUNING) and entry.keys]
        left_out = considered(sound, model)[1] if sound else NOTHING
    problems = [*training.problems(recipe.modifiers), *(p for entry in checked for p in entry.problems)]
    problems += conflicts(model, checked)
    outcome = RecipeCheck(tuple(checked), tuple(problems), steps_per_epoch, epochs, left_out)
    if verbose:
        say(str(outcome))
    return outcome


@dataclass(frozen=True)
class _Training:
    """One planned call of `fit`."""

    model: keras.Model
    steps: int | None
    epochs: int | None
    data: Any
    loss: Any
    processes: Processes | None = None
    zeros: dict[int, int] = field(default_factory=dict)

    def problems(self, modifiers: Sequence[Modifier]) -> Iterator[Problem]:
        model = self.model
        if not getattr(model, "compiled", False):
            if self.loss is None:
                message = "The model isn't compiled: call model.compile(optimizer=..., loss=...) before training."
                yield Problem("", message)
            return
        sampled = any(samples(modifier, self.data) for modifier in modifiers)
        if not sampled and not may_have_loss(model):
            # Sampling says so itself.
            yield Problem(
                "",
                f"The model {model.name!r} is compiled without a loss, so training has nothing to lower. "
                "Compile it with one: model.compile(optimizer=..., loss=...).",
            )
        pruned = any(isinstance(m, PRUNING) for m in modifiers)
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
            targets = targets_of(modifier, self.model)
        except _REFUSALS as error:
            problems = tuple(dict.fromkeys([_problem(modifier, error), *self._others(modifier)]))
            entry = replace(entry, problems=problems)
            if not isinstance(error, KeyError):
                return entry
            # A name that matches nothing; the others may.
            named = matched(modifier, self.model)
            return replace(_meant(entry, named), nearly=tuple(near_misses(modifier, self.model, named)))
        entry = replace(
            _meant(entry, targets),
            nearly=tuple(near_misses(modifier, self.model, targets)),
            frozen=tuple(t.name for t in frozen_targets(modifier, self.model)),
            keys=tuple(id(t.variable) for t in targets),
        )
        if isinstance(modifier, PruningModifier):
            return self._pruning(modifier, entry)
        if isinstance(modifier, ReconstructionModifier):
            return self._reconstruction(modifier, entry)
        return replace(entry, problems=tuple(self._others(modifier)))

    def _others(self, modifier: Modifier) -> Iterator[Problem]:
        """What would fail of a modifier that doesn't prune."""
        try:
            known = (PruningModifier, ReconstructionModifier)
            callback = None if isinstance(modifier, known) else callback_of(modifier, self.data, 0)
            if isinstance(callback, KeepZeros):
                callback.check(self.model, self.epochs)
            elif callback is not None and getattr(self.model, "compiled", False):
                callback.check(self.model)
            if isinstance(callback, LearningRateCallback) and self.epochs is not None:
                callback.check_rates(self.epochs)
        except _REFUSALS as error:
            yield _problem(modifier, error)

    def _pruning(self, modifier: PruningModifier, entry: CheckedModifier) -> CheckedModifier:
        problems: list[Problem] = []
        try:
            run = self._run_of(modifier, problems)
            run.pruner.check_weights()
            entry = replace(entry, dense=run.pruner.note, emptied=tuple(t.name for t in run.emptied()))
            updates = run.plan(self.steps, self.epochs, pruned=self.zeros)
            source = "buffer" if run.task.buffers else "data"
            sampled = any(update.num_grads for update in updates)
            entry = replace(entry, updates=tuple(updates), source=source if sampled else "")
            try:
                run.task.check_plan(updates, self.steps, self.epochs)
            except ValueError as error:
                problems.append(_problem(modifier, error))
            seconds, process = None, None
            try:
                run.open_source(updates, self.loss)
                seconds = probed_seconds(run) if entry.source == "data" else None
            except MemoryError as error:
                process = self._process(run, updates)
                if process is None or process.held_bytes > process.limit_bytes:
                    problems.append(_problem(modifier, error))
            except _REFUSALS as error:
                problems.append(_problem(modifier, error))
            else:
                process = self._process(run, updates)
            slow = None if run.source is None else run.source.slow_layers
            entry = replace(entry, cost=cost_of(run, updates, seconds), process=process, slow_layers=slow)
            if updates and modifier.leave_enabled:
                # Taken to be spread evenly, which global pruning needn't do.
                self.zeros.update({id(t.variable): round(updates[-1].sparsity * t.size) for t in run.targets})
        except _REFUSALS as error:
            problems.append(_problem(modifier, error))
        return replace(entry, problems=tuple(problems))

    def _process(self, run: Run, updates: Sequence[PlannedUpdate]) -> ProcessCost | None:
        return None if self.processes is None else process_cost(run, updates, self.processes)

    def _reconstruction(self, modifier: ReconstructionModifier, entry: CheckedModifier) -> CheckedModifier:
        try:
            callback_of(modifier, self.data, 0)
            pruner = Pruner(self.model, modifier.options())
            pruner.check_weights()
            pruner.find_zeros()
            entry = replace(entry, reconstruction=reconstruction_cost(self.model, pruner, modifier, self.data))
            for key, zeros in zeros_after(pruner, modifier).items():
                self.zeros[key] = max(zeros, self.zeros.get(key, 0))
        except _REFUSALS as error:
            return replace(entry, problems=(_problem(modifier, error),))
        return entry

    def _run_of(self, modifier: PruningModifier, problems: list[Problem]) -> Run:
        """The run that a callback would make; devices that are missing are a problem, and left out of it."""
        try:
            return Run(callback_of(modifier, self.data, 0).task, self.model)
        except ValueError:
            existing, missing = _devices(modifier)
            if not missing:
                raise
            problems += missing
        modifier = modifier.model_copy(update={"available_gpus": existing or None})
        return Run(callback_of(modifier, self.data, 0).task, self.model)


def _devices(modifier: PruningModifier) -> tuple[tuple[str, ...], list[Problem]]:
    """The devices that a modifier wants and that exist, and a problem for each that doesn't."""
    backend = get_backend(keras.backend.backend())
    existing, problems = [], []
    try:
        wanted = expand(getattr(modifier, "available_gpus", None) or (), backend.devices())
    except ValueError as error:
        return (), [_problem(modifier, error)]
    for name in wanted:
        try:
            backend.kernel(name)
            existing.append(name)
        except ValueError as error:
            problems.append(_problem(modifier, error))
    return tuple(existing), problems


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
