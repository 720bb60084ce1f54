"""What a model gets as its inputs: as many arrays as it has inputs, in batches."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import tree


def check_inputs(model: keras.Model, x: Any) -> None:
    """Refuses inputs that are too few, or that are a single example.

    Args:
        model: Any; only of those whose inputs are symbolic it is known what they take.
        x: What it gets, (N, ...) each.

    Raises:
        ValueError: If they don't fit, with what `data` should be.
    """
    inputs = getattr(model, "inputs", None) or []
    if isinstance(x, Mapping) or not type(model).call.__module__.startswith("keras."):
        return
    # An input that is optional may be None.
    leaves, number = tree.flatten(x), len(inputs)
    if len(leaves) < number:
        names = ", ".join(repr(tensor.name) for tensor in inputs)
        raise ValueError(
            f"data gives {len(leaves)} array(s) as x, but the model has {number} inputs ({names}). The parts of a "
            "tuple or list are read as (x, y, sample_weight), as `fit` reads them: put all inputs into one, "
            "data=([x1, x2],), or data=([x1, x2], y) with labels."
        )
    if number == len(leaves) == 1 and leaves[0] is not None:
        (leaf,), shape = leaves, tuple(inputs[0].shape)
        if len(leaf.shape) == len(shape) - 1 and shape[-1] != 1:
            raise ValueError(
                f"data gives an x of shape {tuple(leaf.shape)}, but the model takes {shape}, whose first axis is that "
                "of the examples. Give batches: a dataset of single examples needs `.batch(...)`, one example x[None]."
            )
