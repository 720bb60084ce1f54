"""What a recipe holds before its expressions are computed: scalars, lists and mappings that know their line."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.wording import listed, shown

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
