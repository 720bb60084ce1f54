"""What a recipe holds before its expressions are computed: scalars, lists and mappings that know their line."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from keras_woodfisher.recipe.syntax.errors import MOST_BITS, RecipeError, listed, shown

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
        _measure(self, list(self.items))


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
                    f"A key may have up to {LONGEST_KEY} characters, got {shown(key.value)}.", line=key.line
                )
            first = seen.setdefault(key.value, key)
            if first is not key:
                before = "" if first.line is None else f" (first on line {first.line})"
                raise RecipeError(
                    f"The key {shown(key.value)} is there twice in one mapping{before}. Keep one of them.",
                    line=key.line,
                    field=str(key.value),
                )
        _measure(self, [node for pair in self.pairs for node in pair])


Node: TypeAlias = Scalar | Items | Pairs


def _measure(node: Items | Pairs, children: list[Node]) -> None:
    object.__setattr__(node, "size", 1 + sum(child.size for child in children))
    object.__setattr__(node, "height", 1 + max((child.height for child in children), default=0))
    check_size(node.size, node.line)
    check_depth(node.height, node.line)


def check_size(size: int, line: int | None) -> None:
    """Refuses what would grow beyond all bounds when aliases and variables are written out.

    Raises:
        RecipeError: If there are more than `MOST_NODES` values.
    """
    if size > MOST_NODES:
        raise RecipeError(
            f"The recipe holds more than {MOST_NODES} values, counted with every alias and variable written out. "
            "Write fewer, for instance a `re:` pattern for a list of names.",
            line=line,
        )


def check_depth(depth: int, line: int | None) -> None:
    """Refuses what is nested too deeply.

    Raises:
        RecipeError: If there are more than `DEEPEST` levels.
    """
    if depth > DEEPEST:
        raise RecipeError(
            f"Lists and mappings are nested more than {DEEPEST} levels deep. A recipe needs about 5.", line=line
        )


def plain(node: Node) -> Any:
    """The node as Python's own lists and dictionaries, freshly made."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return {key.value: plain(value) for key, value in node.pairs}


def described(node: Node) -> str:
    """What a node is, for messages."""
    tag = f" tagged {shown(node.tag)}" if node.tag else ""
    if isinstance(node, Scalar):
        return shown(node.value) + tag
    if isinstance(node, Items):
        return "a list" + tag
    return f"a mapping{tag} with the keys {listed((str(key.value) for key, _ in node.pairs), most=5)}"


def refuse_tags(node: Node, field: str | None) -> None:
    """Refuses a tag in a value: none means anything there.

    Raises:
        RecipeError: If a node or one within it has a tag.
    """
    if node.tag:
        raise RecipeError(
            f"The tag {shown(node.tag)} is at a place that has no tags. Only the items of a list whose key "
            "contains `modifiers` have one.",
            line=node.line,
            field=field,
        )
    parts: list[Node] = []
    if isinstance(node, Items):
        parts = list(node.items)
    elif isinstance(node, Pairs):
        parts = [value for _, value in node.pairs]
    for part in parts:
        refuse_tags(part, field)


LONGEST_NUMBER = 100


_NAMED: dict[str, Any] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
    | dict.fromkeys((sign + name for sign in ("", "+") for name in (".inf", ".Inf", ".INF")), math.inf)
    | dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf)
    | dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan)
)


_DECIMAL = re.compile(r"[-+]?[0-9]+")


_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


_SURROGATE = re.compile("[\ud800-\udfff]")


_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def scalar_value(text: str, line: int | None = None) -> Any:
    """The value of an unquoted scalar: None, bool, int, float, or the text itself.

    >>> [scalar_value(text) for text in ("1e-5", "0x1F", "2:4", "yes", "1_000", "~")]
    [1e-05, 31, '2:4', 'yes', '1_000', None]

    Raises:
        RecipeError: If a number is too long or too large to be held.
    """
    if text in _NAMED:
        return _NAMED[text]
    # Also a bound on the time that matching takes.
    if text[0] not in "+-.0123456789" or not text.isascii():
        return text
    decimal, based = _DECIMAL.fullmatch(text), _BASED.fullmatch(text)
    if not (decimal or based or _FLOAT.fullmatch(text)):
        return text
    if len(text) > LONGEST_NUMBER:
        raise RecipeError(
            f"A number may have up to {LONGEST_NUMBER} characters, got {shown(text)}. Quote it to make it a text.",
            line=line,
        )
    if decimal:
        return int(text)
    if based:
        return int(text, base=0)
    value = float(text)
    if math.isinf(value):
        raise RecipeError(f"The number {text} is too large for a float. Infinity is written .inf.", line=line)
    return value


def whole_characters(text: str) -> str:
    r"""The text with pairs of surrogates joined, as JSON writes what has more than 16 bits.

    >>> whole_characters("\ud83d\ude00") == "\U0001f600"
    True
    """
    return _PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)


def check_text(text: str, line: int | None = None, field: str | None = None) -> None:
    """Refuses half characters, which can't be printed or saved.

    Raises:
        RecipeError: If there is a lone surrogate.
    """
    found = _SURROGATE.search(text)
    if found:
        raise RecipeError(
            f"The text {shown(text)} holds half of a character (the lone surrogate U+{ord(found[0]):04X}). "
            "Write the whole character.",
            line=line,
            field=field,
        )


def plain_tree(value: Any, path: str = "") -> Node:
    """The tree of a plain value; the value is left as it is.

    Args:
        value: None, bool, int, float, str, NumPy scalars, and lists, tuples and mappings of them.
        path: Where the value stands, for messages.

    Raises:
        RecipeError: If something else is found, or it is too large, too deep, or within itself.
    """
    return _Builder().node(value, path, ())


class _Builder:
    def __init__(self) -> None:
        self._count = 0

    def node(self, value: Any, path: str, parents: tuple[int, ...]) -> Node:
        self._count += 1
        try:
            check_size(self._count, None)
            check_depth(len(parents), None)
            if isinstance(value, Mapping):
                return self._mapping(value, path, _within(value, path, parents))
            if isinstance(value, list | tuple):
                inner = _within(value, path, parents)
                return Items(tuple(self.node(item, f"{path}[{i}]", inner) for i, item in enumerate(value)))
        except RecipeError as error:
            error.field = error.field or path or None
            raise
        return Scalar(_scalar(value, path))

    def _mapping(self, value: Mapping[Any, Any], path: str, parents: tuple[int, ...]) -> Pairs:
        pairs = []
        for key, item in value.items():
            self._count += 1
            inner = Scalar(_scalar(key, f"a key of {path}" if path else "a key"))
            name = str(inner.value)[:100]
            pairs.append((inner, self.node(item, f"{path}.{name}" if path else name, parents)))
        return Pairs(tuple(pairs))


def _within(value: Any, path: str, parents: tuple[int, ...]) -> tuple[int, ...]:
    if id(value) in parents:
        raise RecipeError("A list or mapping holds itself. Write the value out.", field=path or None)
    return (*parents, id(value))


def _scalar(value: Any, path: str) -> Any:
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
        raise RecipeError(f"A number may have up to {MOST_BITS} bits, got {shown(value)}.", field=path)
    return value
