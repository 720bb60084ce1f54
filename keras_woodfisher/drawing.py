"""The only use of matplotlib, which is optional."""

from typing import Any


def new_axes(size: tuple[float, float]) -> Any:
    """The `Axes` of a new figure of so many inches."""
    return load_pyplot().subplots(figsize=size, layout="constrained")[1]


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
