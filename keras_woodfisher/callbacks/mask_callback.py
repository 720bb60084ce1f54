"""What the callbacks that hold zeros, `KeepZeros` and `WoodFisherPruning`, have in common."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.keras_internals.optimizers import is_for_torch_alone
from keras_woodfisher_backends.keras_internals.training import (
    callbacks_beside,
    keep_edits,
    keeps_state_elsewhere,
    leaving_nothing,
    model_of,
    refresh,
)
from keras_woodfisher_backends.ranks.digests import digest_of
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.callbacks.callback_list import warn
from keras_woodfisher.callbacks.mask_constraint import WeightMasks
from keras_woodfisher.callbacks.progress import Progress
from keras_woodfisher.callbacks.resuming import ResumableCallback
from keras_woodfisher.model.optimizer_variables import check_compiled, steps_of
from keras_woodfisher.options.checks import count
from keras_woodfisher.pruning.agreement import weights_of

_REMOVED = (
    "The masks of {} were removed before its training had ended: a `fit` of the same model, or another callback that "
    "holds zeros in it, began meanwhile. Give the callbacks to that `fit`, or all of them to one "
    "keras.callbacks.CallbackList; or call on_train_end first."
)


class MaskCallback(ResumableCallback):
    """Attaches masks when training begins, fills them before the first batch, and lets go at the end.

    Args:
        total_epochs: Epochs of the whole training, where a `fit` is only a part of it.
    """

    def __init__(self, total_epochs: int | None = None) -> None:
        super().__init__()
        self._total_epochs = None if total_epochs is None else count("total_epochs", total_epochs)
        self.weight_masks: WeightMasks | None = None
        self._started = False
        self._released = False
        self._warned = False
        self._drifted = False
        self._steps_before = 0

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._progress = Progress(self.params, self._total_epochs)
        model = self.model
        self._let_go()
        self._started = self._released = self._warned = False
        with self._leaving_nothing("beginning"):
            check_trainable_here(model)
            self._steps_before = steps_of(model)
            length = {"steps_per_epoch": str(self._progress.steps), "epochs": str(self._progress.epochs)}
            current_ranks().check_same_words(length)
            self.weight_masks = self._prepare(model)
            current_ranks().check_same_words({type(self).__name__: repr(self.identity())})
            before, after = callbacks_beside(self)
            others = [c.weight_masks for c in [*before, *after] if isinstance(c, MaskCallback)]
            self.weight_masks.attach([masks for masks in others if masks is not None])

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._progress.begin_epoch(epoch)
        self._check_masks()
        if self._started or self.weight_masks is None:
            return
        # Only now: a BackupAndRestore further down the list has restored its weights by then.
        self._started = True
        refresh(self)
        with self._leaving_nothing("first epoch"):
            super().on_epoch_begin(epoch, logs)
            if self._known is None and epoch == 0:
                self.weight_masks.hold(self._start(epoch))
            elif self._known is None:
                # An earlier run has held them.
                self.weight_masks.go_on(self._start(epoch))
            else:
                self._released = bool(self._known["released"])
                self.weight_masks.go_on(unpacked(self._known["masks"], self.weight_masks.shapes))
                self._go_on(self._known)
            self.weight_masks.apply()
            self._compare()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._check_masks()
        # A loop of the user's own may not tell of epochs.
        if not self._started:
            self.on_epoch_begin(0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._progress.end_batch(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._check_masks()
        if self.weight_masks is not None and self._started and not self._released:
            with self._leaving_nothing("end of an epoch"):
                self._check_state()
                self._apply_again(self.weight_masks)
                self._warn_of_drift()
        self._progress.end_epoch(self._stopped)

    @property
    def _stopped(self) -> bool:
        return bool(model_of(self).stop_training)

    def _check_masks(self) -> None:
        """Refuses to go on without masks, which a `fit` or another callback of the same model has removed.

        Raises:
            ValueError: If that was the case.
        """
        if self.weight_masks is not None and not self.weight_masks.are_attached:
            self._let_go()
            raise ValueError(_REMOVED.format(type(self).__name__))

    def _check_state(self) -> None:
        """Brings variables up to date, and refuses a loop that trains in a state beside them, as one on JAX may.

        Raises:
            ValueError: If that isn't put back before callbacks are called, or masks are put back with it.
        """
        model = refresh(self)
        if self.weight_masks is None or not self._progress.batches or not keeps_state_elsewhere(model):
            return
        if steps_of(model) == self._steps_before or self.weight_masks.are_overwritten():
            raise ValueError(
                f"{type(self).__name__} reads and writes the model's variables, and this loop trains in a state of its "
                "own. Put the state into the variables of the model and its optimizer before each call of a callback, "
                "and take it from there after it, beginning with on_train_begin; or train with fit or train_on_batch."
            )

    def _apply_again(self, weight_masks: WeightMasks) -> None:
        refresh(self)
        changed = weight_masks.apply()
        if changed:
            keep_edits(model_of(self))
        if changed and not self._warned:
            self._warned = True
            warn(
                f"Pruned weights of {', '.join(changed)} were changed during this epoch by something other than the "
                "model's optimizer, whose steps keep them at zero. They are zero again now, and will be at the end of "
                "each epoch, but not in between. Let a custom train_step change weights by optimizer.apply; where "
                "another model or optimizer trains these variables, too, hold their zeros there as well (KeepZeros)."
            )

    def on_train_end(self, logs: Any = None) -> None:
        if self.weight_masks is None:
            return
        if not self.weight_masks.are_attached:
            warn(_REMOVED.format(type(self).__name__))
            self._let_go()
            return
        refresh(self)
        if not self._released:
            # Averages (use_ema) or restored weights may have replaced the masked ones.
            self.weight_masks.apply()
        super().on_train_end(logs)
        self._let_go()

    def identity(self) -> dict[str, Any]:
        shapes = [] if self.weight_masks is None else self.weight_masks.shapes
        return {"variables": [list(shape) for shape in shapes]}

    def knowledge(self) -> dict[str, np.ndarray]:
        masks = [] if self.weight_masks is None else self.weight_masks.pruned()
        return {"masks": packed(masks), "released": np.array(self._released)}

    def _compare(self) -> None:
        """Refuses masks that differ between processes that train together: a ValueError on all."""
        assert self.weight_masks is not None
        current_ranks().check_same(zeros=digest_of(packed(self.weight_masks.pruned())))

    def _warn_of_drift(self) -> None:
        ranks = current_ranks()
        if self._drifted or not ranks.differ(digest_of(*weights_of(model_of(self)))):
            return
        self._drifted = True
        warn(
            "The weights of the processes that train together differ since this epoch: their engine doesn't average "
            "all gradients. Where weights were frozen or thawed, DistributedDataParallel has to wrap the model anew."
        )

    @contextmanager
    def _leaving_nothing(self, what: str) -> Iterator[None]:
        """See `leaving_nothing`; after a failure the callback knows, too. All processes that train together do this.

        Args:
            what: The same on all of them.
        """
        with current_ranks().together(f"{type(self).__name__}, {what}"), leaving_nothing(self):
            try:
                yield
            except BaseException:
                refresh(self)
                self._let_go()
                raise

    def _let_go(self) -> None:
        """Takes everything out of the model and its optimizer; the variables must be up to date."""
        if self.weight_masks is not None:
            self.weight_masks.detach()
            self.weight_masks = None

    def _prepare(self, model: keras.Model) -> WeightMasks:
        """Checks everything that can be checked; gives masks for the variables to hold, which aren't attached yet."""
        raise NotImplementedError

    def _start(self, epoch: int) -> list[np.ndarray]:
        """The zeros to hold from the first batch on, each in its variable's shape."""
        raise NotImplementedError

    def _go_on(self, known: Mapping[str, np.ndarray]) -> None:
        """Takes over what an earlier run knew, instead of `_start`."""


