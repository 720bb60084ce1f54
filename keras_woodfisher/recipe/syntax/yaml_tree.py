"""From YAML to a tree. No tag builds anything, and nothing grows beyond its bounds."""

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.scanner import Scanner

from keras_woodfisher.recipe.syntax.errors import RecipeError, cut, shown
from keras_woodfisher.recipe.syntax.tree import (
    LONGEST_KEY,
    Items,
    Node,
    Pairs,
    Scalar,
    check_depth,
    check_size,
    check_text,
    described,
    scalar_value,
    whole_characters,
)

_TAG_ENDS = "\0 \t\r\n\x85\u2028\u2029,[]{}"


_HINTS = {
    r"'\t'": "Indent with spaces.",
    "'%'": "Quote a text that begins with %.",
    "'@'": "Quote a text that begins with @.",
    "'`'": "Quote a text that begins with a backquote.",
    "mapping values are not allowed": "Quote a text that holds a colon and a space, and check the indentation.",
}


class Events(Reader, Scanner, Parser):
    """The events of a text, one by one, so that a bound can stop it anywhere.

    Tags differ from YAML's: they build nothing, so global, verbatim and named ones are refused; a `:` at the end is
    dropped; and `,[]{}` end them, as users expect of `[!First, !Second]`.

    Raises:
        RecipeError: If it isn't YAML (with the line), also while it is read.
    """

    def __init__(self, text: str) -> None:
        self._newlines = [index for index, char in enumerate(text) if char == "\n"]
        try:
            Reader.__init__(self, text)
        except ReaderError as error:
            raise RecipeError(
                f"The character U+{ord(text[error.position]):04X} may not be in a recipe. Delete it.",
                line=self._line(error.position),
            ) from None
        Scanner.__init__(self)
        Parser.__init__(self)

    def line_of(self, event: Any) -> int:
        """The line on which an event begins, from 1."""
        return self._line(event.start_mark.index)

    def next(self) -> Any:
        """The next event; at the end, None."""
        try:
            return self.get_event() if self.check_event() else None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = None if mark is None else self._line(mark.index)
            raise RecipeError(_not_yaml(error), line=line) from None
        except RecipeError:
            raise
        except (ValueError, OverflowError):
            # PyYAML leaves "\UFFFFFFFF" and "%YAML 1.99..." to Python.
            raise RecipeError(
                "This isn't YAML: an escape or a directive holds a number that is too large.",
                line=self._line(self.index),
            ) from None

    def __iter__(self) -> Iterator[Any]:
        while (event := self.next()) is not None:
            yield event

    def scan_tag(self) -> Any:
        start = self.get_mark()
        length = 1
        while self.peek(length) not in _TAG_ENDS:
            length += 1
        tag = self.prefix(length)
        self.forward(length)
        if length > LONGEST_KEY or not tag[1:].removesuffix(":").replace(".", "_").isidentifier():
            raise RecipeError(
                f"Only modifiers have a tag, as in `- !EpochRangeModifier`, got {shown(tag)}. Leave it out; "
                "quote a value to make it a text.",
                line=self._line(start.index),
            )
        return yaml.TagToken((None, tag.removesuffix(":")), start, self.get_mark())

    def _line(self, index: int) -> int:
        # PyYAML counts other characters as line ends too; editors don't.
        return bisect_left(self._newlines, index) + 1


def _not_yaml(error: Any) -> str:
    context = f"{error.context}: " if error.context else ""
    hint = next((hint for found, hint in _HINTS.items() if found in (error.problem or "")), "")
    return f"This isn't YAML: {context}{error.problem}. {hint}".rstrip()


MERGE = "<<"


def yaml_tree(text: str) -> Node | None:
    """The tree of a YAML text, None if there is nothing in it.

    Raises:
        RecipeError: If it isn't one YAML document within bounds (with the line).
    """
    return _Builder(Events(text)).document()


