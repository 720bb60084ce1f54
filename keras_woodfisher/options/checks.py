"""Checks of single values that users give, each with an error that names the value, the rule and the mend."""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from keras_woodfisher.options.patterns import check_pattern

LARGEST_FLOAT32 = 3.4e38

_LONG, _SHORT = 200, 30


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    mend: str = "",
) -> float:
    """Checks a real number and its range (TypeError if it isn't one, ValueError if it is out of range)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}. {mend}".rstrip())
    value = float(value)
    rules = (("above", operator.gt, above), ("at least", operator.ge, least), ("below", operator.lt, below))
    given = [(f"{word} {bound:g}", holds(value, bound)) for word, holds, bound in rules if bound is not None]
    if not math.isfinite(value) or not all(ok for _, ok in given):
        wanted = " and ".join(text for text, _ in given) or "finite"
        raise ValueError(f"{name} must be {wanted}, got {value:g}. {mend}".rstrip())
    return value


def finite_float32(name: str, value: Any, **bounds: Any) -> float:
    """Checks a number as `number` does, and that float32, in which an optimizer will have it, can hold it."""
    value = number(name, value, **bounds)
    return value if value < LARGEST_FLOAT32 else number(name, value, below=LARGEST_FLOAT32)


def number_mend(text: Any) -> str:
    """How to write the number that a text was meant to be, or "".

    >>> number_mend("80%"), number_mend("0,8"), number_mend("0.8"), number_mend("much")
    ('Write 0.8 for 80 %.', 'Write 0.8.', 'Write it without quotation marks.', '')
    >>> number_mend("4/5"), number_mend("8_000")
    ('Write 0.8.', 'Write 8000.')
    """
    if not isinstance(text, str) or len(text) >= _SHORT:
        return ""
    if found := re.fullmatch(r"\s*(\d+)\s*/\s*(\d*[1-9]\d*)\s*", text):
        return f"Write {float(found[1]) / float(found[2]):g}."
    found = re.fullmatch(r"\s*(\d+(?:[.,]\d+)?|\d{1,3}(?:_\d{3})+)\s*(%?)\s*", text)
    if found is None:
        return ""
    value = float(found[1].replace(",", ".").replace("_", ""))
    if found[2]:
        return f"Write {value / 100:g} for {value:g} %."
    # Digits of other scripts, too.
    return "Write it without quotation marks." if re.fullmatch(r"\s*[0-9.]+\s*", text) else f"Write {value:.12g}."


def truth_mend(text: Any) -> str:
    """How to write the truth value that a text was meant to be, or "".

    >>> truth_mend("yes"), truth_mend("off"), truth_mend("True"), truth_mend("perhaps")
    ('Write true.', 'Write false.', 'Write it without quotation marks.', '')
    """
    word = text.strip().lower() if isinstance(text, str) else ""
    if word in ("true", "false"):
        return "Write it without quotation marks."
    return "Write true." if word in ("yes", "on", "y") else "Write false." if word in ("no", "off", "n") else ""


def fraction(name: str, value: Any) -> float:
    """Checks a sparsity (TypeError if it isn't a number, ValueError if it isn't in [0, 1))."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a fraction in [0, 1), got {value!r}. {number_mend(value)}".rstrip())
    value = float(value)
    if not 0.0 <= value < 1.0:
        mend = f" write {value / 100:g} for {value:g} %." if 1.0 < value < 100.0 else ""
        raise ValueError(
            f"{name} must lie in [0, 1), got {value:g}. Sparsity is the fraction of zeros{':' + mend if mend else '.'}"
        )
    return value


def count(name: str, value: Any, mend: str = "", least: int = 1) -> int:
    """Checks a whole number (TypeError if it isn't one, ValueError if it is below `least`)."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}. {mend}".rstrip())
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}. {mend}".rstrip())
    return int(value)


def flag(name: str, value: Any) -> bool:
    """Checks a bool (TypeError if it isn't one)."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return value


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Checks a choice (ValueError if it isn't among `choices`)."""
    if isinstance(value, bool) or value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}.")
    return value


def names(name: str, value: Any) -> str | tuple[str, ...]:
    """Checks a name or a sequence of names; None means none.

    Raises:
        TypeError: If something else than strings is found.
        ValueError: If a pattern isn't a regular expression.
    """
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Sequence) or not all(isinstance(item, str) for item in listed):
        raise TypeError(f"{name} must be a name or a list of names, got {_shown(value)}.")
    for item in listed:
        check_pattern(item, f" in {name}")
    return value if isinstance(value, str) else tuple(value)


def _shown(value: Any) -> str:
    """A value as messages tell it: of a variable its path, which is the name to give."""
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if hasattr(item, "path") and hasattr(item, "assign"):
            return f"the variable {item.path} itself. Give its name: {item.path!r}"
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def by_number(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """A mapping with numbers as keys, which JSON writes as strings (ValueError if two are the same number)."""
    found: dict[Any, Any] = {}
    for key, item in value.items():
        number = _as_number(key)
        if number in found:
            raise ValueError(f"The keys {key!r} and {number!r} are the same number. Keep one of them.")
        found[number] = item
    return found


def _as_number(key: Any) -> Any:
    try:
        return float(key) if isinstance(key, str) else key
    except ValueError:
        return key


def checked_num_grads(value: Any) -> int | Mapping[float, int]:
    """Checks a number of samples, or `{sparsity: count}` (TypeError or ValueError if it is neither)."""
    if not isinstance(value, Mapping):
        return count("num_grads", value)
    parsed = {
        fraction("a key of num_grads", key): count("a value of num_grads", samples)
        for key, samples in by_number(value).items()
    }
    if 0.0 not in parsed:
        raise ValueError(f"num_grads as a dictionary needs the key 0.0 (the count to begin with), got {value!r}.")
    return dict(sorted(parsed.items()))


def as_json(value: Any) -> Any:
    """An option as JSON has it, and as the user's own copy: lists for tuples."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value
