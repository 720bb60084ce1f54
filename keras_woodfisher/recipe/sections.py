"""How a recipe is divided: groups of modifiers, variables, and stages that hold both."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.plain_tree import plain_tree
from keras_woodfisher.recipe.tree import Items, Node, Pairs, Scalar, described, refuse_tags
from keras_woodfisher.recipe.variables import Scope
from keras_woodfisher.recipe.wording import cut, listed, nearest, shown

GROUP = "modifiers"
METADATA = ("__metadata__", "recipe_metadata")
SHAPE = (
    f"A recipe is a mapping of groups (lists of modifiers, under keys that contain {GROUP!r}) and variables (scalars "
    "and lists), or of stages that hold groups and variables"
)


@dataclass(frozen=True)
class Section:
    """A stage, or the whole of a recipe without stages.

    Attributes:
        name: The stage's name, empty without stages.
        groups: The lists of modifiers, by their key.
        scope: The variables that its values may use.
    """

    name: str
    groups: list[tuple[str, Items]]
    scope: Scope


@dataclass
class _Parts:
    """The keys of one level by what they are."""

    groups: list[tuple[str, Items]] = field(default_factory=list)
    variables: dict[str, Node] = field(default_factory=dict)
    stages: dict[str, Pairs] = field(default_factory=dict)
    stage_line: int | None = None


def read_sections(root: Node | None, overrides: Mapping[str, Any] | None = None) -> list[Section]:
    """Divides a recipe and computes its variables.

    Args:
        root: The recipe's tree.
        overrides: Values to use instead of the recipe's own variables.

    Raises:
        RecipeError: If something has no place in a recipe, there is no modifier, or a variable can't be computed.
    """
    if root is None or (isinstance(root, Scalar) and root.value is None):
        raise RecipeError(f"The recipe is empty. {SHAPE}.")
    if not isinstance(root, Pairs) or root.tag:
        raise RecipeError(
            f"The recipe is {described(root)}. {SHAPE}. In Markdown, it stands between two lines that are "
            "exactly '---'.",
            line=root.line,
        )
    whole = _parts(root, "")
    stages = {name: _parts(node, name) for name, node in whole.stages.items()}
    if whole.groups and stages:
        raise RecipeError(
            f"The recipe has stages ({listed(stages)}) and groups outside of them "
            f"({listed(name for name, _ in whole.groups)}). Move the groups into a stage.",
            line=whole.stage_line,
        )
    if not any(items.items for parts in (whole, *stages.values()) for _, items in parts.groups):
        raise RecipeError(
            f"The recipe has no modifier: its keys are {listed(str(k.value) for k, _ in root.pairs)}. {SHAPE}."
        )
    _override([whole.variables, *(parts.variables for parts in stages.values())], overrides)
    scope = Scope(whole.variables)
    if not stages:
        return [Section("", whole.groups, scope)]
    return [Section(name, parts.groups, Scope(parts.variables, scope)) for name, parts in stages.items()]


def _parts(mapping: Pairs, stage: str) -> _Parts:
    parts = _Parts()
    for key, node in mapping.pairs:
        name = key.value
        if not isinstance(name, str) or not name:
            raise RecipeError(
                f"The name of a group, variable or stage must be a text, got {shown(name)}. Quote it or rename it.",
                line=key.line,
            )
        if name in METADATA:
            refuse_tags(node, name)
        elif GROUP in name and _is_group(node):
            parts.groups.append((name, _group(name, node, key.line)))
        elif not isinstance(node, Pairs):
            parts.variables[name] = node
        elif stage or node.tag or not _is_stage(node):
            raise RecipeError(_misplaced(name, stage), line=key.line, field=name)
        else:
            parts.stages[name] = node
            parts.stage_line = key.line
    return parts


def _is_group(node: Node) -> bool:
    """Whether it holds a list, or nothing, which stands for an empty one; other scalars are variables."""
    return isinstance(node, Items) or (isinstance(node, Scalar) and node.value is None)


def _group(name: str, node: Node, line: int | None) -> Items:
    if node.tag:
        raise RecipeError(
            f"{shown(name)} must hold a list of modifiers, each beginning with `- `, got {described(node)}.",
            line=line,
            field=name,
        )
    return node if isinstance(node, Items) else Items((), node.line)


def _is_stage(node: Pairs) -> bool:
    return any(isinstance(key.value, str) and GROUP in key.value for key, _ in node.pairs)


def _misplaced(name: str, stage: str) -> str:
    if GROUP in name:
        return f"{shown(name)} must hold a list of modifiers, each beginning with `- `, got a mapping."
    place = f"the stage {shown(stage)}" if stage else "the recipe"
    return f"{shown(name)} is a mapping in {place}, but no group of modifiers is in it. {SHAPE}."


def _override(levels: Iterable[dict[str, Node]], overrides: Mapping[str, Any] | None) -> None:
    """Puts the given values in the place of each variable of that name, in stages too."""
    if overrides is None:
        return
    if not isinstance(overrides, Mapping):
        raise RecipeError(f"variables must be a mapping of names and values, got {type(overrides).__name__}.")
    levels = list(levels)
    known = {name for level in levels for name in level}
    for name, value in overrides.items():
        if not isinstance(name, str):
            raise RecipeError(f"variables must have texts as names, got {type(name).__name__}.")
        if name not in known:
            raise RecipeError(
                f"The recipe has no variable {shown(name)} to override. {nearest(name, sorted(known))}",
                field=f"variables.{cut(name)}",
            )
        node = plain_tree(value, f"variables.{name}")
        if isinstance(node, Pairs):
            raise RecipeError(
                f"The override of {shown(name)} must be a scalar or a list, got a mapping.", field=f"variables.{name}"
            )
        for level in levels:
            if name in level:
                level[name] = node
