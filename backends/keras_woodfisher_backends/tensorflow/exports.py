"""What files for TensorFlow and LiteRT need of TensorFlow itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf


def converter_settings(sparse: bool, representative: Callable[[], Any] | None) -> dict[str, Any]:
    """Settings of the LiteRT converter.

    Args:
        sparse: Whether tensors with many zeros are kept without them.
        representative: Gives examples to learn the ranges of int8 by; without it, floats stay floats.
    """
    optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY] if sparse else []
    if representative is None:
        return {"optimizations": optimizations} if optimizations else {}
    return {
        "optimizations": [tf.lite.Optimize.DEFAULT, *optimizations],
        "representative_dataset": representative,
        "target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]},
    }


def saved_model_runner(path: str) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """The function `serve` of a SavedModel, on arrays in the order of its inputs."""
    loaded = tf.saved_model.load(path)
    (structure, _) = loaded.serve.concrete_functions[0].structured_input_signature

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        arguments = tf.nest.pack_sequence_as(structure, [tf.constant(array) for array in inputs])
        return [output.numpy() for output in tf.nest.flatten(loaded.serve(*arguments))]

    # The object owns the variables of the function.
    run.owner = loaded  # type: ignore[attr-defined]
    return run


def saved_model_variables(path: str) -> list[tuple[str, np.ndarray]]:
    """The variables of a SavedModel, with their names in its checkpoint."""
    reader = tf.train.load_checkpoint(str(Path(path) / "variables" / "variables"))
    names = sorted(name for name in reader.get_variable_to_shape_map() if name.endswith("VARIABLE_VALUE"))
    return [(name, np.asarray(reader.get_tensor(name))) for name in names]
