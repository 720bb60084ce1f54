"""Whether the gradients fit, known before any is taken."""

from pathlib import Path

import psutil

SHARE = 0.25
"""The gradients' share of the free memory (the rule of the recipes' tutorial)."""


def check_memory(rows: int, columns: int, copies: int = 1, free: int | None = None) -> None:
    """Refuses gradients that would take more than their share of the free memory.

    Args:
        rows: Gradient samples (m).
        columns: Weights (d).
        copies: How many times they are held.
        free: Free bytes where they are held; by default the host's.

    Raises:
        MemoryError: With the number of gradients that would fit.
    """
    free = free_memory() if free is None else free
    row = 4 * columns * copies
    if rows * row > SHARE * free:
        fitting = int(SHARE * free // row)
        mend = f"num_grads={fitting} would fit; " if fitting else ""
        raise MemoryError(
            f"num_grads={rows} takes {_text(rows * row)} for {columns:,} weights (float32"
            f"{', twice' if copies == 2 else ''}), but gradients may use a quarter of the free memory: "
            f"{_text(SHARE * free)} of {_text(free)}. {mend}params or exclude choose fewer weights."
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


def _text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
