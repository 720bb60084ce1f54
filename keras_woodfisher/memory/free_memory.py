"""Memory as people write it, and how much of it is free."""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import psutil

from keras_woodfisher.memory.limits import PROC, Limit, limits
from keras_woodfisher.options.sizes import size_text

SHARE = 0.25
"""The share of the free memory that is used where no limit is given (the rule of the recipes' tutorial)."""


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


def tightest_limit(proc: Path = PROC) -> Limit:
    """What this process may still take, and what it is that allows no more: the host's free memory, or a limit.

    Args:
        proc: Where Linux tells about the process.
    """
    return min([Limit(psutil.virtual_memory().available, ""), *limits(proc)])


def free_memory(proc: Path = PROC) -> int:
    """Bytes that this process may still take."""
    return tightest_limit(proc).free


def give_back_memory(to_system: bool = True) -> None:
    """Frees what nothing uses any more, and gives it back to the system, where it would stay with the C library.

    Frameworks' functions on nested structures leave young cycles of references to tensors.

    Args:
        to_system: Whether the system gets it. What is taken from there again costs time.
    """
    gc.collect(1)
    if not to_system:
        return
    # Only glibc has it, and only it needs it.
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
