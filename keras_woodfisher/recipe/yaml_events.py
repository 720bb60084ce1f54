"""PyYAML's parser with this project's tags: `!Name` or `!Name:`, and no others."""

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.scanner import Scanner

from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.tree import LONGEST_KEY
from keras_woodfisher.recipe.wording import shown

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
