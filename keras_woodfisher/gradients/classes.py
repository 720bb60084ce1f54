"""Labels that are classes as numbers: each must be one that the model has an output for.

Frameworks differ in what they make of another one: an error of their own, or a loss of zero without a word.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.models import loss_settings, output_losses

_SPARSE = keras.losses.sparse_categorical_crossentropy


class ClassOutput(NamedTuple):
    """An output whose labels are classes.

    Attributes:
        path: Keys and places that lead to it in the nest of outputs.
        name: What messages call it; "" where there is only one.
        number: How many classes it tells apart.
        ignored: The label that stands for none, if any.
    """

    path: tuple[Any, ...]
    name: str
    number: int
    ignored: int | None


def takes_classes(loss: Any) -> bool:
    """Whether a loss, or its name, takes classes as numbers."""
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    return loss is _SPARSE or getattr(loss, "fn", None) is _SPARSE


def class_outputs(model: keras.Model, prediction: Any) -> list[ClassOutput]:
    """The outputs that a model is compiled for with such a loss; none before its first loss was computed."""
    found = []
    losses = output_losses(model)
    for path, loss, name in losses:
        if takes_classes(loss):
            output = _at(prediction, path, getattr(model, "output_names", None))
            settings = loss_settings(loss)
            if output is not None:
                number = int(output.shape[settings.get("axis", -1)])
                found.append(ClassOutput(path, name if len(losses) > 1 else "", number, settings.get("ignore_class")))
    return found


def check_classes(outputs: Sequence[ClassOutput], labels: Any, names: Sequence[str] | None) -> None:
    """Refuses labels that are no class of their output.

    Args:
        outputs: Those to look at.
        labels: NumPy arrays, nested as the outputs are, or a dictionary by their names.
        names: The names of the model's outputs, in order.

    Raises:
        ValueError: With the first such label.
    """
    for output in outputs:
        found = _at(labels, output.path, names)
        if found is None:
            continue
        values = np.unique(found)
        wrong = values[~((values >= 0) & (values < output.number) & (values == np.rint(values)))]
        wrong = wrong[wrong != output.ignored] if output.ignored is not None else wrong
        if len(wrong):
            of = f" of the output {output.name!r}" if output.name else ""
            raise ValueError(
                f"The labels{of} hold the class {wrong[0]:g}, but there are {output.number} outputs, for the classes 0 "
                f"to {output.number - 1}. Number classes from 0, and give the last layer one unit a class; "
                "SparseCategoricalCrossentropy(ignore_class=...) leaves one label out."
            )


def one_hot_text(outputs: Sequence[ClassOutput], labels: Any, names: Sequence[str] | None) -> str:
    """What is wrong with labels that are one-hot where numbers of classes are wanted, or ""; see `check_classes`."""
    for output in outputs:
        found = _at(labels, output.path, names)
        if found is not None and np.ndim(found) > 1 and output.number == np.shape(found)[-1] > 1:
            of = f" of the output {output.name!r}" if output.name else ""
            return (
                f"The labels{of} hold {output.number} numbers an example, as one-hot labels do, but the loss takes the "
                "number of the class. Compile the model with categorical_crossentropy, or give numpy.argmax(y, -1)."
            )
    return ""


def _at(nest: Any, path: Sequence[Any], names: Sequence[str] | None) -> Any:
    """The leaf at the end of a path, or None."""
    for step in path:
        by_name = isinstance(nest, Mapping) and isinstance(step, int) and names
        try:
            nest = nest[names[step] if by_name and names else step]
        except (KeyError, IndexError, TypeError):
            return None
    return None if isinstance(nest, (Mapping, list, tuple)) else nest
