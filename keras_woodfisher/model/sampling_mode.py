"""The mode in which samples are taken: float32, and nothing but the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

_HALF = ("float16", "bfloat16")


@contextmanager
def sampling_mode(*models: Any) -> Iterator[None]:
    """Half-precision layers compute in float32, and regularisers and `add_loss` add nothing; then all is put back.

    A regulariser would add one constant vector to each sample.
    """
    # A quantised layer computes as it was quantised: its policy says how.
    layers = [
        layer
        for layer in models[0]._flatten_layers()
        if layer.compute_dtype in _HALF and layer.quantization_mode is None
    ]
    policies = [layer._dtype_policy for layer in layers]
    overrides = [model._losses_override for model in models]
    try:
        for layer in layers:
            vars(layer)["_dtype_policy"] = _float32_with(layer.variable_dtype)
        for model in models:
            vars(model)["_losses_override"] = [ops.zeros(())]
        yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            vars(layer)["_dtype_policy"] = policy
        for model, override in zip(models, overrides, strict=True):
            vars(model)["_losses_override"] = override


def _float32_with(variable_dtype: str) -> keras.DTypePolicy:
    """Computes in float32; a layer casts its variables only where the policy says that they have another type."""
    policy = keras.DTypePolicy("float32")
    policy._variable_dtype = variable_dtype
    return policy
