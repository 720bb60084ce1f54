"""Reads models, data and recipes, and writes results so that a failure leaves nothing half written."""

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.optimizers import is_for_torch_alone

import keras_woodfisher as kw

_WANTED = "x and y, and perhaps sample_weight (for several inputs x_NAME each, with the inputs' names)"


class Data(NamedTuple):
    """Labelled examples as `fit` takes them; x is a dictionary where the model has several inputs."""

    x: Any
    y: Any
    sample_weight: np.ndarray | None = None


def load_model(path: str, compile: bool = True) -> keras.Model:
    """Loads a `.keras` file in safe mode: no code in the file is run.

    Raises:
        ValueError: If it isn't a `.keras` file, or holds code or classes that can't be loaded.
        FileNotFoundError: If there is no such file.
    """
    _check_input(path, (".keras",))
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} isn't a .keras file (a zip archive). Save the model with model.save('model.keras').")
    try:
        compilation = _foreign_compilation(path) if compile else None
        with _light_compilation():
            model = keras.models.load_model(path, compile=compile and compilation is None, safe_mode=True)
        if compilation is not None:
            model.compile_from_config(compilation)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} can't be loaded: {_why(str(error))}") from error
    return model


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
        RecipeError: If the recipe is wrong.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no recipe file {path}.")
    return kw.load_recipe(path, variables={name: _json_or_text(text) for name, text in variables or ()} or None)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def load_data(path: str, labels: bool = True) -> Data:
    """Loads examples from an `.npz`; uint8 images become float32, unscaled.

    Args:
        path: The file.
        labels: Whether labels have to be there; without them y is None.

    Raises:
        ValueError: If the file isn't an `.npz` of plain arrays with the right names and lengths.
        FileNotFoundError: If there is no such file.
    """
    _check_input(path, (".npz",))
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} isn't an .npz file. Write one with numpy.savez({path!r}, x=x, y=y).")
    with np.load(path, allow_pickle=False) as file:
        inputs = [name for name in file.files if name.startswith("x_")]
        named = "x" not in file.files and bool(inputs)
        known = {*(inputs if named else ["x"]), "y", "sample_weight"}
        if not known >= {*file.files} >= known - {"sample_weight", *([] if labels else ["y"])}:
            raise ValueError(f"{path} holds {', '.join(file.files) or 'nothing'}. Wanted are {_WANTED}.")
        arrays = {name: _plain_array(path, file, name) for name in file.files}
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len({*lengths.values()}) != 1 or 0 in lengths.values():
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{path} holds arrays of different lengths, or empty ones: {listed}. Give one row an example.")
    x = {name.removeprefix("x_"): _as_input(arrays[name]) for name in inputs} if named else _as_input(arrays["x"])
    y = arrays.get("y")
    whole = y is not None and y.dtype.kind in "ui"
    return Data(x, y.astype("int32") if y is not None and whole else y, arrays.get("sample_weight"))


def check_output(path: str, endings: Sequence[str], force: bool) -> None:
    """Finds out before any work whether a result can be written.

    Raises:
        ValueError: If the ending is wrong.
        FileExistsError: If the file is there and mustn't be overwritten.
        FileNotFoundError, NotADirectoryError, PermissionError: If its folder can't take it.
    """
    target = Path(path)
    if target.suffix not in endings:
        raise ValueError(f"{path} must end in {' or '.join(endings)}.")
    if target.is_dir():
        raise FileExistsError(f"{path} is a folder. Name a file in it.")
    if target.exists() and not force:
        raise FileExistsError(f"{path} exists. Give another name, or --force to overwrite it.")
    folder = target.parent
    if not folder.exists():
        raise FileNotFoundError(f"The folder {folder} of {path} doesn't exist. Create it first.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} isn't a folder, so {path} can't be written.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {folder} can't be written to. Choose another place for {target.name}.")


def write(path: str, save: Callable[[str], Any]) -> None:
    """Calls `save` with the name of a temporary file beside `path`, and renames that file once it is whole."""
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        save(str(temporary))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_input(path: str, endings: Sequence[str]) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if Path(path).suffix not in endings or Path(path).is_dir():
        raise ValueError(f"{path} must be a file that ends in {' or '.join(endings)}.")


def _foreign_compilation(path: str) -> dict[str, Any] | None:
    """How to compile a model whose file names torch's own optimizer, as Keras writes there, for another backend.

    Keras would import torch, which takes seconds, and train with an optimizer that fails.
    """
    if keras.backend.backend() == "torch":
        return None
    with zipfile.ZipFile(path) as archive:
        try:
            config = json.loads(archive.read("config.json"))["compile_config"]
            foreign = is_for_torch_alone(config["optimizer"]["module"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # Keras says what is wrong with it.
    if not foreign:
        return None
    return config | {"optimizer": config["optimizer"] | {"module": "keras.optimizers", "registered_name": None}}


def _plain_array(path: str, file: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    try:
        return file[name]
    except ValueError as error:
        raise ValueError(
            f"{name} in {path} can't be read: {error} Save plain arrays of numbers; pickled objects are refused."
        ) from None


def _as_input(array: np.ndarray) -> np.ndarray:
    return array.astype("float32") if array.dtype == np.uint8 else array


def _why(message: str) -> str:
    """The one sentence of Keras's message that tells what to do."""
    if "Lambda" in message and "safe_mode" in message:
        return (
            "it holds a Lambda layer, whose Python code could do anything when it is loaded (safe mode). If you trust "
            "the file, load it in Python with safe_mode=False and call keras_woodfisher.prune."
        )
    missing = re.search(r"Could not locate (class|function) '([^']+)'", message)
    if missing:
        return (
            f"it uses the {missing[1]} {missing[2]!r} of somebody's own, which this command can't import. "
            "Load it in Python where that is defined, and call keras_woodfisher.prune."
        )
    return message.partition("\n\n")[0][:300]
