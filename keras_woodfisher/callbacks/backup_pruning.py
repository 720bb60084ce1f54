"""A callback that keeps what a training run knows beside the model's own file."""

import os
import re
from pathlib import Path
from typing import Any

from keras.callbacks import BackupAndRestore, ModelCheckpoint
from keras_woodfisher_backends.keras_internals.training import callbacks_beside

from keras_woodfisher.callbacks.resuming import KEPT, ResumableCallback
from keras_woodfisher.callbacks.saved_states import StateFolder
from keras_woodfisher.options.checks import count


class BackupPruning(ResumableCallback):
    """Keeps in a folder what the callbacks of this package know, so that training can go on exactly.

    For training that goes on with a model that was loaded (`fit(..., initial_epoch=...)`). Beside
    `keras.callbacks.BackupAndRestore` it isn't needed. What is kept are masks, buffered gradients, where ramps began,
    which updates are done, and the optimizer's state of variables that it didn't know when the model was compiled. A
    file is written at the end of each epoch and of training, as a whole or not at all. When training goes on, the one
    is used that was written when the model had the weights that it has now, and its optimizer had done as many steps.

    It stands behind the other callbacks of this package in the list, and before those that save the model.

        >>> pruner = kw.WoodFisherPruning(0.5, end_epoch=2, num_grads=4, total_epochs=2, verbose=0)
        >>> history = model.fit(x, y, epochs=1, callbacks=[pruner, kw.BackupPruning("states")], verbose=0)
        >>> model.save("model.keras")
        >>> # In another process:
        >>> model = keras.models.load_model("model.keras")
        >>> pruner = kw.WoodFisherPruning(0.5, end_epoch=2, num_grads=4, total_epochs=2, verbose=0)
        >>> backup = kw.BackupPruning("states")
        >>> history = model.fit(x, y, epochs=2, initial_epoch=1, callbacks=[pruner, backup], verbose=0)
        >>> history.history["sparsity"]
        [0.5]

    Args:
        folder: A folder of one training run.
        keep: How many states are kept, the latest ones; None for all. Those with buffered gradients take 4 bytes for
            each of `num_grads` times the number of prunable weights.

    Raises:
        ValueError, TypeError: If an argument is wrong; before the first batch, if it stands at a wrong place in the
            list; when training goes on, if the folder has states, but none of this model and these callbacks, or if it
            begins at an epoch that is done (a training that is over may begin anew at epoch 0).
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int | None = KEPT):
        super().__init__()
        path = os.fspath(folder)
        if not path or re.match(r"\w+://", path):
            raise ValueError(f"folder must be a folder of this machine, got {path!r}.")
        self._keep = None if keep is None else count("keep", keep)
        self._folder = StateFolder(Path(path), self._keep)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for `from_config`."""
        return {"folder": str(self._folder.path), "keep": self._keep}

    @property
    def folder(self) -> StateFolder:
        return self._folder

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        before, after = callbacks_beside(self)
        wrong = [c for c in after if isinstance(c, ResumableCallback) and not isinstance(c, BackupPruning)]
        wrong += [c for c in before if isinstance(c, (BackupAndRestore, ModelCheckpoint))]
        if wrong:
            raise ValueError(
                f"BackupPruning and {type(wrong[0]).__name__} stand in the wrong order in the list of callbacks: what "
                "is saved wouldn't fit the model's file. Put BackupPruning behind the other callbacks of this package, "
                "and before those that save the model."
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.resuming is not None:
            self.resuming.save(self._folder)
