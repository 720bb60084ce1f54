"""Patterns from strangers: regular expressions whose matching takes bounded time."""

import math
import re
from re import _parser  # type: ignore[attr-defined]  # what `re` itself parses with
from typing import Any

from keras_woodfisher.checks import PATTERN

MOST_REPEATS = 5
"""So many parts of a pattern may be of varying length; each multiplies the time by about the length of a name."""

_NAME = 64
"""Characters of a long name."""

_CHOICE = math.log(2.0, _NAME)
"""A choice between two, as a part of a part of varying length."""


def checked_pattern(item: str) -> str:
    """A name, or a pattern that can't take long on any name.

    A pattern that doesn't match is tried in every way that its parts may share the name. Repetitions within a
    repetition make those ways exponential in the length of the name (`(.+)+`), and several after each other a power
    of it.

    Raises:
        ValueError: If it could take long, or isn't a regular expression.
    """
    if not item.startswith(PATTERN):
        return item
    try:
        repeats = _repeats(_parser.parse(item.removeprefix(PATTERN)))
    except re.error as error:
        raise ValueError(f"The pattern {item[:60]!r} isn't a regular expression: {error}.") from None
    except (RecursionError, OverflowError):
        repeats = math.inf
    if repeats > MOST_REPEATS:
        raise ValueError(
            f"The pattern {item[:60]!r} could take very long: repetitions (*, +, {{n,}}) must not contain repetitions "
            f"or alternatives, and there may be {MOST_REPEATS} of them. Write it with fewer, or list the names."
        )
    return item


def _repeats(parsed: Any) -> float:
    """Parts of varying length, what is repeated as often as a name has room for it; alternatives count a little."""
    found = 0.0
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            times = min(int(most), _NAME // max(1, body.getwidth()[0]))
            found += min(1.0, _CHOICE * (int(most) - least)) + times * _repeats(body)
        elif name == "BRANCH":
            branches = argument[1]
            found += math.log(max(1, len(branches)), _NAME) + max(map(_repeats, branches), default=0.0)
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP", "GROUPREF_EXISTS"):
            parts = argument if isinstance(argument, tuple) else (argument,)
            found += sum(_repeats(part) for part in parts if isinstance(part, _parser.SubPattern))
    return found
