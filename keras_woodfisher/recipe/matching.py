"""Which variables of a model a modifier means."""

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import keras

from keras_woodfisher.model.targets import (
    ALL,
    Target,
    all_targets,
    find_targets,
    holds_keyword,
    matches,
    named_targets,
)
from keras_woodfisher.options.patterns import PATTERN, matches_pattern
from keras_woodfisher.options.sparsity_levels import names_of
from keras_woodfisher.recipe.modifiers.pruning import ConstantPruningModifier, Modifier
from keras_woodfisher.recipe.modifiers.reconstruction import PRUNING
from keras_woodfisher.recipe.modifiers.training import TrainableParamsModifier
from keras_woodfisher.reports.left_out import LeftOut
from keras_woodfisher.reports.zeros import left_out_of


def targets_of(modifier: Modifier, model: keras.Model) -> list[Target]:
    """The variables that a modifier works on; none where it isn't about variables.

    Raises:
        KeyError: If a name matches nothing.
        ValueError: If nothing is left to prune, or a layer can't be pruned.
    """
    if isinstance(modifier, TrainableParamsModifier):
        everything = all_targets(model)
        return everything if holds_keyword(modifier.params, ALL) else named_targets(everything, modifier.params)
    if isinstance(modifier, PRUNING):
        argument = "final_sparsity" if getattr(modifier, "levels", ()) else "params"
        holds = isinstance(modifier, ConstantPruningModifier)
        return find_targets(model, _params_of(modifier), modifier.exclude, argument, frozen_too=holds)
    return []


def considered(modifiers: Sequence[Modifier], model: keras.Model) -> tuple[list[Target], LeftOut]:
    """The variables that some modifiers prune or hold, together, and what none of them considers.

    Raises:
        KeyError, ValueError: See `targets_of`.
    """
    chosen = list({id(t.variable): t for modifier in modifiers for t in targets_of(modifier, model)}.values())
    params = [item for modifier in modifiers for item in _listed(_params_of(modifier))]
    exclude = [item for modifier in modifiers for item in getattr(modifier, "exclude", ())]
    return chosen, left_out_of(model, chosen, tuple(dict.fromkeys(params)), exclude)


def frozen_targets(modifier: Modifier, model: keras.Model) -> list[Target]:
    """The variables that a modifier means and leaves alone, since they are frozen now."""
    if not isinstance(modifier, PRUNING) or isinstance(modifier, ConstantPruningModifier):
        return []
    meant = named_targets(all_targets(model), _params_of(modifier))
    return [t for t in meant if not t.variable.trainable and not any(matches(t, item) for item in modifier.exclude)]


def _params_of(modifier: Any) -> str | tuple[str, ...]:
    levels = getattr(modifier, "levels", ())
    return names_of(levels) if levels else modifier.params


def matched(modifier: Modifier, model: keras.Model) -> list[Target]:
    """The variables that any of a modifier's names and patterns matches, whatever the others do."""
    targets, found = all_targets(model), set()
    for item in _items_of(modifier):
        # A pattern that takes too long is refused by `targets_of`, once the other names are right.
        with suppress(ValueError):
            found |= {id(target) for target in targets if matches(target, item)}
    return [target for target in targets if id(target) in found]


def near_misses(modifier: Modifier, model: keras.Model, chosen: Sequence[Target]) -> list[str]:
    """Variables that a modifier's names and patterns would mean if they were read less strictly."""
    known = {id(target.variable) for target in chosen}
    others = [target for target in all_targets(model) if id(target.variable) not in known]
    try:
        return [target.name for target in others if any(_nearly(target, item) for item in _items_of(modifier))]
    except ValueError:
        # Only where case or place count does a pattern take too long.
        return []


def _items_of(modifier: Modifier) -> tuple[str, ...]:
    wanted = _params_of(modifier) if isinstance(modifier, PRUNING) else ()
    return () if isinstance(wanted, str) else wanted


def _listed(params: str | Sequence[str]) -> tuple[str, ...]:
    return (params,) if isinstance(params, str) else tuple(params)


def _nearly(target: Target, item: str) -> bool:
    if item.startswith(PATTERN):
        # From where the parts of a name begin.
        places = ((alias, found.end()) for alias in target.aliases for found in re.finditer("^|[/._]", alias))
        return any(matches_pattern(item, alias, start, ignore_case=True) for alias, start in places)
    return bool(difflib.get_close_matches(item.lower(), [alias.lower() for alias in target.aliases], n=1, cutoff=0.85))
