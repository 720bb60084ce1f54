"""Reads models and recipes; what is wrong with a file is found in its headers, as far as they tell."""

import json
import re
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import keras
from keras_woodfisher_backends.keras_internals.optimizers import is_for_torch_alone

import keras_woodfisher as kw
from keras_woodfisher.cli.paths import check_input
from keras_woodfisher.memory.free_memory import free_memory
from keras_woodfisher.options.sizes import size_text

_SAVE = "Save the model with model.save('model.keras')."
_ANEW = "Save the model anew, or copy the file again."
_HDF5, _CONFIG, _WEIGHTS = b"\x89HDF\r\n\x1a\n", "config.json", "model.weights.h5"
_OWN = re.compile(r"Could not locate (class|function) '([^']+)'")
_LONGEST_CONFIG = 64 * 2**20
_EXPANSION, _SMALL = 200, 64 * 2**20
"""How many times its size a part of a file may unpack to, above so many bytes; `keras_woodfisher.save` keeps below."""


def load_model(path: str, compile: bool = True) -> keras.Model:
    """Loads a `.keras` file in safe mode: no code in the file is run.

    Raises:
        ValueError: If it isn't a `.keras` file, is damaged, or holds code or classes that can't be loaded.
        FileNotFoundError: If there is no such file.
        MemoryError: If the model is too large.
    """
    size, free = check_archive(path), free_memory()
    if size > free:
        raise MemoryError(f"{path} holds {size_text(size)}, but {size_text(free)} of memory are free.")
    try:
        compilation = _foreign_compilation(path) if compile else None
        with _light_compilation():
            model = keras.models.load_model(path, compile=compile and compilation is None, safe_mode=True)
        if compilation is not None:
            model.compile_from_config(compilation)
    except Exception as error:
        if compile and (unknown := _OWN.search(str(error))) and (model := _uncompiled(path)) is not None:
            warnings.warn(
                f"{path} is compiled with the {unknown[1]} {unknown[2]!r} of somebody's own, which this command can't "
                "import: the model is used, and written, without its compilation. Give --loss where one is needed.",
                stacklevel=2,
            )
            return model
        raise _why(path, error) from error
    return model


def _uncompiled(path: str) -> keras.Model | None:
    """The model without its loss and optimizer; None where that can't be loaded either."""
    try:
        with _light_compilation():
            return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception:  # noqa: BLE001 - the first error says more
        return None


def check_archive(path: str) -> int:
    """Looks at the names, sizes and first bytes of what a `.keras` file holds; nothing is unpacked.

    Returns:
        The bytes that it would unpack to.

    Raises:
        ValueError: If it isn't a `.keras` file, or is damaged.
        FileNotFoundError: If there is no such file.
    """
    check_input(path, (".keras",), mend=_SAVE)
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(len(_HDF5))
        found = f"isn't a .keras file (a zip archive). {_SAVE}"
        if start == _HDF5:
            found = "is an HDF5 file, the older format. Rename it to .h5, load it in Python, and save it as .keras."
        if start.startswith(b"PK"):
            found = f"is a part of a .keras file: its end is missing. {_ANEW}"
        raise ValueError(f"{path} {found}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            missing = [name for name in (_CONFIG, _WEIGHTS) if name not in entries]
            if not missing:
                with archive.open(_WEIGHTS) as member:
                    start = member.read(len(_HDF5))
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error or type(error).__name__}). {_ANEW}") from error
    if missing:
        raise ValueError(f"{path} is a zip archive without {' and '.join(missing)}, so it holds no model. {_SAVE}")
    for name, entry in entries.items():
        if entry.file_size > max(_SMALL, _EXPANSION * entry.compress_size):
            raise ValueError(
                f"{path}: {name} would unpack to {size_text(entry.file_size)} from {size_text(entry.compress_size)}, "
                f"as no part of a model does. {_ANEW}"
            )
    if entries[_CONFIG].file_size > _LONGEST_CONFIG:
        raise ValueError(f"{path}: {_CONFIG} has {size_text(entries[_CONFIG].file_size)}, too much for one. {_ANEW}")
    if start != _HDF5:
        raise ValueError(f"{path}: {_WEIGHTS} in it isn't an HDF5 file. {_ANEW}")
    return sum(entry.file_size for entry in entries.values())


def _light_compilation() -> AbstractContextManager[None]:
    """On JAX the initialisers, whose values are replaced by those in the file, take seconds to compile."""
    if keras.backend.backend() != "jax":
        return nullcontext()
    from keras_woodfisher_backends.jax.backend import light_compilation

    return light_compilation()


def load_recipe(path: str, variables: Sequence[tuple[str, str]] | None) -> Any:
    """Loads a recipe file with the variables of `--var`; a text that is JSON (a number, true, a list) counts as that.

    Raises:
        FileNotFoundError: If there is no such file (a text that names none would count as the recipe itself).
        ValueError: If it is no file, or the recipe is wrong.
    """
    check_input(path, kind="recipe file")
    return kw.load_recipe(Path(path), variables={name: _json_or_text(text) for name, text in variables or ()} or None)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _foreign_compilation(path: str) -> dict[str, Any] | None:
    """How to compile a model whose file names torch's own optimizer, as Keras writes there, for another backend.

    Keras would import torch, which takes seconds, and train with an optimizer that fails.
    """
    if keras.backend.backend() == "torch":
        return None
    with zipfile.ZipFile(path) as archive:
        try:
            config = json.loads(archive.read(_CONFIG))["compile_config"]
            foreign = is_for_torch_alone(config["optimizer"]["module"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # Keras says what is wrong with it.
    if not foreign:
        return None
    return config | {"optimizer": config["optimizer"] | {"module": "keras.optimizers", "registered_name": None}}


def _why(path: str, error: Exception) -> Exception:
    """What to tell of an error while loading: what is wrong with the file, and what to do."""
    # Keras says last what happened, after the configuration.
    message = " ".join((str(error).rpartition("Exception encountered:")[2] or str(error)).partition("\n\n")[0].split())
    if "Lambda" in message and "safe_mode" in message:
        return ValueError(
            f"{path} can't be loaded: it holds a Lambda layer, whose Python code could do anything when it is loaded "
            "(safe mode). If you trust the file, load it in Python with safe_mode=False and call "
            "keras_woodfisher.prune."
        )
    missing = _OWN.search(message)
    if missing:
        return ValueError(
            f"{path} can't be loaded: it uses the {missing[1]} {missing[2]!r} of somebody's own, which this command "
            "can't import. Load it in Python where that is defined, and call keras_woodfisher.prune."
        )
    said = f"{type(error).__name__}: {message[:300]}".rstrip(" :.")
    if isinstance(error, MemoryError) or "allocate" in message:
        return MemoryError(f"{path} can't be loaded: its model takes more memory than there is ({said}).")
    if isinstance(error, RecursionError):
        return ValueError(f"{path} can't be loaded: its {_CONFIG} is nested too deeply. {_ANEW}")
    return ValueError(f"{path} can't be loaded: it is damaged, or another release of Keras wrote it ({said}). {_ANEW}")
