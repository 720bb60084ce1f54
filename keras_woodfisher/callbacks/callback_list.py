"""The other callbacks of a `fit`: Keras tells a callback nothing of them, though some get in its way."""

import warnings
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from keras.callbacks import EarlyStopping, History, ModelCheckpoint, ProgbarLogger
from keras_woodfisher_backends.keras_internals.training import callers
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.model.targets import Target

_INSIDE = ("keras", "keras_woodfisher", "keras_woodfisher_backends")


def warn(message: str) -> None:
    """A warning that points at the user's call of `fit` rather than into Keras or this package.

    Of several processes that train together, the first one warns.
    """
    if not current_ranks().first:
        return
    names = (frame.f_globals.get("__name__", "") for frame in callers())
    inside = takewhile(lambda name: name.partition(".")[0] in _INSIDE, names)
    warnings.warn(message, stacklevel=2 + sum(1 for _ in inside))


def warn_of_dead(targets: Sequence[Target], zeros: Sequence[np.ndarray]) -> None:
    """Warns of variables that are held at zero as a whole: nothing in them tells pruning from beginning.

    Args:
        targets: The variables.
        zeros: The weights of each that are held, bool.
    """
    dead = [target.name for target, here in zip(targets, zeros, strict=True) if here.all()]
    if dead:
        warn(
            f"All weights of {', '.join(dead)} are zero, and others of the model are sparse, or these are named: they "
            "count as pruned, and stay zero. If they aren't trained yet, put them in `exclude`."
        )


def warn_about_others(beside: tuple[list[Any], list[Any]], end: float, final_epoch: int) -> None:
    """Warns of an order, or of other callbacks, by which the outcome may be less sparse than wanted.

    Args:
        beside: From `callbacks_beside`.
        end: Position of its last update.
        final_epoch: Index of the first epoch at whose end the final sparsity is reached.
    """
    before, after = beside
    # Callbacks of this package, with that attribute, don't look at the sparsity.
    unknown = [
        c for c in before if not isinstance(c, (History, ProgbarLogger)) and not hasattr(c, "may_come_before_pruning")
    ]
    if unknown:
        warn(
            f"{type(unknown[0]).__name__} comes before WoodFisherPruning in the list of callbacks, so it doesn't "
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
