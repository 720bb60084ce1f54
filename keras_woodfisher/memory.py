"""Whether the gradients fit, known before any is taken."""

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
    free = psutil.virtual_memory().available if free is None else free
    row = 4 * columns * copies
    if rows * row > SHARE * free:
        raise MemoryError(
            f"num_grads={rows} takes {_text(rows * row)} for {columns:,} weights (float32"
            f"{', twice' if copies == 2 else ''}), but gradients may use a quarter of the free memory: "
            f"{_text(SHARE * free)} of {_text(free)}. num_grads={int(SHARE * free // row)} would fit; "
            "params or exclude choose fewer weights."
        )


def _text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
