"""Kinds of values that options take: how each is checked, and how the command line writes it."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keras_woodfisher.options.checks import count, flag, names, number_mend, one_of
from keras_woodfisher.options.mask_types import NAMED, checked_mask
from keras_woodfisher.options.sizes import parse_bytes


def whole_text(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return read


def fraction_text(text: str) -> float:
    """Reads a sparsity."""
    value = _number(text)
    if not 0.0 <= value < 1.0:
        mend = f": write {value / 100:g} for {value:g} %" if 1.0 < value < 100.0 else ""
        raise ArgumentTypeError(f"must be a fraction in [0, 1), got {text}{mend}")
    return value


def positive_text(text: str) -> float:
    """Reads a positive number."""
    value = _number(text)
    if not 0.0 < value < math.inf:
        raise ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        mend = number_mend(text)
        raise ArgumentTypeError(f"must be a number, got {text!r}{f'. {mend}' if mend else ''}") from None


def _size_text(text: str) -> str:
    digits = text.strip("KMGTIBkmgtib ")
    if not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]?i?B)?", text.strip(), re.IGNORECASE) or float(digits) == 0:
        raise ArgumentTypeError(f"must be a size such as 4GiB or 500MB, got {text!r}")
    return text


def _mask_text(text: str) -> str | list[int]:
    if block := re.fullmatch(r"\[?\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*\]?", text):
        return [int(block[1]), int(block[2])]
    try:
        checked_mask(text)
    except ValueError:
        raise ArgumentTypeError(
            f"must be {', '.join(NAMED)}, N:M such as 2:4, or outputs and inputs such as 4,1, got {text!r}"
        ) from None
    return text


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of values.

    Attributes:
        check: Takes the name of an option and a value; returns the value in one form, or raises what is wrong. By
            default whoever takes the option checks it, such as `checked_schedule`, which compares several.
        notation: How the command line reads it, as arguments of argparse's `add_argument`.
        choices: The values, where there are only a few.
        further: More of them, by the only callers that take them.
    """

    check: Callable[[str, Any], Any] = lambda name, value: value
    notation: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[Any, ...] = ()
    further: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def choice(*values: Any, **further: tuple[Any, ...]) -> Kind:
    """One of a few values, and further ones by caller."""
    every = dict.fromkeys(value for more in (values, *further.values()) for value in more)
    return Kind(partial(one_of, choices=tuple(every)), choices=values, further=further)


def _names_as_tuple(name: str, value: Any) -> tuple[str, ...]:
    found = names(name, value)
    return (found,) if isinstance(found, str) else found


def _checked_device(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f'{name} must be "cpu", "disk" or a device, got {value!r}.')
    return value


_SEVERAL_NAMES = {"nargs": "+", "action": "extend", "metavar": "NAME"}
ANYTHING = Kind()
COUNT = Kind(count, {"type": whole_text(1), "metavar": "N"})
COUNT_OR_ZERO = Kind(partial(count, least=0), {"type": whole_text(0), "metavar": "N"})
DEVICE = Kind(_checked_device)
EPOCHS = Kind()
FINAL_SPARSITY = Kind()
FLAG = Kind(flag)
INIT_SPARSITY = Kind()
LEVELS = Kind(notation={"nargs": "+", "type": fraction_text, "metavar": "S"})
MASK = Kind(lambda name, value: checked_mask(value), {"type": _mask_text, "metavar": "MASK"})
NAMES = Kind(_names_as_tuple, _SEVERAL_NAMES)
PARAMS = Kind(names, _SEVERAL_NAMES)
SIZE = Kind(lambda name, value: parse_bytes(name, value) and value, {"type": _size_text, "metavar": "SIZE"})
