"""From YAML to a tree: PyYAML composes, this module says what a scalar, a tag and a merge mean in a recipe.

No tag builds anything, scalars are those of YAML 1.2, and nothing grows beyond the bounds of the tree.
"""

import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.scanner import Scanner

from keras_woodfisher.recipe.syntax import tree
from keras_woodfisher.recipe.syntax.errors import RecipeError, short_repr, short_text
from keras_woodfisher.recipe.syntax.tree import Items, Node, Pairs, Scalar, describe

MERGE = "<<"


def yaml_tree(text: str) -> Node | None:
    """The tree of a YAML text, None if there is nothing in it; a RecipeError if it isn't one document within bounds."""
    return _TreeComposer(text).document()


class _MergeKey(Scalar):
    """An unquoted `<<`."""


class _TreeComposer(Reader, Scanner, Parser, Composer):
    """Composes nodes of the tree; an alias shares its anchor's node, so that only counting writes it out.

    Tags differ from YAML's: they build nothing, so global, verbatim and named ones are refused; a `:` at the end is
    dropped; and `,[]{}` end them, as users expect of `[!First, !Second]`.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._newlines = [index for index, char in enumerate(text) if char == "\n"]
        self._count = 0
        self._depth = 0
        self._aliased: set[Node] = set()
        try:
            Reader.__init__(self, text)
        except ReaderError as error:
            raise RecipeError(
                f"The character U+{ord(text[error.position]):04X} may not be in a recipe. Delete it.",
                line=self._line(error.position),
            ) from None
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)

    def document(self) -> Node | None:
        with self._yaml_errors():
            root = self.get_node() if self.check_node() else None
            if self.check_node():
                raise RecipeError(
                    "A second YAML document begins here. A recipe is one document: delete this line or the rest.",
                    line=self._line(self.peek_event().start_mark.index),
                )
        return root

    def compose_node(self, parent: Any, index: Any) -> Node:
        try:
            with self._yaml_errors():
                event = self.peek_event()
                self._enter(event, self._line(event.start_mark.index))
                node: Node = super().compose_node(parent, index)
        except RecipeError as error:
            # The index of a mapping's value is its key.
            error.field = error.field or (short_text(str(index.value)) if isinstance(index, Scalar) else None)
            raise
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        if isinstance(parent, yaml.MappingNode) and index is not None and (index.tag or not isinstance(index, Scalar)):
            raise RecipeError(
                f"A key must be a name or a number without a tag, got {describe(index)}.", line=index.line
            )
        return node

    def _enter(self, event: Any, line: int) -> None:
        """Counts a node before it is composed, and checks an alias."""
        self._count += 1
        if isinstance(event, yaml.AliasEvent):
            node, name = self.anchors.get(event.anchor), short_text(event.anchor)
            if node is None:
                raise RecipeError(
                    f"The alias *{name} has no anchor before it. Write &{name} at the value first.", line=line
                )
            # PyYAML's own node stands there until ours is complete.
            if isinstance(node, yaml.Node):
                raise RecipeError(f"The alias *{name} stands within its own anchor. Write the value out.", line=line)
            self._aliased.add(node)
            # Written out, it has its whole size once more.
            self._count += node.size - 1
        elif event.anchor is not None:
            # An anchor may be used again; the newest one counts.
            self.anchors.pop(event.anchor, None)
        tree.check_size(self._count, line)
        if isinstance(event, yaml.CollectionStartEvent):
            tree.check_depth(self._depth + 1, line)

    def descend_resolver(self, parent: Any, index: Any) -> None:
        self._depth += 1

    def ascend_resolver(self) -> None:
        self._depth -= 1

    def resolve(self, kind: Any, value: Any, implicit: Any) -> None:
        """What isn't tagged has no tag."""

    def compose_scalar_node(self, anchor: Any) -> Scalar:
        node = super().compose_scalar_node(anchor)
        line = self._line(node.start_mark.index)
        text = node.value if node.style is None else join_surrogates(node.value)
        tree.check_text(text, line)
        if node.style is None:
            self._refuse_lookalikes(node.start_mark.index, node.end_mark.index)
        value = scalar_value(text, line) if node.style is None else text
        return (_MergeKey if node.style is None and text == MERGE else Scalar)(value, line, node.tag)

    def compose_sequence_node(self, anchor: Any) -> Items:
        node = super().compose_sequence_node(anchor)
        return Items(tuple(node.value), self._line(node.start_mark.index), node.tag)

    def compose_mapping_node(self, anchor: Any) -> Pairs:
        node = super().compose_mapping_node(anchor)
        merges = [pair for pair in node.value if isinstance(pair[0], _MergeKey)]
        if len(merges) > 1:
            mend = "`<<` is there twice in one mapping. Write `<<: [*first, *second]`."
            raise RecipeError(mend, line=merges[1][0].line, field=MERGE)
        # Made first, so that its own keys are known to differ.
        pairs = tuple(pair for pair in node.value if not isinstance(pair[0], _MergeKey))
        own = Pairs(pairs, self._line(node.start_mark.index), node.tag)
        return self._merge(own, *merges[0]) if merges else own

    def _merge(self, own: Pairs, key: Scalar, value: Node) -> Pairs:
        """The mapping with those after `<<` merged in: its own keys win, then those of the first one named."""
        pairs = {name.value: (name, node) for name, node in own.pairs}
        for source in value.items if isinstance(value, Items) else (value,):
            if not isinstance(source, Pairs):
                raise RecipeError(
                    f"`<<` merges a mapping or a list of mappings, got {describe(source)}.", line=key.line, field=MERGE
                )
            if source.tag and source not in self._aliased:
                raise RecipeError(f"What `<<` merges has no tag, got {short_repr(source.tag)}.", line=source.line)
            for name, node in source.pairs:
                pairs.setdefault(name.value, (name, node))
        return Pairs(tuple(pairs.values()), own.line, own.tag)

    def scan_tag(self) -> Any:
        start = self.get_mark()
        length = 1
        while self.peek(length) not in _TAG_ENDS:
            length += 1
        tag = self.prefix(length)
        self.forward(length)
        self._refuse_lookalikes(start.index, start.index + length)
        if length > tree.LONGEST_KEY or not tag[1:].removesuffix(":").replace(".", "_").isidentifier():
            raise RecipeError(
                f"Only modifiers have a tag, as in `- !EpochRangeModifier`, got {short_repr(tag)}. Leave it out; "
                "quote a value to make it a text.",
                line=self._line(start.index),
            )
        return yaml.TagToken((None, tag.removesuffix(":")), start, self.get_mark())

    def _refuse_lookalikes(self, start: int, end: int) -> None:
        """Refuses what looks like a character of YAML, or like nothing, in an unquoted text."""
        if found := _LOOKALIKE.search(self._text, start, end):
            name = unicodedata.name(found[0], "a control character").lower()
            raise RecipeError(
                f"Here is a {name} (U+{ord(found[0]):04X}), as web pages and word processors write it. Write an "
                "ordinary space, hyphen, colon, comma or quotation mark, or quote the text if it belongs there.",
                line=self._line(found.start()),
            )

    def _line(self, index: int) -> int:
        # PyYAML counts other characters as line ends too; editors don't.
        return bisect_left(self._newlines, index) + 1

    def _line_end(self, index: int) -> int:
        return (self._text + "\n").index("\n", min(index, len(self._text)))

    @contextmanager
    def _yaml_errors(self) -> Iterator[None]:
        """Turns PyYAML's errors into ours."""
        try:
            yield
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            if mark:
                # What comes after one, perhaps on the next line, is often no YAML.
                first = self._text.rfind("\n", 0, min(mark.index, (error.context_mark or mark).index))
                first = self._text.rfind("\n", 0, max(first, 0)) + 1
                self._refuse_lookalikes(first, self._line_end(mark.index))
            context = f"{error.context}: " if error.context else ""
            hint = next((hint for found, hint in _HINTS.items() if found in (error.problem or "")), "")
            message = f"This isn't YAML: {context}{error.problem}. {hint}".rstrip()
            raise RecipeError(message, line=mark and self._line(mark.index)) from None
        except RecipeError:
            raise
        except (ValueError, OverflowError):
            # PyYAML leaves "\UFFFFFFFF" and "%YAML 1.99..." to Python.
            raise RecipeError(
                "This isn't YAML: an escape or a directive holds a number that is too large.",
                line=self._line(self.index),
            ) from None


