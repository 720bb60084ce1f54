"""Which variables of a model a modifier means."""

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress

import keras

from keras_woodfisher.model.targets import ALL, Target, all_targets, find_targets, matches, named_targets
from keras_woodfisher.options.patterns import PATTERN, matches_pattern
from keras_woodfisher.options.sparsity_levels import checked_levels, names_of
from keras_woodfisher.recipe.modifiers.pruning import ConstantPruningModifier, Modifier, PruningModifier
from keras_woodfisher.recipe.modifiers.training import TrainableParamsModifier


def targets_of(modifier: Modifier, model: keras.Model) -> list[Target]:
    """The variables that a modifier works on; none where it isn't about variables.

    Raises:
        KeyError: If a name matches nothing.
        ValueError: If nothing is left to prune, or a layer can't be pruned.
    """
    if isinstance(modifier, TrainableParamsModifier):
        everything = all_targets(model)
        return everything if modifier.params == ALL else named_targets(everything, modifier.params)
    if isinstance(modifier, (PruningModifier, ConstantPruningModifier)):
        argument = "final_sparsity" if isinstance(getattr(modifier, "final_sparsity", 0.0), Mapping) else "params"
        return find_targets(model, _params_of(modifier), modifier.exclude, argument)
    return []


def frozen_targets(modifier: Modifier, model: keras.Model) -> list[Target]:
    """The variables that a modifier means and leaves alone, since they are frozen now."""
    if not isinstance(modifier, (PruningModifier, ConstantPruningModifier)):
        return []
    meant = named_targets(all_targets(model), _params_of(modifier))
    return [t for t in meant if not t.variable.trainable and not any(matches(t, item) for item in modifier.exclude)]


def _params_of(modifier: PruningModifier | ConstantPruningModifier) -> str | tuple[str, ...]:
    if isinstance(modifier, PruningModifier) and isinstance(modifier.final_sparsity, Mapping):
        return names_of(checked_levels(modifier.final_sparsity))
    return modifier.params


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
    if not isinstance(modifier, (PruningModifier, ConstantPruningModifier)):
        return ()
    wanted = _params_of(modifier)
    return () if isinstance(wanted, str) else wanted


def _nearly(target: Target, item: str) -> bool:
    if item.startswith(PATTERN):
        places = ((alias, start) for alias in target.aliases for start in _starts(alias))
        return any(matches_pattern(item, alias, start, ignore_case=True) for alias, start in places)
    return bool(difflib.get_close_matches(item.lower(), [alias.lower() for alias in target.aliases], n=1, cutoff=0.85))


def _starts(alias: str) -> list[int]:
    """Where the parts of a name begin."""
    return [0, *(place + 1 for place, character in enumerate(alias) if character in "/._")]
