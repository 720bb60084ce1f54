"""Which variables of a model a modifier means."""

import difflib
import re
from collections.abc import Mapping, Sequence

import keras

from keras_woodfisher.levels import checked_levels, names_of
from keras_woodfisher.options import PATTERN
from keras_woodfisher.recipe.companion_modifiers import TrainableParamsModifier
from keras_woodfisher.recipe.modifiers import ConstantPruningModifier, Modifier, PruningModifier
from keras_woodfisher.targets import ALL, Target, all_targets, find_targets, named_targets


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
        return find_targets(model, _params_of(modifier), modifier.exclude)
    return []


def _params_of(modifier: PruningModifier | ConstantPruningModifier) -> str | tuple[str, ...]:
    if isinstance(modifier, PruningModifier) and isinstance(modifier.final_sparsity, Mapping):
        return names_of(checked_levels(modifier.final_sparsity))
    return modifier.params


def near_misses(modifier: Modifier, model: keras.Model, chosen: Sequence[Target]) -> list[str]:
    """Variables that a modifier's names and patterns would mean if they were read less strictly."""
    if not isinstance(modifier, (PruningModifier, ConstantPruningModifier)):
        return []
    wanted = _params_of(modifier)
    items = [] if isinstance(wanted, str) else wanted
    known = {id(target.variable) for target in chosen}
    others = [target for target in all_targets(model) if id(target.variable) not in known]
    return [target.name for target in others if any(_nearly(target, item) for item in items)]


def _nearly(target: Target, item: str) -> bool:
    if item.startswith(PATTERN):
        pattern = re.compile(item.removeprefix(PATTERN), re.IGNORECASE)
        return any(pattern.search(alias) for alias in target.aliases)
    return bool(difflib.get_close_matches(item.lower(), [alias.lower() for alias in target.aliases], n=1, cutoff=0.85))
