"""What an optimizer keeps of the weights themselves: it must follow a change that no step of training made."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops
from keras_woodfisher_backends.keras_internals.optimizers import follow_change, trained_variables, weight_slots

from keras_woodfisher.model.optimizer_variables import inner_optimizer, parts_of


@contextmanager
def copies_follow(model: keras.Model, variables: Sequence[Any]) -> Iterator[None]:
    """Has averages of weights, and whatever else an optimizer keeps of them, follow the changes made meanwhile.

    Otherwise Keras would write averages over corrected weights that never saw the correction. Nothing follows if the
    work within fails.

    Args:
        model: A model, compiled or not.
        variables: Those that may change; on JAX they must be up to date.
    """
    optimizer = getattr(model, "optimizer", None)
    parts = [] if optimizer is None else [part for part in parts_of(inner_optimizer(optimizer)) if part.built]
    chosen = {id(variable) for variable in variables}
    kept = [(part, names) for part in parts if (names := weight_slots(part))]
    before = [
        (part, names, variable, ops.copy(variable))
        for part, names in kept
        for variable in trained_variables(part)
        if id(variable) in chosen
    ]
    yield
    for entry in before:
        follow_change(*entry)
