"""What a compiled function of a model depends on beside the values of its variables."""

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import keras

from keras_woodfisher_backends.keras_internals.models import layers_of

_OF_TRAINING = frozenset(
    {
        *("optimizer", "loss", "loss_weights", "history", "auto_scale_loss", "run_eagerly", "jit_compile"),
        *("train_function", "test_function", "predict_function", "steps_per_execution"),
        *("stop_training", "stop_evaluating", "stop_predicting"),
    }
)
"""Attributes of a model that change by training and have no part in what it computes."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DEPTH = 4


class Same:
    """Stands for one object, without keeping it: equal to what stands for the same one, as long as it lives.

    Args:
        value: The object.
    """

    def __init__(self, value: Any):
        self.key = id(value)
        try:
            self.reference: Any = weakref.ref(value)
        except TypeError:
            self.reference = lambda: None

    def __hash__(self) -> int:
        return self.key

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Same)
            and self.key == other.key
            and self.reference() is not None
            and self.reference() is other.reference()
        )


def identity(model: Any, variables: Sequence[Any], losses: Any) -> Hashable:
    """Equal for the same model as long as neither its layers nor what is differentiated has changed.

    Layers count by the attributes that aren't private: what else a call looks at is the business of who changes it, as
    in `fit`, which doesn't compile anew either.

    Args:
        model: The model.
        variables: The variables that a function is differentiated by.
        losses: What tells the loss: a nest of losses, weights and names.
    """
    found: list[Hashable] = [_token(losses, 0), *map(Same, variables), *map(Same, model.variables)]
    for layer in layers_of(model):
        skipped = _OF_TRAINING if isinstance(layer, keras.Model) else frozenset()
        # Sorted: hooks that were taken off have put attributes at the end.
        own = [(name, vars(layer)[name]) for name in sorted(vars(layer)) if name[0].isalpha() and name not in skipped]
        found += [Same(layer), layer.dtype_policy.name, *((name, _token(value, 0)) for name, value in own)]
    return tuple(found)


def _token(value: Any, depth: int) -> Hashable:
    """Equal for equal values, as far as they are plain; all else counts as itself."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if depth < _DEPTH:
        if isinstance(value, (list, tuple)):
            return type(value), *(_token(item, depth + 1) for item in value)
        if isinstance(value, dict):
            return type(value), *((key, _token(item, depth + 1)) for key, item in value.items())
        if isinstance(value, keras.DTypePolicy):
            return value.name
        if isinstance(value, keras.losses.Loss):
            return type(value), _token(vars(value), depth + 1)
    return Same(value)
