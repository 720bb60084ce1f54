"""What is wrong in a recipe, and where; and how messages quote what a recipe holds, which may be long."""

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any

LONGEST = 60
MOST_BITS = 1024


class RecipeError(ValueError):
    """A recipe can't be read.

        >>> kw.load_recipe("modifiers: [!PruningModifer {}]")
        Traceback (most recent call last):
        keras_woodfisher.recipe.syntax.errors.RecipeError: ...

    Args:
        message: What was found, what is allowed, and the mend.
        line: Line in the recipe's file, from 1.
        field: Field or variable; a nested one as `mfac_options.num_grads`.
        source: File name, or `recipe` for a text or a mapping.
    """

    def __init__(
        self, message: str, *, line: int | None = None, field: str | None = None, source: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.field = field
        self.source = source

    def __str__(self) -> str:
        line = None if self.line is None else f"line {self.line}"
        where = ", ".join(part for part in (self.source, line, self.field) if part)
        return f"{where}: {self.message}" if where else self.message


_CONTAINERS = reprlib.Repr()
_CONTAINERS.maxstring = _CONTAINERS.maxother = 30
_CONTAINERS.maxdict = _CONTAINERS.maxlist = _CONTAINERS.maxtuple = 3
_CONTAINERS.maxlevel = 2


def short_repr(value: Any) -> str:
    """A plain value as it is written in Python, cut where it is long."""
    if isinstance(value, str):
        return repr(value) if len(value) <= LONGEST else f"{value[:LONGEST]!r}... ({len(value)} characters)"
    if isinstance(value, int) and value.bit_length() > MOST_BITS:  # Python refuses to print longer ones
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float):
        return repr(value)
    try:
        return _CONTAINERS.repr(value)
    except ValueError:  # an integer that Python refuses to print
        return f"a {type(value).__name__}"


def short_text(text: str) -> str:
    """A text within a message, without quotation marks: on one line, and cut where it is long."""
    return repr(text[:LONGEST])[1:-1] + ("..." if len(text) > LONGEST else "")


_LONG_QUOTATION = re.compile(r"'([^']{60})[^']{60,}'")


def shorten_quotations(message: str) -> str:
    """A message whose long quotations are cut."""
    return _LONG_QUOTATION.sub(r"'\1...'", message)


def join_names(names: Iterable[str], most: int = 20) -> str:
    """The names with commas between them, the first ones if there are many."""
    found = [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in names]
    return ", ".join(found[:most]) + (f", ... ({len(found)} in all)" if len(found) > most else "") or "none"


def suggest_names(name: str, known: Iterable[str]) -> str:
    """The known names, with the one that was probably meant in front."""
    names = list(known)
    # Comparing takes the product of the two lengths.
    short = [other for other in names if len(other) <= LONGEST][:500]
    near = difflib.get_close_matches(name, short, n=1) if len(name) <= LONGEST else []
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return f"{meant}Known names: {join_names(names)}."