class _Builder:
    """Builds nodes from events; an alias shares its anchor's node, so that only counting writes it out."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._anchors: dict[str, Node | None] = {}
        self._aliased: set[int] = set()
        self._count = 0

    def document(self) -> Node | None:
        root: Node | None = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise RecipeError(
                        "A second YAML document begins here. A recipe is one document: delete this line or the rest.",
                        line=self._events.line_of(event),
                    )
                root = self._node(self._events.next(), depth=0)
        return root

    def _node(self, event: Any, depth: int) -> Node:
        line = self._events.line_of(event)
        self._count += 1
        check_size(self._count, line)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), line)
        if event.anchor is not None:
            # Until the node is complete, an alias to it would be recursive.
            self._anchors[event.anchor] = None
        node = self._content(event, depth, line)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, anchor: str, line: int) -> Node:
        name = cut(anchor)
        if anchor not in self._anchors:
            raise RecipeError(
                f"The alias *{name} has no anchor before it. Write &{name} at the value first.", line=line
            )
        node = self._anchors[anchor]
        if node is None:
            raise RecipeError(f"The alias *{name} stands within its own anchor. Write the value out.", line=line)
        # Written out, it has its whole size once more.
        self._count += node.size - 1
        check_size(self._count, line)
        self._aliased.add(id(node))
        return node

    def _content(self, event: Any, depth: int, line: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            text = event.value if event.style is None else whole_characters(event.value)
            check_text(text, line)
            value = scalar_value(text, line) if event.style is None else text
            return Scalar(value, line, event.tag)
        check_depth(depth + 1, line)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(event, depth, line)
        items = []
        while not isinstance(child := self._events.next(), yaml.SequenceEndEvent):
            items.append(self._node(child, depth + 1))
        return Items(tuple(items), line, event.tag)

    def _mapping(self, event: Any, depth: int, line: int) -> Pairs:
        pairs: list[tuple[Scalar, Node]] = []
        merged: tuple[Scalar, Node] | None = None
        while not isinstance(child := self._events.next(), yaml.MappingEndEvent):
            key = self._node(child, depth + 1)
            value = self._value(key, depth + 1)
            if not isinstance(key, Scalar) or key.tag:
                raise RecipeError(
                    f"A key must be a name or a number without a tag, got {described(key)}.", line=key.line
                )
            if not _is_merge(child):
                pairs.append((key, value))
            elif merged is None:
                merged = key, value
            else:
                raise RecipeError(
                    "`<<` is there twice in one mapping. Write `<<: [*first, *second]`.", line=key.line, field=MERGE
                )
        # Made first, so that its own keys are known to differ.
        own = Pairs(tuple(pairs), line, event.tag)
        return own if merged is None else self._merge(own, *merged)

    def _value(self, key: Node, depth: int) -> Node:
        try:
            return self._node(self._events.next(), depth)
        except RecipeError as error:
            error.field = error.field or (cut(str(key.value)) if isinstance(key, Scalar) else None)
            raise

    def _merge(self, own: Pairs, key: Scalar, value: Node) -> Pairs:
        """The mapping with those after `<<` merged in: its own keys win, then those of the first one named."""
        pairs = {name.value: (name, node) for name, node in own.pairs}
        for source in value.items if isinstance(value, Items) else (value,):
            if not isinstance(source, Pairs):
                raise RecipeError(
                    f"`<<` merges a mapping or a list of mappings, got {described(source)}.", line=key.line, field=MERGE
                )
            if source.tag and id(source) not in self._aliased:
                raise RecipeError(f"What `<<` merges has no tag, got {shown(source.tag)}.", line=source.line)
            for name, node in source.pairs:
                pairs.setdefault(name.value, (name, node))
        return Pairs(tuple(pairs.values()), own.line, own.tag)


def _is_merge(event: Any) -> bool:
    """Whether an unquoted `<<` is the key."""
    return isinstance(event, yaml.ScalarEvent) and event.style is None and event.value == MERGE
