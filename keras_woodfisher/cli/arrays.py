"""Reads examples from an `.npz`: its headers tell what is wrong before any array is read."""

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_woodfisher.cli.paths import check_input
from keras_woodfisher.memory.free_memory import free_memory
from keras_woodfisher.model.tokens import check_tokens, token_inputs
from keras_woodfisher.options.sizes import size_text

_WANTED = (
    "x and y, and perhaps sample_weight (for several inputs x_NAME each, with the inputs' names, or x_0, x_1, ... in "
    "their order; for several outputs y_NAME or y_0, y_1, ...)"
)
_ANEW = "Write it anew with numpy.savez, or copy it again."


class Data(NamedTuple):
    """Labelled examples as `fit` takes them, several inputs and outputs nested as the model has them."""

    x: Any
    y: Any
    sample_weight: np.ndarray | None = None

    @property
    def examples(self) -> int:
        return len(keras.tree.flatten(self.x)[0])


class _Header(NamedTuple):
    """What an `.npz` says of an array before its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    entry: zipfile.ZipInfo

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def load_data(path: str, model: keras.Model | None = None, labels: bool = True) -> Data:
    """Loads examples from an `.npz`; uint8 images become float32, unscaled.

    Args:
        path: The file.
        model: Whose inputs and outputs they are for; without it, several of them stay dictionaries by name.
        labels: Whether labels have to be there; without them y is None.

    Raises:
        ValueError: If the file isn't an `.npz` of plain arrays of numbers with the right names and lengths, or they
            don't fit the model.
        FileNotFoundError: If there is no such file.
        MemoryError: If it holds more than there is memory for.
    """
    check_input(path, (".npz",), mend="Write one with numpy.savez('data.npz', x=x, y=y).")
    _check_magic(path)
    headers = _headers_of(path)
    parts = _parts_of(path, headers, labels)
    _check_lengths(path, headers)
    arrays = _read(path, headers)
    nests: dict[str, Any] = {
        part: {name: arrays[key] for name, key in keys.items()} if isinstance(keys, Mapping) else arrays[keys]
        for part, keys in parts.items()
    }
    x = keras.tree.map_structure(_as_input, nests["x"])
    y = keras.tree.map_structure(_as_labels, nests["y"]) if "y" in nests else None
    if model is not None:
        x, y = arranged(path, model, x, y)
        try:
            check_tokens(token_inputs(model), x)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return Data(x, y, nests.get("sample_weight"))


def _check_magic(path: str) -> None:
    if zipfile.is_zipfile(path):
        return
    with open(path, "rb") as file:
        start = file.read(6)
    found = "isn't an .npz file"
    found = "is a single array (.npy), not an .npz file" if start == b"\x93NUMPY" else found
    found = "is a part of an .npz file: its end is missing" if start.startswith(b"PK") else found
    raise ValueError(f"{path} {found}. Write one with numpy.savez({path!r}, x=x, y=y).")


class _Explained(ValueError):
    """What is wrong, in words of our own."""


@contextmanager
def _open(path: str) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever goes wrong in a damaged one, the message says which file it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _Explained:
        raise
    except MemoryError as error:
        raise MemoryError(f"{path} holds more than there is memory for: {error}. Give fewer examples.") from error
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error or type(error).__name__}). {_ANEW}") from error


def _headers_of(path: str) -> dict[str, _Header]:
    with _open(path) as archive:
        found = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if len(found) != len(archive.infolist()):
            raise _Explained(f"{path} holds two arrays of one name. {_ANEW}")
        return {name: _header_of(path, archive, entry) for name, entry in found.items()}


def _header_of(path: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Header:
    """The header of one array; what follows it isn't read."""
    name = entry.filename
    if entry.flag_bits & 1:
        raise _Explained(f"{name} in {path} is encrypted. Save it without a password.")
    with archive.open(entry) as member:
        if not name.endswith(".npy"):
            raise _Explained(f"{path} holds {name}, which isn't an array. Wanted are {_WANTED}.")
        try:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
        except zipfile.BadZipFile:
            raise
        except Exception as error:
            raise _Explained(f"{name} in {path} has no header of an array that can be read. {_ANEW}") from error
        header, room = _Header(shape, dtype, entry), entry.file_size - member.tell()
    if dtype.kind not in "biuf":
        raise _Explained(
            f"{name.removesuffix('.npy')} in {path} can't be read: it holds {_kind_of(dtype)}. Save plain arrays of "
            "numbers; pickled objects are refused."
        )
    if room != header.bytes:
        raise _Explained(
            f"{name} in {path} should hold {header.bytes:,} bytes for its shape {shape}, but has {room:,}. {_ANEW}"
        )
    return header


def _kind_of(dtype: np.dtype) -> str:
    kinds = {"c": "complex numbers", "O": "Python objects", "U": "text", "S": "bytes", "M": "dates", "m": "times"}
    return f"{kinds.get(dtype.kind, 'records')} ({dtype})"


