"""Exports a model to a format of another runtime, and checks the file with that runtime before it is put in place."""

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from keras_woodfisher.deployment.exporting.checking import (
    Examples,
    accuracy_of,
    agreement_of,
    check_close,
    differences,
    is_classifier,
    outputs_of_file,
    outputs_of_model,
    time_ratio,
)
from keras_woodfisher.deployment.exporting.formats import FORMATS, Request, check_available, format_of
from keras_woodfisher.deployment.exporting.tensors import bytes_of, files_of
from keras_woodfisher.deployment.whole_files import beside, move
from keras_woodfisher.reports.export_report import ExportReport, FileFigures


def export(  # noqa: PLR0913 - a public entry point
    model: keras.Model,
    filepath: str | os.PathLike[str],
    examples: Any,
    labels: Any = None,
    *,
    format: str | None = None,
    quantize: str | None = None,
    sparse: bool | None = None,
    dense: str | os.PathLike[str] | None = None,
) -> ExportReport:
    """Exports a model for another runtime, and checks the file with it.

    Keras's own exporter writes the file. It is loaded by its runtime, its outputs are compared with the model's, and it
    is put in place once that is done; a file of floats whose outputs differ by more than a thousandth isn't written.

        >>> kw.export(model, "model.h5", x)
        Traceback (most recent call last):
        ValueError: model.h5 must end as one of the formats does: onnx (.onnx), litert (.tflite), ...

    | format | ending | backends | zeros | runtime |
    |---|---|---|---|---|
    | "onnx" | `.onnx` | torch, TensorFlow, JAX | as sparse initialisers where two thirds are zero | onnxruntime |
    | "litert" | `.tflite` | TensorFlow | as sparse tensors, with `quantize="int8"` too | ai-edge-litert |
    | "tf_saved_model" | a folder | TensorFlow, JAX | in full | tensorflow |
    | "openvino" | `.xml`, and `.bin` beside it | torch, TensorFlow | in full | openvino |

    Args:
        model: A built Keras model in float32.
        filepath: Where to write; an existing file is overwritten.
        examples: Inputs (N, ...) as the model takes them, to compare outputs on, and for int8 to learn ranges from.
        labels: The class of each example (N,), whole numbers or one-hot, to measure accuracy.
        format: One of the table; by default the ending's.
        quantize: "int8": weights and activations in 8 bits (LiteRT), inputs and outputs as they were.
        sparse: Whether zeros are left out of the file. None: where the format can, it pays and the runtime loads it.
        dense: The dense model's file in the same format, to compare bytes, accuracy and time with.

    Returns:
        Bytes, zeros, agreement, accuracy and time, as data and as a table.

    Raises:
        ValueError: If an argument is wrong, or the file computes something else.
        RuntimeError: If Keras can't export this model, or not from this backend, or its runtime can't load the file.
        ImportError: If a package is missing; the message names the extra that installs it.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"export takes a built Keras model, got {model!r}. Call it on a batch first.")
    target = Path(os.path.realpath(os.fspath(filepath)))
    name = format_of(Path(filepath), format)
    _check_request(name, quantize, sparse, dense)
    found = Examples.of(model, examples, labels)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"The folder {target.parent} of {target.name} doesn't exist. Create it first.")
    if target.exists() and target.is_dir() != (FORMATS[name].ending == ""):
        raise FileExistsError(f"{filepath} is {'a folder' if target.is_dir() else 'a file'}. Give another name.")
    check_available(name)
    wanted = outputs_of_model(model, found.given)
    if labels is not None and not is_classifier(wanted):
        raise ValueError(
            f"labels need one output of shape (N, classes), the model's are {[output.shape for output in wanted]}. "
            "Leave labels out."
        )
    request = Request(quantize, FORMATS[name].sparse if sparse is None else sparse, found.inputs)
    with beside(target) as folder:
        made = folder / target.name
        notes = _write(model, made, name, request, may_be_dense=sparse is None)
        report = _checked(made, target, name, quantize, (found, wanted), dense)
        for file in [made] if made.is_dir() else files_of(made)[::-1]:
            move(file, target.with_name(file.name))
    return replace(report, notes=(*report.notes, *notes))


def _check_request(name: str, quantize: str | None, sparse: bool | None, dense: Any) -> None:
    if quantize not in (None, "int8"):
        raise ValueError(f'quantize must be None or "int8", got {quantize!r}.')
    for wanted, able, what in (
        (quantize, [key for key, entry in FORMATS.items() if entry.quantize], f"quantize={quantize!r}"),
        (sparse, [key for key, entry in FORMATS.items() if entry.sparse], "sparse=True"),
    ):
        if wanted and name not in able:
            raise ValueError(f"{what} is for {' and '.join(able)}; {name} has no such files. Leave it out.")
    if dense is not None and (format_of(Path(dense), None) != name or not Path(dense).exists()):
        raise ValueError(f"dense must be a file that was exported to {name} before, got {dense}.")


def _write(model: keras.Model, made: Path, name: str, request: Request, may_be_dense: bool) -> list[str]:
    """Writes a file that its runtime loads; notes of what was done otherwise."""
    handler = FORMATS[name].handler
    try:
        with warnings.catch_warnings():
            # Tracers warn of all that Python decides; what comes of it is compared.
            warnings.simplefilter("ignore")
            handler.write(model, str(made), request)
    except Exception as error:
        raise RuntimeError(f"Keras couldn't export the model to {name}: {_said(error)}") from error
    try:
        handler.load(str(made))(_first(request))
    except Exception as error:
        if not request.sparse:
            raise RuntimeError(f"The runtime of {name} doesn't run the file: {_said(error)}") from error
        if not may_be_dense:
            raise RuntimeError(
                f"The runtime of {name} doesn't run the file with sparse tensors: {_said(error)} Give sparse=False."
            ) from error
        plain = replace(request, sparse=False)
        return [
            f"zeros are kept in full: the runtime doesn't run the sparse file ({_said(error)})",
            *_write(model, made, name, plain, False),
        ]
    return []


def _first(request: Request) -> list[Any]:
    return [array[:1] for array in request.inputs]


def _said(error: Exception) -> str:
    """An error's first line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _checked(
    made: Path, target: Path, name: str, quantize: str | None, checked_on: tuple[Examples, Any], dense: Any
) -> ExportReport:
    """Compares outputs, counts zeros and bytes, and measures time."""
    examples, wanted = checked_on
    handler = FORMATS[name].handler
    run = handler.load(str(made))
    outputs = outputs_of_file(run, examples.inputs)
    difference, scale = differences(outputs, wanted)
    if quantize is None:
        check_close(difference, scale)
    report = ExportReport(
        format=name,
        backend=keras.backend.backend(),
        quantize=quantize,
        file=_figures(made, target, name, accuracy_of(outputs, examples.labels)),
        examples=len(examples),
        difference=difference,
        scale=scale,
        agreement=agreement_of(outputs, wanted),
        keras_accuracy=accuracy_of(wanted, examples.labels),
    )
    if dense is None:
        return report
    other = handler.load(str(dense))
    accuracy = accuracy_of(outputs_of_file(other, examples.inputs), examples.labels)
    return replace(
        report,
        dense=_figures(Path(dense), Path(dense), name, accuracy),
        latency_ratio=time_ratio(run, other, examples.inputs),
    )


def _figures(file: Path, shown: Path, name: str, accuracy: float | None) -> FileFigures:
    tensors = FORMATS[name].handler.tensors(str(file))
    size, compressed = bytes_of(files_of(file))
    weights, zeros = sum(tensor.weights for tensor in tensors), sum(tensor.zeros for tensor in tensors)
    return FileFigures(str(shown), size, compressed, weights, zeros, sum(t.sparse for t in tensors), accuracy)
