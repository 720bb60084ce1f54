"""Compares what a file computes with what the Keras model does, and one file's time with another's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.models import infer

from keras_woodfisher.deployment.exporting.formats import Runner

BATCH = 32
_RELATIVE = 1e-3
"""By how much of the largest output a file of floats may be off: another order of additions is far below."""

_ROUNDS, _WARM_UP = 60, 5


@dataclass(frozen=True)
class Examples:
    """What a file is checked on.

    Attributes:
        given: As the model takes them.
        inputs: An array for each input.
        labels: The class of each, or None.
    """

    given: Any
    inputs: list[np.ndarray]
    labels: np.ndarray | None

    @classmethod
    def of(cls, model: keras.Model, given: Any, labels: Any) -> "Examples":
        """Arrays of the types that the model's inputs have, as an exported file takes no others.

        Raises:
            ValueError: If there are none, their lengths differ, or labels aren't one class each.
        """
        given = keras.tree.map_structure(np.asarray, given)
        inputs = keras.tree.flatten(given)
        lengths = {len(array) if array.ndim else 0 for array in inputs}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"examples must be arrays of one example a row, got shapes {[array.shape for array in inputs]}."
            )
        if labels is not None:
            labels = np.asarray(labels)
            labels = labels.argmax(-1) if labels.ndim == 2 and labels.shape[1] > 1 else labels.reshape(-1)
            if len(labels) != len(inputs[0]) or not np.array_equal(labels, labels.astype(int)):
                raise ValueError(
                    f"labels must be the class of each of the {len(inputs[0])} examples, as whole numbers or one-hot, "
                    f"got {len(labels)} of {labels.dtype}."
                )
        inputs = [array.astype(dtype) for array, dtype in zip(inputs, _dtypes(model, inputs), strict=True)]
        return cls(keras.tree.pack_sequence_as(given, inputs), inputs, labels)

    def __len__(self) -> int:
        return len(self.inputs[0])


def _dtypes(model: keras.Model, inputs: Sequence[np.ndarray]) -> list[str]:
    """Those of the model's inputs; of a model that declares none, as Keras would convert arrays."""
    declared = [tensor.dtype for tensor in keras.tree.flatten(getattr(model, "inputs", None) or [])]
    if len(declared) == len(inputs):
        return declared
    return [keras.config.floatx() if array.dtype.kind == "f" else str(array.dtype) for array in inputs]


def outputs_of_model(model: keras.Model, given: Any) -> list[np.ndarray]:
    """The Keras model's outputs in inference, batch by batch."""
    count = len(keras.tree.flatten(given)[0])
    found = []
    for start in range(0, count, BATCH):
        batch = keras.tree.map_structure(lambda a, s=start: keras.ops.convert_to_tensor(a[s : s + BATCH]), given)
        found.append([keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(infer(model, batch))])
    return _joined(found)


def outputs_of_file(run: Runner, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A file's outputs, batch by batch."""
    starts = range(0, len(inputs[0]), BATCH)
    return _joined([run([array[start : start + BATCH] for array in inputs]) for start in starts])


def _joined(batches: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def differences(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> tuple[float, float]:
    """The largest difference of an output, and the largest output.

    Raises:
        ValueError: If the outputs are of other shapes, so that it is another function.
    """
    shapes = [array.shape for array in found], [array.shape for array in wanted]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The file gives outputs of shapes {shapes[0]}, the model {shapes[1]}.")
    pairs = list(zip(found, wanted, strict=True))
    off = max(float(np.max(np.abs(a.astype("float64") - b.astype("float64")), initial=0)) for a, b in pairs)
    return off, max(float(np.max(np.abs(b.astype("float64")), initial=0)) for b in wanted)


def check_close(difference: float, scale: float) -> None:
    """Refuses a file of floats that computes something else.

    Raises:
        ValueError: If it does.
    """
    # A difference of nan isn't close either.
    if not difference <= _RELATIVE * max(scale, 1e-3):
        raise ValueError(
            f"The file's outputs differ from the Keras model's by up to {difference:.3g}, where the largest output is "
            f"{scale:.3g}, so it isn't written. Try another format, or a model in float32."
        )


def is_classifier(outputs: Sequence[np.ndarray]) -> bool:
    """Whether there is one output of a score for each of several classes."""
    return len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1


def agreement_of(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float | None:
    """The fraction of examples with the same largest output."""
    if not is_classifier(wanted):
        return None
    return float(np.mean(found[0].argmax(1) == wanted[0].argmax(1)))


def accuracy_of(outputs: Sequence[np.ndarray], labels: np.ndarray | None) -> float | None:
    """The fraction of examples whose label is the largest output."""
    return None if labels is None else float(np.mean(outputs[0].argmax(1) == labels))


def time_ratio(run: Runner, other: Runner, inputs: Sequence[np.ndarray]) -> float:
    """Median time of one example over another file's, the two in turns so that a change of the machine hits both."""
    example = [array[:1] for array in inputs]
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(_WARM_UP + _ROUNDS):
        for place, runner in zip(seconds, (run, other), strict=True):
            start = time.perf_counter()
            runner(example)
            if turn >= _WARM_UP:
                place.append(time.perf_counter() - start)
    return float(np.median(seconds[0]) / np.median(seconds[1]))
