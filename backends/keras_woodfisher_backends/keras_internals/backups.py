"""Private parts of `keras.callbacks.BackupAndRestore`: the moment at which it saves."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

_SAVE = "_save_model"


def before_backups(backup: keras.callbacks.BackupAndRestore, call: Callable[[], None]) -> None:
    """Calls `call` right before each backup, instead of what was to be called before."""
    vars(backup)[_SAVE] = partial(_save, backup, call)


def stock_backups(backup: keras.callbacks.BackupAndRestore) -> None:
    """Makes it the callback that it was."""
    vars(backup).pop(_SAVE, None)


def _save(backup: Any, call: Callable[[], None]) -> None:
    call()
    getattr(type(backup), _SAVE)(backup)