_LOOKALIKE = re.compile(
    "[\x85\xa0\xad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u2064\u3000\ufeff"
    "\u2010-\u2015\u2018-\u201f\u2212\uff0c\uff0d\uff1a]"
)
"""Blanks and characters of no width; hyphens, quotation marks, and wide punctuation."""

_TAG_ENDS = "\0 \t\r\n\x85\u2028\u2029,[]{}"

_HINTS = {
    r"'\t'": "Indent with spaces.",
    "'%'": "Quote a text that begins with %.",
    "'@'": "Quote a text that begins with @.",
    "'`'": "Quote a text that begins with a backquote.",
    "mapping values are not allowed": "Quote a text that holds a colon and a space, and check the indentation.",
}


LONGEST_NUMBER = 100

_NAMED: dict[str, Any] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
    | dict.fromkeys((sign + name for sign in ("", "+") for name in (".inf", ".Inf", ".INF")), math.inf)
    | dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf)
    | dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan)
)
_WHOLE = re.compile(r"[-+]?[0-9]+|(0o[0-7]+|0x[0-9a-fA-F]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def scalar_value(text: str, line: int | None = None) -> Any:
    """The value of an unquoted scalar: None, bool, int, float, or the text itself.

    >>> [scalar_value(text) for text in ("1e-5", "0x1F", "2:4", "yes", "1_000", "~")]
    [1e-05, 31, '2:4', 'yes', '1_000', None]
    """
    if text in _NAMED:
        return _NAMED[text]
    # Also a bound on the time that matching takes.
    if text[0] not in "+-.0123456789" or not text.isascii():
        return text
    whole = _WHOLE.fullmatch(text)
    if not (whole or _FLOAT.fullmatch(text)):
        return text
    if len(text) > LONGEST_NUMBER:
        raise RecipeError(
            f"A number may have up to {LONGEST_NUMBER} characters, got {short_repr(text)}. Quote it to make it a text.",
            line=line,
        )
    if whole:
        return int(text, base=0 if whole[1] else 10)
    value = float(text)
    if math.isinf(value):
        raise RecipeError(f"The number {text} is too large for a float. Infinity is written .inf.", line=line)
    return value


_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def join_surrogates(text: str) -> str:
    r"""The text with pairs of surrogates joined, as JSON writes what has more than 16 bits.

    >>> join_surrogates("\ud83d\ude00") == "\U0001f600"
    True
    """
    return _PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
