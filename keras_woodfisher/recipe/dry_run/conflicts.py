"""Problems of a recipe that no modifier has by itself: two that don't go together."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import keras

from keras_woodfisher.callbacks.trainable_params import TrainablePeriod, TrainableSchedule
from keras_woodfisher.model.targets import all_targets
from keras_woodfisher.recipe.dry_run.report import CheckedModifier, Problem
from keras_woodfisher.recipe.modifiers.pruning import PruningModifier
from keras_woodfisher.recipe.modifiers.reconstruction import PRUNING
from keras_woodfisher.recipe.modifiers.training import TrainableParamsModifier


def conflicts(model: keras.Model, checked: Sequence[CheckedModifier]) -> Iterator[Problem]:
    """The problems that no modifier has by itself."""
    yield from _overlaps(checked)
    yield from _frozen(model, checked)


def _overlaps(checked: Sequence[CheckedModifier]) -> Iterator[Problem]:
    """Two prunings of one variable at the same time."""
    for one, other in combinations((e for e in checked if isinstance(e.modifier, PRUNING)), 2):
        (a, b), (c, d) = one.window, other.window
        shared = set(one.keys) & set(other.keys)
        if shared and a < d and c < b:
            name = next(n for n, key in zip(one.variables, one.keys, strict=True) if key in shared)
            yield Problem(
                other.label,
                f"{name!r} and {len(shared) - 1} other variables are pruned by {one.label} at the same time, from "
                f"epoch {max(a, c):g} on. Give each its own variables, or let one begin where the other ends.",
            )


def _frozen(model: keras.Model, checked: Sequence[CheckedModifier]) -> Iterator[Problem]:
    """Variables that are frozen while they are pruned, or while their gradients are buffered for that."""
    freezing = [(e, e.modifier) for e in checked if isinstance(e.modifier, TrainableParamsModifier) and e.keys]
    if not freezing:
        return
    variables = {id(t.variable): t.variable for t in all_targets(model)}
    schedule = TrainableSchedule(model)
    for entry, freeze in freezing:
        start, end = max(freeze.start_epoch, 0.0), math.inf if freeze.end_epoch == -1 else freeze.end_epoch
        schedule.join(TrainablePeriod([variables[key] for key in entry.keys], freeze.trainable, start, end))
    for entry in (e for e in checked if isinstance(e.modifier, PruningModifier)):
        first, last = 0.0 if entry.source == "buffer" else entry.window[0], entry.window[1]
        for name, key in zip(entry.variables, entry.keys, strict=True):
            when = schedule.frozen_at(variables[key], first, last)
            if when is not None:
                yield Problem(
                    entry.label,
                    f"{name!r} is frozen at epoch {when:g} by TrainableParamsModifier while it is pruned, or while "
                    f"its gradients are collected (epochs {first:g} to {last:g}). Freeze it at another time, or leave "
                    "it out of one of them.",
                )
                break
