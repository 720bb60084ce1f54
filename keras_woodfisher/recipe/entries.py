"""A recipe's modifiers, as written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.sections import Section
from keras_woodfisher.recipe.tree import Node, Pairs, Scalar, check_size, described, plain
from keras_woodfisher.recipe.wording import cut, shown


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
