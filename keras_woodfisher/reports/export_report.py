"""What an exported file is: its bytes, its zeros, and how its outputs compare with the Keras model's."""

from dataclasses import asdict, dataclass
from typing import Any

from keras_woodfisher.reports.rendering import aligned


@dataclass(frozen=True)
class FileFigures:
    """What was found of one file.

        >>> figures = kw.FileFigures("m.onnx", 1200, 800, weights=100, zeros=80, sparse_tensors=1)
        >>> figures.zeros / figures.weights, figures.accuracy
        (0.8, None)

    Attributes:
        path: Where it is.
        bytes: Its bytes; of a folder or several files all of them.
        gzip_bytes: The same, each file after gzip at level 6.
        weights: Values of the constants with two axes or more.
        zeros: Those of them that are zero.
        sparse_tensors: Constants that are kept without their zeros.
        accuracy: The fraction of examples whose class it tells, if labels were given.
    """

    path: str
    bytes: int
    gzip_bytes: int
    weights: int
    zeros: int
    sparse_tensors: int
    accuracy: float | None = None


@dataclass(frozen=True)
class ExportReport:
    """The outcome of `export`; `print` it to see a table.

        >>> report = kw.ExportReport(
        ...     "onnx", "torch", None, kw.FileFigures("m.onnx", 1200, 800, 100, 80, 1), 16, 1e-7, 0.8, 1.0
        ... )
        >>> report.file.zeros / report.file.weights, report.agreement, report.latency_ratio
        (0.8, 1.0, None)

    Attributes:
        format: "onnx", "litert", "tf_saved_model" or "openvino".
        backend: What Keras ran on.
        quantize: "int8", or None where floats stayed floats.
        file: What is in the file.
        examples: How many examples outputs were compared on.
        difference: The largest `|file - Keras|` of an output.
        scale: The largest `|Keras|` of an output.
        agreement: The fraction of examples with the same largest output; None where outputs aren't of classes.
        keras_accuracy: The Keras model's own accuracy, if labels were given.
        dense: The dense model's file, if it was given.
        latency_ratio: Median time for one example over the dense file's, on one thread, in turns.
        notes: What else is worth knowing.
    """

    format: str
    backend: str
    quantize: str | None
    file: FileFigures
    examples: int
    difference: float
    scale: float
    agreement: float | None
    keras_accuracy: float | None = None
    dense: FileFigures | None = None
    latency_ratio: float | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        data = asdict(self)
        return data | {"notes": list(self.notes)}

    def __str__(self) -> str:
        """A table of the files, and how outputs compare."""
        header = ("file", "bytes", "gzip", "weights", "zeros", "sparse tensors", "accuracy")
        files = [self.file, *([self.dense] if self.dense else [])]
        lines = aligned([header, *(_row(file) for file in files)], left=1)
        lines.insert(1, "-" * len(lines[0]))
        lines.append(
            f"{self.format}{f' ({self.quantize})' if self.quantize else ''} from {self.backend}; on {self.examples:,} "
            f"examples outputs differ from Keras's by up to {self.difference:.2g} (largest output {self.scale:.3g})"
        )
        if self.agreement is not None:
            lines.append(f"the same class for {self.agreement:.2%} of them")
        if self.keras_accuracy is not None:
            lines.append(f"accuracy of the Keras model: {self.keras_accuracy:.2%}")
        if self.latency_ratio is not None:
            lines.append(f"time for one example: {self.latency_ratio:.2f} of the dense file's")
        return "\n".join(line.rstrip() for line in [*lines, *self.notes])


def _row(file: FileFigures) -> tuple[str, ...]:
    accuracy = "" if file.accuracy is None else f"{file.accuracy:.2%}"
    zeros = f"{file.zeros / file.weights:.4f}" if file.weights else ""
    return (
        file.path,
        f"{file.bytes:,}",
        f"{file.gzip_bytes:,}",
        f"{file.weights:,}",
        zeros,
        str(file.sparse_tensors),
        accuracy,
    )
