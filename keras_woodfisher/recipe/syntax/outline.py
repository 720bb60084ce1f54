"""What a recipe says, before anyone asks what it means: stages, and modifiers with their fields."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_woodfisher.recipe.syntax.errors import RecipeError, short_repr, short_text
from keras_woodfisher.recipe.syntax.sections import Section, read_sections
from keras_woodfisher.recipe.syntax.text import TEXT, read_source
from keras_woodfisher.recipe.syntax.tree import Node, Pairs, Scalar, check_size, data_of, describe, is_null, tree_of
from keras_woodfisher.recipe.syntax.yaml_tree import yaml_tree


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
    """Reads a recipe, as `load_recipe` says; a `RecipeError` has the line and field where they are known."""
    name = TEXT
    try:
        if isinstance(source, Mapping):
            root: Node | None = tree_of(source)
        else:
            name, text = read_source(source)
            root = yaml_tree(text)
        return Outline(tuple(_read_stages(read_sections(root, variables))), name)
    except RecipeError as error:
        error.source = error.source or name
        raise


def _read_stages(sections: Sequence[Section]) -> Iterator[Stage]:
    size = 0
    for section in sections:
        entries = []
        for group, items in section.groups:
            for index, item in enumerate(items.items):
                path = f"{section.name}/{group}[{index}]" if section.name else f"{group}[{index}]"
                tag, written = _tag_and_fields(item, group, path)
                fields = _compute(section, written, path)
                # A list of names that many modifiers use is written out in each.
                size += fields.size
                check_size(size, item.line)
                entries.append(Entry(tag, data_of(fields), dict(_lines(fields, "")), item.line, group, path))
        yield Stage(section.name, tuple(entries))


def _tag_and_fields(item: Node, group: str, path: str) -> tuple[str, Pairs]:
    """The tag and fields of an item, written `!Tag` and fields, or as a mapping with the one key `Tag`."""
    if item.tag:
        tag, body = item.tag.removeprefix("!"), item
    elif isinstance(item, Pairs) and len(item.pairs) == 1 and _names_modifier(*item.pairs[0]):
        key, body = item.pairs[0]
        tag = key.value.removeprefix("!")
    else:
        raise RecipeError(
            f"Each item of {short_repr(group)} is a modifier, `- !EpochRangeModifier` with its fields indented below "
            f"it, but {short_text(path)} is {describe(item)}.",
            line=item.line,
            field=path,
        )
    if is_null(body):
        return tag, Pairs((), body.line)
    if not isinstance(body, Pairs):
        raise RecipeError(
            f"The modifier {short_repr(tag)} must hold fields, one `name: value` a line and indented, "
            f"got {describe(body)}.",
            line=body.line,
            field=path,
        )
    return tag, body


def _names_modifier(key: Scalar, body: Node) -> bool:
    """Whether a pair is a name and its fields."""
    return isinstance(key.value, str) and (isinstance(body, Pairs) or is_null(body)) and not body.tag


def _compute(section: Section, fields: Pairs, path: str) -> Pairs:
    """The fields with their expressions computed; an error without a line names the path."""
    computed = section.scope.evaluate(Pairs(fields.pairs, fields.line), path if fields.line is None else None)
    assert isinstance(computed, Pairs)
    for key, _ in computed.pairs:
        if not isinstance(key.value, str):
            raise RecipeError(
                f"The name of a field must be a text, got {short_repr(key.value)} in {short_text(path)}.",
                line=key.line,
            )
    return computed


def _lines(node: Node, path: str, level: int = 1) -> Iterator[tuple[str, int | None]]:
    """The line of each key, nested ones joined by dots; not deeper than any field goes, since paths add up."""
    if isinstance(node, Pairs) and level <= 4:
        for key, value in node.pairs:
            name = f"{path}.{key.value}" if path else str(key.value)
            yield name, key.line
            yield from _lines(value, name, level + 1)
