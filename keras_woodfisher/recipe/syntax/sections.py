"""Divides a recipe into stages, groups of modifiers and variables, and computes the variables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keras_woodfisher.recipe.syntax.errors import RecipeError, join_names, short_repr, short_text, suggest_names
from keras_woodfisher.recipe.syntax.scope import Scope
from keras_woodfisher.recipe.syntax.tree import Items, Node, Pairs, describe, is_null, refuse_tags, tree_of

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


def read_sections(root: Node | None, overrides: Mapping[str, Any] | None = None) -> list[Section]:
    """Divides a recipe and computes its variables; `overrides` are values to use instead of its own.

    Raises:
        RecipeError: If something has no place in a recipe, there is no modifier, or a variable can't be computed.
    """
    if root is None or is_null(root):
        raise RecipeError(f"The recipe is empty. {SHAPE}.")
    if not isinstance(root, Pairs) or root.tag:
        raise RecipeError(
            f"The recipe is {describe(root)}. {SHAPE}. In Markdown, it stands between two lines that are "
            "exactly '---'.",
            line=root.line,
        )
    whole = _sort_keys(root, "")
    stages = {name: _sort_keys(node, name) for name, node in whole.stages.items()}
    if whole.groups and stages:
        raise RecipeError(
            f"The recipe has stages ({join_names(stages)}) and groups outside of them "
            f"({join_names(name for name, _ in whole.groups)}). Move the groups into a stage.",
            line=whole.stage_line,
        )
    if not any(items.items for level in (whole, *stages.values()) for _, items in level.groups):
        raise RecipeError(
            f"The recipe has no modifier: its keys are {join_names(str(k.value) for k, _ in root.pairs)}. {SHAPE}."
        )
    if overrides is not None:
        _override([whole.variables, *(level.variables for level in stages.values())], overrides)
    scope = Scope(whole.variables)
    if not stages:
        return [Section("", whole.groups, scope)]
    return [Section(name, level.groups, Scope(level.variables, scope)) for name, level in stages.items()]


@dataclass
class _Level:
    """The keys of a recipe or of a stage, by what they are."""

    groups: list[tuple[str, Items]] = field(default_factory=list)
    variables: dict[str, Node] = field(default_factory=dict)
    stages: dict[str, Pairs] = field(default_factory=dict)
    stage_line: int | None = None


def _sort_keys(mapping: Pairs, stage: str) -> _Level:
    level = _Level()
    if not stage:
        _refuse_other_tools(mapping)
    for key, node in mapping.pairs:
        name = key.value
        if not isinstance(name, str) or not name:
            raise RecipeError(
                f"The name of a group, variable or stage must be a text, got {short_repr(name)}. "
                "Quote it or rename it.",
                line=key.line,
            )
        if name in METADATA:
            refuse_tags(node, name)
        # Nothing stands for an empty list; other scalars are variables.
        elif GROUP in name and (isinstance(node, Items) or is_null(node)):
            if node.tag:
                raise RecipeError(_no_group(name, node), line=key.line, field=name)
            level.groups.append((name, node if isinstance(node, Items) else Items((), node.line)))
        elif _is_list_of_modifiers(node):
            raise RecipeError(
                f"{short_repr(name)} holds modifiers, but the name of a group must contain {GROUP!r}. Rename it.",
                line=key.line,
                field=name,
            )
        elif not isinstance(node, Pairs):
            level.variables[name] = node
        elif stage or node.tag or not _is_stage(node):
            raise RecipeError(_misplaced(name, node, stage), line=key.line, field=name)
        else:
            level.stages[name] = node
            level.stage_line = key.line
    return level


_OTHER_TOOLS = {
    "NNCF": {"input_info", "compression"},
    "Distiller": {"pruners", "policies", "lr_schedulers"},
    "Intel Neural Compressor": {"model", "tuning", "quantization", "evaluation"},
    "TensorFlow Model Optimization": {"pruning_schedule", "block_pooling_type"},
}
"""The first keys of what other tools read, by which they are known."""


def _refuse_other_tools(mapping: Pairs) -> None:
    if any(GROUP in str(key.value) or _is_stage(node) for key, node in mapping.pairs):
        return
    nested = {key.value: key.line for key, node in mapping.pairs if isinstance(node, (Pairs, Items))}
    for tool, keys in _OTHER_TOOLS.items():
        for name in (name for name in nested if name in keys):
            raise RecipeError(
                f"{name!r} is a key of {tool}'s configurations, which this package doesn't read: its recipes are those "
                f"of SparseML. {SHAPE}.",
                line=nested[name],
            )


def _is_stage(node: Node) -> bool:
    return isinstance(node, Pairs) and any(GROUP in str(key.value) for key, _ in node.pairs)


def _misplaced(name: str, node: Pairs, stage: str) -> str:
    if GROUP in name:
        return _no_group(name, node)
    place = f"the stage {short_repr(stage)}" if stage else "the recipe"
    near = [key.value for key, value in node.pairs if isinstance(key.value, str) and _is_list_of_modifiers(value)]
    hint = f" Does {short_repr(near[0])} stand for a group? Its name must contain {GROUP!r}." if near else ""
    if name.endswith("Modifier"):
        hint = f" Modifiers stand in a group: write `{GROUP}:`, and below it `- !{short_text(name)}` with its fields."
    return f"{short_repr(name)} is a mapping in {place}, but no group of modifiers is in it.{hint} {SHAPE}."


def _no_group(name: str, node: Node) -> str:
    found = "a mapping" if isinstance(node, Pairs) else describe(node)
    text = f"{short_repr(name)} must hold a list of modifiers, each beginning with `- `, got {found}."
    if not isinstance(node, Pairs) or not node.pairs or node.tag:
        return text
    first = short_text(str(node.pairs[0][0].value))
    return (
        f"{text} That is how LLM Compressor, and SparseML from release 1.6 on, write recipes, and this package reads "
        f"those of SparseML up to 1.5. Write `- !{first}` with its fields indented below it, if it is one of this "
        "package's modifiers."
    )


def _is_list_of_modifiers(node: Node) -> bool:
    """Whether a value looks like a group, whatever its key is."""
    return isinstance(node, Items) and any("modif" in (item.tag or "").lower() for item in node.items)


def _override(levels: Sequence[dict[str, Node]], overrides: Mapping[str, Any]) -> None:
    """Puts the given values in the place of each variable of that name, in stages too."""
    if not isinstance(overrides, Mapping):
        raise RecipeError(f"variables must be a mapping of names and values, got {type(overrides).__name__}.")
    known = {name for level in levels for name in level}
    for name, value in overrides.items():
        if not isinstance(name, str):
            raise RecipeError(f"variables must have texts as names, got {type(name).__name__}.")
        if name not in known:
            raise RecipeError(
                f"The recipe has no variable {short_repr(name)} to override. {suggest_names(name, sorted(known))}",
                field=f"variables.{short_text(name)}",
            )
        field = f"variables.{name}"
        node = tree_of(value, field)
        if isinstance(node, Pairs):
            raise RecipeError(
                f"The override of {short_repr(name)} must be a scalar or a list, got a mapping.", field=field
            )
        for level in levels:
            if name in level:
                level[name] = node
