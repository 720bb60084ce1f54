"""Memory as people write it, and how much of it is free."""

import re
from pathlib import Path
from typing import Any

import psutil

SHARE = 0.25
"""The share of the free memory that is used where no limit is given (the rule of the recipes' tutorial)."""

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
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{name} must be a size, got {value!r}. {rule}")
    size = float(value) if isinstance(value, int) else 0.0
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


def check_device_memory(rows: int, columns: int, device: str, free: int | None, itemsize: int = 4) -> None:
    """Refuses gradients that would take more than their share of what is free on a device.

    Args:
        rows: Gradient samples (m).
        columns: Weights (d).
        device: Its name.
        free: Its free bytes; None where the framework can't tell.
        itemsize: Bytes of one number.

    Raises:
        MemoryError: With the number of gradients that would fit.
    """
    row = itemsize * columns
    if free is not None and rows * row > SHARE * free:
        fitting = int(SHARE * free // row)
        mend = f"num_grads={fitting} would fit; " if fitting else ""
        raise MemoryError(
            f"num_grads={rows} takes {size_text(rows * row)} for {columns:,} weights on {device}, but gradients may "
            f"use a quarter of its free memory: {size_text(SHARE * free)} of {size_text(free)}. {mend}"
            "params or exclude choose fewer weights."
        )


def free_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: what the host has free, or less where a container's limit is tighter.

    Args:
        groups: Where Linux tells the limits of control groups (version 2 or 1).
    """
    free = psutil.virtual_memory().available
    for limit, usage, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            # "max", no number, where there is no limit. Files that are merely cached give way.
            allowed, used = (int((groups / name).read_text()) for name in (limit, usage))
            counters = dict(line.split() for line in (groups / stat).read_text().splitlines())
        except (OSError, ValueError):
            continue
        free = min(free, max(0, allowed - used + int(counters.get(cache, 0))))
    return free
