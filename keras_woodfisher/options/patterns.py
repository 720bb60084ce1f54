"""`re:` patterns, which stand for every name that they match from its start: checked when given, bounded in time.

Whether a pattern is valid is said by Python's `re`; the package `regex` then matches it, since it can be stopped.
"""

import math
import re
from functools import lru_cache

import regex

PATTERN = "re:"
LONGEST = 4000
MOST_COPIES = 1000
"""`x{5}` is compiled to five copies of `x`, and `(x{5}){5}` to 25."""
SECONDS = 0.5
"""For one name; ordinary patterns take some microseconds."""

_VERBOSE = re.compile(r"(?<!\\)\(\?[a-zA-Z]*x")


def check_pattern(item: str, place: str = "") -> None:
    """Checks an item that begins with `re:`; other items are names, which may be anything.

    Raises:
        ValueError: If it isn't a regular expression, or too large a one; `place` says where, as ` in params`.
    """
    if not item.startswith(PATTERN):
        return
    pattern = item.removeprefix(PATTERN)
    if len(pattern) > LONGEST:
        raise ValueError(
            f"The pattern {item[:60]!r}{place} has {len(pattern)} characters, of {LONGEST} allowed. List the names."
        )
    if _VERBOSE.search(pattern):
        # `re` and `regex` read its counts differently.
        raise ValueError(f"The pattern {item[:60]!r}{place} has the flag x, which isn't supported. Leave it out.")
    # Every count is taken as if it stood within all others.
    if math.prod(max(1, int(least)) for least in re.findall(r"\{(\d+)", pattern)) > MOST_COPIES:
        raise ValueError(
            f"The pattern {item[:60]!r}{place} repeats too often: its counts in braces may be up to {MOST_COPIES}, "
            "multiplied with each other. Write it with smaller ones, or list the names."
        )
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"The pattern {item[:60]!r}{place} isn't a regular expression: {error}.") from None


def matches_pattern(item: str, name: str, start: int = 0, *, ignore_case: bool = False) -> bool:
    """Whether a pattern matches a name from a place in it (ValueError if it isn't valid, or takes too long)."""
    try:
        return _compiled(item, ignore_case).match(name, start, timeout=SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"The pattern {item[:60]!r} takes too long to match on {name[:60]!r}: repetitions (*, +, {{n,}}) that "
            "contain or follow repetitions or alternatives multiply the ways to try. Write it with fewer, or list the "
            "names."
        ) from None


@lru_cache
def _compiled(item: str, ignore_case: bool) -> regex.Pattern[str]:
    check_pattern(item)
    return regex.compile(item.removeprefix(PATTERN), regex.IGNORECASE if ignore_case else 0)
