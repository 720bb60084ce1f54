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
    chosen = {id(variable) for variable in variables}
    before = [
        (part, names, variable, ops.copy(variable))
        for part, names in _kept(model)
        for variable in trained_variables(part)
        if id(variable) in chosen
    ]
    yield
    for entry in before:
        follow_change(*entry)


def copies_of_weights(model: keras.Model) -> list[Any]:
    """The variables that `copies_follow` may change."""
    slots = [slot for part, names in _kept(model) for name in names for slot in vars(part)[name]]
    return [slot for slot in slots if slot is not None]


def _kept(model: keras.Model) -> list[tuple[Any, Sequence[str]]]:
    """The parts of an optimizer that keep anything of weights, with the names under which they do."""
    optimizer = getattr(model, "optimizer", None)
    parts = [] if optimizer is None else [part for part in parts_of(inner_optimizer(optimizer)) if part.built]
    return [(part, names) for part in parts if (names := weight_slots(part))]
