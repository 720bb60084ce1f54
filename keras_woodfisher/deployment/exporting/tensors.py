"""The weights in an exported file, whatever its format."""

import gzip
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_GZIP_LEVEL = 6


@dataclass(frozen=True)
class FileTensor:
    """A constant of an exported graph with two axes or more: a kernel, an embedding.

    Attributes:
        name: What the file calls it.
        shape: Its shape, in the file's own order of axes.
        dtype: How its values are kept.
        zeros: How many of them are zero.
        bytes: What it takes in the file.
        sparse: Whether only what isn't zero is kept.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    bytes: int
    sparse: bool = False

    @property
    def weights(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


def of_array(name: str, values: np.ndarray, kept: int | None = None) -> FileTensor:
    """A tensor that is kept in full; `kept` are its bytes, where they aren't those of the array."""
    zeros = values.size - int(np.count_nonzero(values))
    return FileTensor(name, values.shape, str(values.dtype), zeros, values.nbytes if kept is None else kept)


def is_weight(values: np.ndarray) -> bool:
    """Whether a constant may be a layer's weights: floats or bytes with two axes or more; no bias."""
    if values.dtype.kind != "f" and values.dtype.itemsize != 1:
        return False
    return values.ndim == 2 or (values.ndim > 2 and sum(length > 1 for length in values.shape) > 1)


def files_of(path: Path) -> list[Path]:
    """A file and what lies beside it as its weights, or all files of a folder."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    beside = path.with_suffix(".bin")
    return [path, beside] if path.suffix == ".xml" and beside.exists() else [path]


def bytes_of(files: Iterable[Path]) -> tuple[int, int]:
    """The bytes of files as they are, and each after gzip at level 6."""
    contents = [file.read_bytes() for file in files]
    return sum(map(len, contents)), sum(len(gzip.compress(c, _GZIP_LEVEL, mtime=0)) for c in contents)
