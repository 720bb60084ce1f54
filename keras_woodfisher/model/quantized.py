"""The weights of quantised layers, as Keras stores them: integers, some packed two in a byte, less a zero point."""

from typing import Any

import keras
import numpy as np
from keras import ops

_HELPERS = ("_scale", "_scales", "_zero", "zero_point", "g_idx", "_history")
"""How the names of what quantising adds beside the weights end."""

_CALIBRATED = ("gptq", "awq")
"""What keeps a kernel transposed, and only after it has seen data."""


def mode_of(layer: Any) -> str | None:
    """How a layer is quantised: `"int8"`, `"int4"`, `"gptq"`, ...; None if it isn't."""
    return getattr(layer, "quantization_mode", None)


def holds_weights(layer: Any, variable: Any) -> bool:
    """Whether a variable that a quantised layer never trains holds its weights now.

    GPTQ and AWQ fill a packed variable when they calibrate; until then a layer computes with the one that it had.
    """
    mode = mode_of(layer)
    filled = mode not in _CALIBRATED or bool(getattr(layer, f"is_{mode}_calibrated", False))
    return filled and not variable.name.endswith(_HELPERS)


def holds_integers(layer: Any, variable: Any) -> bool:
    """Whether a variable holds the integers of a quantised layer, rather than weights."""
    return mode_of(layer) is not None and "int" in keras.backend.standardize_dtype(variable.dtype)


def integers_of(layer: Any, variable: Any) -> np.ndarray | None:
    """The stored integers less their zero points, one a weight: zero exactly where the weight is.

    Args:
        layer: A quantised layer.
        variable: Its variable of integers.

    Returns:
        With int8 the variable's own shape, else (inputs, outputs), or (tokens, width) of an embedding; None where they
        are stored in a way that isn't known.
    """
    mode, name, stored = mode_of(layer), variable.name, ops.convert_to_numpy(variable)
    if mode == "int8":
        return stored
    shape = _shape(layer, mode, name)
    if shape is None:
        return None
    values = _unpacked(stored.T if mode in _CALIBRATED else stored, shape, mode, layer)
    zero_points = getattr(layer, f"{name}_zero", None)
    if values is None or zero_points is None:
        return values
    zero_points = ops.convert_to_numpy(zero_points).astype(np.int16)
    groups = ops.convert_to_numpy(layer.g_idx).astype(int)
    zero_points = zero_points.T if mode in _CALIBRATED else zero_points
    return values - np.take(zero_points, groups, axis=1 if name == "embeddings" else 0)


def _shape(layer: Any, mode: str | None, name: str) -> tuple[int, int] | None:
    """The shape that integers of 4 bits, or those of GPTQ and AWQ, have as a matrix when they aren't packed."""
    if mode == "int4" and name in ("embeddings", "reverse_embeddings"):
        sides = layer.input_dim, layer.output_dim
        return sides if name == "embeddings" else sides[::-1]
    if mode not in ("int4", *_CALIBRATED) or name != "kernel":
        return None
    columns = int(layer.kernel_scale.shape[0 if mode in _CALIBRATED else -1])
    if isinstance(layer, keras.layers.Dense):
        return layer.input_spec.axes[-1], columns
    shape = getattr(layer, "original_kernel_shape", None)
    return None if shape is None else (int(np.prod(shape)) // columns, columns)


def _unpacked(stored: np.ndarray, shape: tuple[int, int], mode: str | None, layer: Any) -> np.ndarray | None:
    """(rows, columns) int16 of what may be packed along either axis (releases of Keras differ), or None."""
    if mode == "gptq" and getattr(layer.dtype_policy, "weight_bits", 4) != 4:
        return stored.astype(np.int16) if stored.shape == shape else None
    for axis in (1, 0):
        halved = tuple(-(-side // 2) if place == axis else side for place, side in enumerate(shape))
        if stored.shape == halved:
            # The lower half of a byte comes first; in signed bytes both halves are two's complements.
            halves = np.stack([stored & 0xF, (stored >> 4) & 0xF], axis + 1).astype(np.int16)
            values = np.take(halves.reshape([-1, shape[1]] if axis == 0 else [shape[0], -1]), range(shape[axis]), axis)
            return np.where(values > 7, values - 16, values) if stored.dtype == np.int8 else values
    return None
