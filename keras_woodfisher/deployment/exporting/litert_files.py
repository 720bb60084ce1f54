"""LiteRT (TensorFlow Lite): floats or int8 throughout, and TensorFlow's own sparse tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_woodfisher.deployment.exporting.formats import Request, Runner, check_inputs
from keras_woodfisher.deployment.exporting.tensors import FileTensor, is_weight, of_array

_REPRESENTATIVE = 256
"""Examples from which the converter learns the range of activations."""

_DTYPES = {0: "float32", 1: "float16", 9: "int8"}
"""By the number of the schema's TensorType; other types hold no weights that are pruned."""


def write(model: keras.Model, path: str, request: Request) -> None:
    """Exports a model by TensorFlow's converter."""
    from keras_woodfisher_backends.tensorflow.exports import converter_settings

    examples = [array[:_REPRESENTATIVE] for array in request.inputs]

    def representative() -> Iterator[list[np.ndarray]]:
        for index in range(len(examples[0])):
            yield [array[index : index + 1].astype("float32", copy=False) for array in examples]

    settings = converter_settings(request.sparse, representative if request.quantize else None)
    model.export(path, format="litert", verbose=False, **settings)


def load(path: str) -> Runner:
    """An interpreter on one thread; it takes one example after the other."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    details = interpreter.get_input_details()
    places = [entry["index"] for entry in details]
    results = [entry["index"] for entry in interpreter.get_output_details()]

    def one(example: list[np.ndarray]) -> list[np.ndarray]:
        for place, array in zip(places, example, strict=True):
            interpreter.set_tensor(place, array)
        interpreter.invoke()
        return [interpreter.get_tensor(place) for place in results]

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        check_inputs([entry["name"] for entry in details], inputs)
        outputs = [one([array[i : i + 1] for array in inputs]) for i in range(len(inputs[0]))]
        return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]

    return run


def tensors(path: str) -> list[FileTensor]:
    """The constants with two axes or more."""
    from ai_edge_litert import schema_py_generated as schema

    with open(path, "rb") as file:
        model = schema.ModelT.InitFromPackedBuf(file.read(), 0)
    found = [
        _tensor(tensor, model.buffers[tensor.buffer].data)
        for graph in model.subgraphs
        for tensor in graph.tensors
        if tensor.type in _DTYPES and model.buffers[tensor.buffer].data is not None and tensor.shape is not None
    ]
    return [tensor for tensor in found if tensor is not None]


def _tensor(tensor: Any, data: Any) -> FileTensor | None:
    values = np.frombuffer(bytes(data), _DTYPES[tensor.type])
    name, shape = tensor.name.decode("utf-8", "replace"), tuple(int(n) for n in tensor.shape)
    if tensor.sparsity is None:
        matrix = values.reshape(shape)
        return of_array(name, matrix) if is_weight(matrix) else None
    # A block that is kept may hold zeros, too.
    zeros = int(np.prod(shape)) - int(np.count_nonzero(values))
    kept = values.nbytes + sum(_index_bytes(axis) for axis in tensor.sparsity.dimMetadata)
    return FileTensor(name, shape, str(values.dtype), zeros, kept, True)


def _index_bytes(axis: Any) -> int:
    """What the segments and positions of one axis take."""
    arrays = [getattr(part, "values", None) for part in (axis.arraySegments, axis.arrayIndices) if part is not None]
    return sum(np.asarray(array).nbytes for array in arrays if array is not None)
