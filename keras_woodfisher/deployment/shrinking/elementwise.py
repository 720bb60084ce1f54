"""Functions that work on each number by itself, and so turn constants into constants."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

_ACTIVATIONS = (
    "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid mish relu "
    "relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus sparse_sigmoid squareplus tanh tanh_shrink "
    "threshold"
)
_OPERATIONS = (
    "Abs Celu Elu Erf Exp Gelu HardShrink HardSigmoid HardSilu HardTanh LeakyRelu LogSigmoid Negative Relu Relu6 Selu "
    "Sigmoid Silu SoftShrink Softplus Softsign SparsePlus SparseSigmoid Sqrt Square Squareplus Tanh TanhShrink "
    "Threshold"
)
_FUNCTIONS = [found for name in _ACTIVATIONS.split() if (found := getattr(keras.activations, name, None))]
LAYERS = (layers.ReLU, layers.LeakyReLU, layers.ELU)
OPERATIONS = frozenset(_OPERATIONS.split())
"""Names of classes of `keras.ops`."""


def is_elementwise(function: Any) -> bool:
    """Whether an activation (None, a function or a layer) is known to work on each number by itself."""
    return function is None or type(function) in LAYERS or any(function is known for known in _FUNCTIONS)


def values_of(function: Callable | None, constants: np.ndarray, dtype: str) -> np.ndarray:
    """What an elementwise function makes of constants, as Keras itself computes it.

    Args:
        function: None for none.
        constants: float64; nan stands for what isn't constant, and stays.
        dtype: What Keras computes in.
    """
    if function is None:
        return constants
    known = ~np.isnan(constants)
    found = function(ops.convert_to_tensor(np.where(known, constants, 0.0), dtype=dtype))
    found = np.asarray(
        ops.convert_to_numpy(ops.cast(found, "float64" if dtype == "float64" else "float32")), np.float64
    )
    return np.where(known & np.isfinite(found), found, np.nan)