def packed(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Masks of any shapes, eight weights a byte."""
    return np.packbits(np.concatenate([mask.reshape(-1) for mask in masks]))


def unpacked(bits: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """The inverse of `packed`."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    parts = np.split(np.unpackbits(bits, count=sum(sizes)).astype(bool), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def check_trainable_here(model: keras.Model) -> None:
    """Refuses a model whose training a pruning callback can't follow.

    Raises:
        ValueError: If it isn't compiled with an optimizer of this backend, or is trained by several processes, or by a
            strategy that isn't followed.
    """
    check_compiled(model, "a pruning callback")
    check_optimizer(model)
    if engine := get_backend(keras.backend.backend()).unfollowed(model):
        raise ValueError(
            f"Pruning while training with {engine} isn't supported. Train with torch's DistributedDataParallel, "
            "tf.distribute.MirroredStrategy or keras.distribution, or on one device; or prune in one shot with "
            "keras_woodfisher.prune."
        )


def check_optimizer(model: keras.Model) -> None:
    """Refuses an optimizer that would fail in the first step.

    Raises:
        ValueError: If it is torch's, as Keras writes it into a file saved there, and Keras runs on another backend.
    """
    here = keras.backend.backend()
    for optimizer in (model.optimizer, getattr(model.optimizer, "inner_optimizer", None)):
        kind = type(optimizer)
        if here != "torch" and is_for_torch_alone(kind.__module__):
            raise ValueError(
                f"The model's optimizer is torch's own {kind.__name__}, as in a file saved on torch, and can't "
                f"train on {here}. Compile the model again: model.compile(keras.optimizers.{kind.__name__}(...), ...)."
            )
