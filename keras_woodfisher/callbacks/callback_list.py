"""The other callbacks of a `fit`: Keras tells a callback nothing of them, though some get in its way."""

import sys
import warnings
from types import FrameType
from typing import Any

import keras
from keras.callbacks import EarlyStopping, History, ModelCheckpoint, ProgbarLogger

_INSIDE = ("keras", "keras_woodfisher")


MAY_COME_FIRST = "may_come_before_pruning"
"""An attribute of callbacks that don't look at the sparsity."""


def callbacks_beside(callback: keras.callbacks.Callback) -> tuple[list[Any], list[Any]]:
    """The callbacks before and after one in its list, while the list is calling it.

    Keras tells a callback nothing of the others; the list that calls it is found on the stack.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList) and callback in caller.callbacks:
            place = caller.callbacks.index(callback)
            return caller.callbacks[:place], caller.callbacks[place + 1 :]
        frame = frame.f_back
    return [], []


def warn(message: str) -> None:
    """A warning that points at the user's call of `fit` rather than into Keras or this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


def warn_about_neighbours(beside: tuple[list[Any], list[Any]], end: float, final_epoch: int) -> None:
    """Warns of an order, or of other callbacks, by which the outcome may be less sparse than wanted.

    Args:
        beside: From `callbacks_beside`.
        end: Position of its last update.
        final_epoch: Index of the first epoch at whose end the final sparsity is reached.
    """
    before, after = beside
    strangers = [c for c in before if not isinstance(c, (History, ProgbarLogger)) and not hasattr(c, MAY_COME_FIRST)]
    if strangers:
        warn(
            f"{type(strangers[0]).__name__} comes before WoodFisherPruning in the list of callbacks, so it doesn't "
            "see the sparsity, nor the last update. Put WoodFisherPruning first."
        )
    for other in [*before, *after]:
        if isinstance(other, EarlyStopping) and other.restore_best_weights and other.start_from_epoch < final_epoch:
            warn(
                f"EarlyStopping(restore_best_weights=True) may bring back weights from before end_epoch={end:g}, "
                f"which are less sparse. Set start_from_epoch={final_epoch}."
            )
        if isinstance(other, ModelCheckpoint) and other.save_best_only and final_epoch > 0:
            warn(
                f"ModelCheckpoint(save_best_only=True) may keep weights from before end_epoch={end:g}, which are "
                "less sparse. Save each epoch, or fine-tune in a second fit with KeepZeros and save the best there."
            )