def _parts_of(path: str, headers: Mapping[str, _Header], labels: bool) -> dict[str, str | dict[str, str]]:
    """For x, y and sample_weight the name in the file, or the name of each input or output and that in the file."""
    parts: dict[str, str | dict[str, str]] = {}
    for part in ("x", "y"):
        several = {name.removeprefix(f"{part}_"): name for name in headers if name.startswith(f"{part}_")}
        if part in headers:
            parts[part] = part
        elif several:
            parts[part] = several
    if "sample_weight" in headers:
        parts["sample_weight"] = "sample_weight"
    known = {key for keys in parts.values() for key in ([keys] if isinstance(keys, str) else keys.values())}
    if not ({*headers} <= known and "x" in parts and ("y" in parts or not labels)):
        raise ValueError(f"{path} holds {', '.join(headers) or 'nothing'}. Wanted are {_WANTED}.")
    return parts


def _check_lengths(path: str, headers: Mapping[str, _Header]) -> None:
    lengths = {name: header.shape[0] if header.shape else 0 for name, header in headers.items()}
    if len({*lengths.values()}) != 1 or 0 in lengths.values():
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{path} holds arrays of different lengths, or empty ones: {listed}. Give one row an example.")
    size, free = sum(header.bytes for header in headers.values()), free_memory()
    if size > free:
        raise MemoryError(
            f"{path} holds {size_text(size)}, but {size_text(free)} of memory are free. Give fewer examples."
        )


def _read(path: str, headers: Mapping[str, _Header]) -> dict[str, np.ndarray]:
    arrays = {}
    with _open(path) as archive:
        for name, header in headers.items():
            with archive.open(header.entry) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
                member.read()  # to the end, where the checksum is compared
            arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return arrays


def _as_input(array: np.ndarray) -> np.ndarray:
    return array.astype("float32") if array.dtype == np.uint8 else array


def _as_labels(array: np.ndarray) -> np.ndarray:
    """Whole numbers as int32, which frameworks take for classes, or as floats where that is too narrow."""
    if array.dtype.kind not in "ui":
        return array
    bounds = np.iinfo("int32")
    return array.astype("int32" if bounds.min <= array.min() and array.max() <= bounds.max else "float64")


def arranged(path: str, model: keras.Model, x: Any, y: Any) -> tuple[Any, Any]:
    """Several inputs and outputs as a functional model nests them; others are left as they are.

    Raises:
        ValueError: If names or shapes aren't the model's.
    """
    inputs, names = getattr(model, "inputs", None), getattr(model, "output_names", None)
    if not inputs:
        return x, y
    x = _nested(path, "x", x, inputs[0] if names is None else model.input, [tensor.name for tensor in inputs])
    for array, tensor in zip(keras.tree.flatten(x), inputs, strict=True):
        if not _fits(array.shape[1:], tuple(tensor.shape[1:])):
            raise ValueError(
                f"{path} holds examples of shape {array.shape[1:]} for the model's input {tensor.name}, which has the "
                f"shape {tuple(tensor.shape[1:])}. Save them in that shape."
            )
    return x, _nested(path, "y", y, model.outputs[0] if names is None else model.output, names or ["output"])


def _nested(path: str, part: str, given: Any, wanted: Any, names: Sequence[str]) -> Any:
    """Several inputs or outputs as a model nests them.

    Args:
        path: Of the file.
        part: `"x"` or `"y"`.
        given: An array, or arrays by name or by number.
        wanted: The nest of the model's inputs or outputs.
        names: Their names, in order.
    """
    keys = keras.tree.flatten({key: key for key in wanted}) if isinstance(wanted, Mapping) else []
    what = "inputs" if part == "x" else "outputs"
    said = f"The model's {what} are, in their order: {', '.join(keys or names)}. Name each {part}_NAME, or number them."
    if not isinstance(given, Mapping):
        if given is not None and len(names) > 1:
            raise ValueError(f"{path} holds one {part} for {len(names)} {what}. {said}")
        return {keys[0]: given} if keys and given is not None else given
    rules = [known for known in (keys, names, [*map(str, range(len(names)))]) if {*given} <= {*known}]
    # An output may have no loss, and so no labels.
    if not rules or (part == "x" and len(given) < len(names)):
        raise ValueError(f"{path} holds {', '.join(f'{part}_{name}' for name in given)}. {said}")
    arrays = [given.get(name) for name in rules[0]]
    if len(keys) == len(arrays):
        return {key: array for key, array in zip(keys, arrays, strict=True) if array is not None}
    present = [array for array in arrays if array is not None]
    return keras.tree.pack_sequence_as(wanted, present) if len(present) == len(arrays) else present


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Whether an example has the shape that a model takes; Keras adds or drops a last axis of one."""
    if len(shape) == len(wanted) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == len(wanted) - 1 and wanted[-1] == 1:
        wanted = wanted[:-1]
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))
