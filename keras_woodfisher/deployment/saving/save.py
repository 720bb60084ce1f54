"""Saves a model as a stock `.keras` file that takes the bytes of what isn't zero."""

import os
import re
from pathlib import Path
from typing import Any

import keras
from keras_woodfisher_backends.keras_internals.saving import may_overwrite

from keras_woodfisher.deployment.saving.archive import deflate
from keras_woodfisher.deployment.whole_files import beside, move

_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_INSTEAD = {
    ".weights.h5": "model.save_weights(filepath) writes weights alone, with max_shard_size= in parts",
    ".weights.json": "model.save_weights(filepath, max_shard_size=...) writes weights alone in parts",
    ".h5": "model.save(filepath) writes the older format, which has no compression",
    ".hdf5": "model.save(filepath) writes the older format, which has no compression",
}


def save(model: keras.Model, filepath: str | os.PathLike[str], overwrite: bool = True) -> None:
    """Saves a model as `model.save` does, deflated: zeros take next to no bytes.

    The file is a stock `.keras` file: `keras.models.load_model` reads it without this package, to the same bits of
    weights and optimizer state. It is written whole or not at all; a file that is there stays until the new one is
    done. While `fit` prunes, what this package keeps in the optimizer is left out, as with `model.save`.

        >>> report = kw.prune(model, sparsity=0.5, method="magnitude", verbose=0)
        >>> kw.save(model, "pruned.keras")
        >>> np.array_equal(keras.models.load_model("pruned.keras").predict(x, verbose=0), model.predict(x, verbose=0))
        True

    Meanwhile the uncompressed file lies beside it, too. `model.load_weights` reads a large `.keras` file slowly, a
    compressed one more so (for 240 MB 92 s instead of 11 s, where `load_model` took 7 s instead of 4 s); for that,
    `model.save_weights` is meant.

    Args:
        model: Any Keras model, pruned by whatever means.
        filepath: Where to write, ending in `.keras`, on this machine.
        overwrite: Whether a file that is there is overwritten without asking; with False, the question is Keras's own.

    Raises:
        TypeError: If the model isn't a Keras model, or the path isn't one.
        ValueError: If the path doesn't end in `.keras`, or is that of another machine.
        FileExistsError: If a folder is there, or something is that mayn't be overwritten, and nobody can be asked.
        FileNotFoundError, NotADirectoryError, PermissionError: If there is no such folder, or it can't be written to.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"save takes a Keras model, got {type(model).__name__}.")
    target = _target(filepath)
    if target.exists() and not overwrite and not may_overwrite(str(filepath)):
        return
    with beside(target) as folder:
        stock, small = folder / "stock.keras", folder / target.name
        model.save(stock)
        deflate(stock, small)
        move(small, target)


def _target(filepath: Any) -> Path:
    """The file to write; what a link leads to, as Keras would write through it."""
    if not isinstance(filepath, (str, os.PathLike)) or not isinstance(os.fspath(filepath), str):
        raise TypeError(
            f"filepath must be a text or a pathlib.Path that ends in .keras, got {type(filepath).__name__}. "
            "For an open file: save to a path, and copy its bytes."
        )
    path = os.fspath(filepath)
    if _REMOTE.match(path):
        raise ValueError(
            f"save writes to this machine, got filepath={path}. Save to a path here, and copy the file there; "
            "model.save(filepath) writes to such places without compression."
        )
    if not path.endswith(".keras"):
        instead = next((f" {text}." for ending, text in _INSTEAD.items() if path.endswith(ending)), "")
        raise ValueError(f"filepath must end in .keras, the format that save compresses, got filepath={path}.{instead}")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise FileExistsError(f"{path} is a folder. Name a file in it, or remove it first.")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{path} is no ordinary file. Give another name.")
    if not target.parent.exists():
        raise FileNotFoundError(f"The folder {target.parent} of {target.name} doesn't exist. Create it first.")
    if not target.parent.is_dir():
        raise NotADirectoryError(f"{target.parent} isn't a folder, so {target.name} can't be written there.")
    return target
