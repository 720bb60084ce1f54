"""What a recipe says, before anyone asks what it means: stages, and modifiers with their fields."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keras_woodfisher.recipe.syntax.errors import RecipeError, cut, listed, nearest, shown
from keras_woodfisher.recipe.syntax.scope import Scope
from keras_woodfisher.recipe.syntax.text import TEXT, read_source
from keras_woodfisher.recipe.syntax.tree import (
    Items,
    Node,
    Pairs,
    Scalar,
    check_size,
    described,
    plain,
    plain_tree,
    refuse_tags,
)
from keras_woodfisher.recipe.syntax.yaml_tree import yaml_tree

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


@dataclass(frozen=True)
class Entry:
    """One modifier, as written.

    Attributes:
        tag: Its kind, without `!`.
        fields: Its fields as plain values, expressions computed.
        lines: The line of each field in the file, of a nested one as `mfac_options.num_grads`; None for a mapping.
        line: The line of the modifier.
        group: The key of the list that it is in.
        path: Where it is, as `stage/pruning_modifiers[0]`.
    """

    tag: str
    fields: Mapping[str, Any]
    lines: Mapping[str, int | None]
    line: int | None
    group: str
    path: str


def read_entries(sections: Sequence[Section]) -> Iterator[tuple[Entry, ...]]:
    """The modifiers of each section.

    Raises:
        RecipeError: If an item isn't a modifier, a value can't be computed, or all of them are too large together.
    """
    size = 0
    for section in sections:
        entries = []
        for group, items in section.groups:
            for index, item in enumerate(items.items):
                path = f"{section.name}/{group}[{index}]" if section.name else f"{group}[{index}]"
                tag, fields = _modifier(item, group, path)
                computed = _computed(section, fields, path)
                # A list of names that many modifiers use is written out in each.
                size += computed.size
                check_size(size, item.line)
                entries.append(
                    Entry(tag, plain(computed), dict(_lines(computed, "")), item.line, group=group, path=path)
                )
        yield tuple(entries)


def _modifier(item: Node, group: str, path: str) -> tuple[str, Pairs]:
    """The tag and fields of an item, written `!Tag` and fields, or as a mapping with the one key `Tag`."""
    if item.tag:
        tag, body = item.tag.removeprefix("!"), item
    elif isinstance(item, Pairs) and len(item.pairs) == 1 and _is_modifier(*item.pairs[0]):
        key, body = item.pairs[0]
        tag = key.value.removeprefix("!")
    else:
        raise RecipeError(
            f"Each item of {shown(group)} is a modifier, `- !EpochRangeModifier` with its fields indented below it, "
            f"but {cut(path)} is {described(item)}.",
            line=item.line,
            field=path,
        )
    if isinstance(body, Scalar) and body.value is None:
        return tag, Pairs((), body.line)
    if not isinstance(body, Pairs):
        raise RecipeError(
            f"The modifier {shown(tag)} must hold fields, one `name: value` a line and indented, "
            f"got {described(body)}.",
            line=body.line,
            field=path,
        )
    return tag, body


def _is_modifier(key: Scalar, body: Node) -> bool:
    """Whether the one pair of a mapping is a name and its fields."""
    fields = isinstance(body, Pairs) or (isinstance(body, Scalar) and body.value is None)
    return isinstance(key.value, str) and fields and not body.tag


def _computed(section: Section, fields: Pairs, path: str) -> Pairs:
    """The fields with their expressions computed; an error without a line names the path."""
    computed = section.scope.evaluate(Pairs(fields.pairs, fields.line), path if fields.line is None else None)
    assert isinstance(computed, Pairs)
    for key, _ in computed.pairs:
        if not isinstance(key.value, str):
            raise RecipeError(
                f"The name of a field must be a text, got {shown(key.value)} in {cut(path)}.", line=key.line
            )
    return computed


def _lines(node: Node, path: str, level: int = 1) -> Iterator[tuple[str, int | None]]:
    """The line of each key, nested ones joined by dots; not deeper than any field goes, since paths add up."""
    if isinstance(node, Pairs) and level <= 4:
        for key, value in node.pairs:
            name = f"{path}.{key.value}" if path else str(key.value)
            yield name, key.line
            yield from _lines(value, name, level + 1)


__all__ = ["Entry", "Outline", "Stage", "read_outline"]


@dataclass(frozen=True)
class Stage:
    """The modifiers of one stage; its name is empty when the recipe isn't staged."""

    name: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Outline:
    """A recipe's stages in their order, and the name of its file (`recipe` for a text or a mapping)."""

    stages: tuple[Stage, ...]
    source: str


def read_outline(
    source: str | os.PathLike[str] | Mapping[str, Any], variables: Mapping[str, Any] | None = None
) -> Outline:
    """Reads a recipe.

    Args:
        source: A path (`.yaml`, `.yml`, `.md`), the text itself, or plain data such as a JSON configuration.
        variables: Values to use instead of the recipe's own variables.

    Raises:
        RecipeError: Whatever is wrong, with the line and field where they are known.
    """
    name = TEXT
    try:
        if isinstance(source, Mapping):
            root: Node | None = plain_tree(source)
        else:
            name, text = read_source(source)
            root = yaml_tree(text)
        sections = read_sections(root, variables)
        stages = tuple(
            Stage(section.name, entries) for section, entries in zip(sections, read_entries(sections), strict=True)
        )
    except RecipeError as error:
        error.source = error.source or name
        raise
    return Outline(stages, name)
