"""Tables of plain text, and figures: the only use of matplotlib, which is optional."""

from typing import Any


def axes_of(ax: Any, size: tuple[float, float]) -> Any:
    """The given `Axes`, or without any those of a new figure of so many inches.

    Raises:
        TypeError: If it is something else.
    """
    if ax is None:
        return load_pyplot().subplots(figsize=size, layout="constrained")[1]
    if not hasattr(ax, "set_yscale"):
        raise TypeError(
            f"ax must be an Axes of matplotlib, got {ax!r}. To write a file: plot().figure.savefig('plot.png')."
        )
    return ax


def load_pyplot() -> Any:
    """What draws.

    Raises:
        ImportError: If matplotlib isn't installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib, which isn't installed. Install it with: pip install 'keras-woodfisher[plot]'."
        ) from error
    return pyplot


def aligned(cells: list[tuple[str, ...]], left: int = 2) -> list[str]:
    """Lines of a table, its first `left` columns flush left and the others flush right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
