"""What an unquoted word of YAML 1.2 (core schema) stands for."""

import math
import re
from typing import Any

from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.wording import shown

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
