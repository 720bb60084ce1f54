"""The tree of a recipe before its expressions are computed: nodes that know their line and are bounded in size.

Plain Python data and trees are turned into each other here; `yaml_tree` makes trees from text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from keras_woodfisher.recipe.syntax.errors import MOST_BITS, RecipeError, join_names, short_repr

MOST_NODES = 10_000
DEEPEST = 32
LONGEST_KEY = 256


@dataclass(frozen=True, eq=False, slots=True)
class Scalar:
    """A str, int, float, bool or None."""

    value: Any
    line: int | None = None
    tag: str | None = None
    size: int = 1
    height: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Items:
    """A list. `size` counts its nodes as if every alias were written out, `height` its levels.

    Raises:
        RecipeError: If either is above its bound.
    """

    items: "tuple[Node, ...]"
    line: int | None = None
    tag: str | None = None
    size: int = field(init=False)
    height: int = field(init=False)

    def __post_init__(self) -> None:
        _measure(self)


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """A mapping with scalar keys, in the order of the file.

    Raises:
        RecipeError: If a key is there twice or too long, or the mapping is too large or too deep.
    """

    pairs: "tuple[tuple[Scalar, Node], ...]"
    line: int | None = None
    tag: str | None = None
    size: int = field(init=False)
    height: int = field(init=False)

    def __post_init__(self) -> None:
        seen: dict[Any, Scalar] = {}
        for key, _ in self.pairs:
            if isinstance(key.value, str) and len(key.value) > LONGEST_KEY:
                raise RecipeError(
                    f"A key may have up to {LONGEST_KEY} characters, got {short_repr(key.value)}.", line=key.line
                )
            first = seen.setdefault(key.value, key)
            if first is not key:
                before = "" if first.line is None else f" (first on line {first.line})"
                raise RecipeError(
                    f"The key {short_repr(key.value)} is there twice in one mapping{before}. Keep one of them.",
                    line=key.line,
                    field=str(key.value),
                )
        _measure(self)


Node: TypeAlias = Scalar | Items | Pairs


def parts_of(node: Node) -> tuple[Node, ...]:
    """The nodes of a list, the keys and values of a mapping."""
    if isinstance(node, Scalar):
        return ()
    return node.items if isinstance(node, Items) else tuple(part for pair in node.pairs for part in pair)


def _measure(node: Items | Pairs) -> None:
    children = parts_of(node)
    object.__setattr__(node, "size", 1 + sum(child.size for child in children))
    object.__setattr__(node, "height", 1 + max((child.height for child in children), default=0))
    check_size(node.size, node.line)
    check_depth(node.height, node.line)


def check_size(size: int, line: int | None) -> None:
    """Refuses what would grow beyond all bounds when aliases and variables are written out."""
    if size > MOST_NODES:
        raise RecipeError(
            f"The recipe holds more than {MOST_NODES} values, counted with every alias and variable written out. "
            "Write fewer, for instance a `re:` pattern for a list of names.",
            line=line,
        )


def check_depth(depth: int, line: int | None) -> None:
    """Refuses what is nested too deeply."""
    if depth > DEEPEST:
        raise RecipeError(
            f"Lists and mappings are nested more than {DEEPEST} levels deep. A recipe needs about 5.", line=line
        )


_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(text: str, line: int | None = None, field: str | None = None) -> None:
    """Refuses half characters (lone surrogates), which can't be printed or saved."""
    found = _SURROGATE.search(text)
    if found:
        raise RecipeError(
            f"The text {short_repr(text)} holds half of a character (the lone surrogate U+{ord(found[0]):04X}). "
            "Write the whole character.",
            line=line,
            field=field,
        )


def refuse_tags(node: Node, field: str | None) -> None:
    """Refuses a tag in a value, or within it: none means anything there."""
    if node.tag:
        raise RecipeError(
            f"The tag {short_repr(node.tag)} is at a place that has no tags. Only the items of a list whose key "
            "contains `modifiers` have one.",
            line=node.line,
            field=field,
        )
    for part in parts_of(node):
        refuse_tags(part, field)


def is_null(node: Node) -> bool:
    """Whether nothing is written there."""
    return isinstance(node, Scalar) and node.value is None


def describe(node: Node) -> str:
    """What a node is, for messages."""
    tag = f" tagged {short_repr(node.tag)}" if node.tag else ""
    if isinstance(node, Scalar):
        return short_repr(node.value) + tag
    if isinstance(node, Items):
        return "a list" + tag
    return f"a mapping{tag} with the keys {join_names((str(key.value) for key, _ in node.pairs), most=5)}"


def data_of(node: Node) -> Any:
    """The node as Python's own lists and dictionaries, freshly made."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [data_of(item) for item in node.items]
    return {key.value: data_of(value) for key, value in node.pairs}


def tree_of(data: Any, path: str = "") -> Node:
    """The tree of plain data, which is left as it is; `path` says in messages where the data stands.

    Raises:
        RecipeError: If anything but None, bool, int, float, str, NumPy scalars, and lists, tuples and mappings of them
            is found, or it is too large, too deep, or within itself.
    """
    return _TreeBuilder().node(data, path, ())


class _TreeBuilder:
    """Counts nodes while they are made, so that data that hold one list many times are stopped early."""

    def __init__(self) -> None:
        self._count = 0

    def node(self, value: Any, path: str, parents: tuple[int, ...]) -> Node:
        self._count += 1
        try:
            check_size(self._count, None)
            check_depth(len(parents), None)
            if isinstance(value, Mapping | list | tuple):
                if id(value) in parents:
                    raise RecipeError("A list or mapping holds itself. Write the value out.")
                return self._container(value, path, (*parents, id(value)))
        except RecipeError as error:
            error.field = error.field or path or None
            raise
        return Scalar(_scalar_of(value, path))

    def _container(self, value: Any, path: str, parents: tuple[int, ...]) -> Node:
        if not isinstance(value, Mapping):
            return Items(tuple(self.node(item, f"{path}[{i}]", parents) for i, item in enumerate(value)))
        pairs = []
        for key, item in value.items():
            self._count += 1
            scalar = Scalar(_scalar_of(key, f"a key of {path}" if path else "a key"))
            name = str(scalar.value)[:100]
            pairs.append((scalar, self.node(item, f"{path}.{name}" if path else name, parents)))
        return Pairs(tuple(pairs))


def _scalar_of(value: Any, path: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and type(value) not in (bool, int, float, str):
        raise RecipeError(
            "A recipe holds plain data (str, int, float, bool, None, lists and mappings), "
            f"got {type(value).__module__}.{type(value).__qualname__}.",
            field=path or None,
        )
    if isinstance(value, str):
        check_text(value, field=path)
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise RecipeError(f"A number may have up to {MOST_BITS} bits, got {short_repr(value)}.", field=path)
    return value
