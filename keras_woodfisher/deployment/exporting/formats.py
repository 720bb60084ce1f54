"""What can be exported to, on which backends, and what has to be installed for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from keras_woodfisher.deployment.exporting.tensors import FileTensor

Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""A file that was loaded by its own runtime, on one thread: the outputs for a batch of inputs, in the model's order."""


class Handler(Protocol):
    """The module of a format."""

    def write(self, model: keras.Model, path: str, request: "Request") -> None:
        """Writes the file by Keras's own exporter."""
        ...

    def load(self, path: str) -> Runner:
        """Loads it by its runtime."""
        ...

    def tensors(self, path: str) -> list[FileTensor]:
        """The weights in it."""
        ...


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Attributes:
        quantize: "int8", or None for floats.
        sparse: Whether weights may be kept without their zeros.
        inputs: Examples, an array for each input.
    """

    quantize: str | None
    sparse: bool
    inputs: Sequence[np.ndarray]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        ending: How its paths end; "" for a folder.
        backends: Those that Keras exports it from; the packages that each needs beside the runtime's, with its extra.
        packages: What reads and runs it.
        extra: The extra of this package that installs them.
        module: Where its handler is.
        sparse: Whether it can leave zeros out.
        quantize: Whether it can be of int8.
    """

    ending: str
    backends: Mapping[str, Sequence[tuple[str, str]]]
    packages: Sequence[str]
    extra: str
    module: str
    sparse: bool = False
    quantize: bool = False

    @property
    def handler(self) -> Handler:
        """Its functions."""
        handler: Any = import_module(f"{__package__}.{self.module}")
        return handler


FORMATS = {
    "onnx": Format(
        ".onnx",
        {"torch": [("onnxscript", "onnx")], "tensorflow": [("tf2onnx", "onnx")], "jax": [("jax2onnx", "onnx-jax")]},
        ("onnx", "onnxruntime"),
        "onnx",
        "onnx_files",
        sparse=True,
    ),
    "litert": Format(
        ".tflite",
        {"tensorflow": []},
        ("ai_edge_litert", "flatbuffers"),
        "litert",
        "litert_files",
        sparse=True,
        quantize=True,
    ),
    "tf_saved_model": Format(
        "", {"tensorflow": [], "jax": [("tensorflow", "tensorflow")]}, ("tensorflow",), "tensorflow", "saved_models"
    ),
    "openvino": Format(".xml", {"torch": [], "tensorflow": []}, ("openvino",), "openvino", "openvino_files"),
}


def format_of(path: Path, name: str | None) -> str:
    """The format of a path, by its ending where no name is given.

    Raises:
        ValueError: If there is no such format, or the ending is another one's.
    """
    endings = ", ".join(f"{key} ({entry.ending or 'a folder'})" for key, entry in FORMATS.items())
    if name is not None and name not in FORMATS:
        raise ValueError(f"format must be one of {endings}, got {name!r}.")
    found = next((key for key, entry in FORMATS.items() if entry.ending == path.suffix), None)
    if name is None and found is None:
        raise ValueError(f"{path} must end as one of the formats does: {endings}.")
    chosen = name or found or ""
    if FORMATS[chosen].ending != path.suffix and (FORMATS[chosen].ending or found):
        raise ValueError(
            f"A path for format {chosen!r} must end in {FORMATS[chosen].ending or 'nothing, as a folder'}, got {path}."
        )
    return chosen


def check_available(name: str) -> None:
    """Refuses what the backend can't do, or what isn't installed.

    Raises:
        RuntimeError: If Keras can't export the format from its backend.
        ImportError: If a package is missing.
    """
    wanted, backend = FORMATS[name], keras.backend.backend()
    if backend not in wanted.backends:
        raise RuntimeError(
            f"Keras exports {name} from {' or '.join(wanted.backends)}, not from {backend}. Save the model with "
            f"keras_woodfisher.save, and export it where KERAS_BACKEND={next(iter(wanted.backends))}: keras-woodfisher "
            f"export model.keras FILE --backend {next(iter(wanted.backends))}. From {backend} there is: "
            f"{', '.join(other for other, entry in FORMATS.items() if backend in entry.backends)}."
        )
    check_installed([*((package, wanted.extra) for package in wanted.packages), *wanted.backends[backend]], name)


def check_inputs(names: Sequence[str], inputs: Sequence[np.ndarray]) -> None:
    """Refuses a file that doesn't take the model's inputs.

    Raises:
        ValueError: If there are others.
    """
    if len(names) != len(inputs):
        raise ValueError(
            f"The file takes {len(names)} inputs ({', '.join(names) or 'none'}), the model {len(inputs)}: the "
            "exporter took what comes of the others for a constant, as where values leave the framework (NumPy)."
        )


def check_installed(packages: Sequence[tuple[str, str]], purpose: str) -> None:
    """Refuses to go on without packages, each given with its extra.

    Raises:
        ImportError: If one isn't installed.
    """
    missing = [(package, extra) for package, extra in packages if find_spec(package) is None]
    if missing:
        extras = ",".join(dict.fromkeys(extra for _, extra in missing))
        raise ImportError(
            f"{purpose} needs {' and '.join(package for package, _ in missing)}, which isn't installed: pip install "
            f"'keras-woodfisher[{extras}]'."
        )
