"""The only use of matplotlib, which is optional."""

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
