"""Patterns from strangers: regular expressions whose matching takes bounded time."""

import re
from re import _parser  # type: ignore[attr-defined]  # what `re` itself parses with
from typing import Any

from keras_woodfisher.options import PATTERN

MOST_REPEATS = 6
"""So many parts of a pattern may be of any length; each multiplies the time by the length of a name."""

_LONG = 20
"""From so many repetitions on, a part counts as one of any length."""


def checked_pattern(item: str) -> str:
    """A name, or a pattern that can't take long on any name.

    A repetition within a repetition takes time that is exponential in the length of the name (`(.+)+`), and several
    after each other take a power of it.

    Raises:
        ValueError: If it could take long.
    """
    if not item.startswith(PATTERN):
        return item
    try:
        repeats = _repeats(_parser.parse(item.removeprefix(PATTERN)), within=False)
    except re.error:
        return item  # whoever compiles it says what is wrong
    except RecursionError:
        repeats = MOST_REPEATS + 1
    if repeats > MOST_REPEATS:
        raise ValueError(
            f"The pattern {item[:60]!r} could take very long: repetitions (*, +, {{n,}}) must not contain repetitions, "
            f"and there may be {MOST_REPEATS} of them. Write it with fewer, or list the names."
        )
    return item


def _repeats(parsed: Any, within: bool) -> int:
    """Parts of any length, those in alternatives included; more than are allowed if one contains another."""
    found = 0
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            open_ended = most - least >= _LONG if isinstance(most, int) else True
            if open_ended and within:
                return MOST_REPEATS + 1
            found += (1 if open_ended else 0) + _repeats(body, within or open_ended)
        elif name == "BRANCH":
            found += sum(_repeats(branch, within) for branch in argument[1])
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP", "GROUPREF_EXISTS"):
            parts = argument if isinstance(argument, tuple) else (argument,)
            found += sum(_repeats(part, within) for part in parts if isinstance(part, _parser.SubPattern))
    return found
