"""OpenVINO's representation: an `.xml` with the graph, and beside it a `.bin` with the weights, zeros in full."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_woodfisher.deployment.exporting.formats import Request, Runner
from keras_woodfisher.deployment.exporting.tensors import FileTensor, is_weight, of_array


def write(model: keras.Model, path: str, request: Request) -> None:
    """Exports a model."""
    del request
    model.export(path, format="openvino", verbose=False)


def load(path: str) -> Runner:
    """A compiled model on one thread of the CPU, computing in float32."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled: Any = openvino.Core().compile_model(path, "CPU", settings)

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = compiled(list(inputs))
        return [np.array(found[output]) for output in compiled.outputs]

    return run


def tensors(path: str) -> list[FileTensor]:
    """The constants with two axes or more."""
    import openvino

    constants = [op for op in openvino.Core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
    found = [(op.get_friendly_name(), np.array(op.data)) for op in constants]
    return [of_array(name, values) for name, values in found if is_weight(values)]
