"""Memory as people write it."""

import re
from numbers import Integral
from typing import Any

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for kind, base in (("IB", 1024), ("B", 1000))
}


def parse_bytes(name: str, value: Any) -> int:
    """Bytes, from a number or a text with a unit.

    >>> parse_bytes("memory_limit", "1.5 GiB"), parse_bytes("memory_limit", "20MB"), parse_bytes("memory_limit", 7)
    (1610612736, 20000000, 7)

    Raises:
        TypeError: If it is neither a whole number nor a text.
        ValueError: If the text isn't a size, or nothing is left of it.
    """
    rule = 'Give bytes, or a text such as "4GiB" or "500 MB".'
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not (whole or isinstance(value, str)):
        raise TypeError(f"{name} must be a size, got {value!r}. {rule}")
    size = float(value) if whole else 0.0
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if found is None or found[2].upper() not in _UNITS:
            raise ValueError(f"{name} must be a size, got {value!r}. {rule}")
        size = float(found[1]) * _UNITS[found[2].upper()]
    if size < 1:
        raise ValueError(f"{name} must be at least one byte, got {value!r}. {rule}")
    return int(size)


def size_text(size: float) -> str:
    """A size for people.

    >>> size_text(3 * 2**30), size_text(2**20)
    ('3.00 GiB', '1.0 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
