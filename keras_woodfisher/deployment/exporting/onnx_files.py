"""ONNX: kernels with many zeros as sparse initialisers, which ONNX Runtime unpacks when it loads the file."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_woodfisher.deployment.exporting.formats import Request, Runner, check_inputs
from keras_woodfisher.deployment.exporting.tensors import FileTensor, is_weight, of_array

_INDEX = np.dtype(np.int64)
"""What the format wants of positions: a value of 4 bytes takes 12 then, so that it pays from two thirds of zeros on."""

_SMALLEST = 256
"""Bytes that a tensor must have to be worth another entry."""


def write(model: keras.Model, path: str, request: Request) -> None:
    """Exports a model, and leaves zeros out where that takes fewer bytes and the request allows it."""
    import onnx

    model.export(path, format="onnx", verbose=False)
    if not request.sparse:
        return
    proto = onnx.load(path)
    if _leave_zeros_out(proto.graph):
        onnx.save(proto, path)


def _leave_zeros_out(graph: Any) -> int:
    """Turns initialisers into sparse ones where it pays; how many."""
    from onnx import helper, numpy_helper

    inputs = {value.name for value in graph.input}
    dense, made = [], 0
    for initializer in graph.initializer:
        values = numpy_helper.to_array(initializer)
        (kept,) = np.nonzero(values.ravel())
        # An initialiser that is an input too is only a default.
        if not _pays(values, len(kept)) or initializer.name in inputs:
            dense.append(initializer)
            continue
        entries = numpy_helper.from_array(values.ravel()[kept], initializer.name)
        positions = numpy_helper.from_array(kept.astype(_INDEX), f"{initializer.name}_positions")
        graph.sparse_initializer.append(helper.make_sparse_tensor(entries, positions, list(values.shape)))
        made += 1
    if made:
        del graph.initializer[:]
        graph.initializer.extend(dense)
    return made


def _pays(values: np.ndarray, kept: int) -> bool:
    if not is_weight(values) or values.nbytes < _SMALLEST or not kept:
        return False
    return kept * (values.itemsize + _INDEX.itemsize) + _SMALLEST < values.nbytes


def load(path: str) -> Runner:
    """A session of ONNX Runtime on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        check_inputs(names, inputs)
        return [np.asarray(output) for output in session.run(None, dict(zip(names, inputs, strict=True)))]

    return run


def tensors(path: str) -> list[FileTensor]:
    """The initialisers with two axes or more."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    found = [(entry.name, numpy_helper.to_array(entry)) for entry in graph.initializer]
    # Exporters put some weights into nodes.
    found += [
        (node.output[0], numpy_helper.to_array(attribute.t))
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    dense = [of_array(name, values) for name, values in found if is_weight(values)]
    return [*dense, *(_sparse(entry) for entry in graph.sparse_initializer)]


def _sparse(entry: Any) -> FileTensor:
    from onnx import numpy_helper

    values, shape = numpy_helper.to_array(entry.values), tuple(entry.dims)
    zeros = int(np.prod(shape)) - int(np.count_nonzero(values))
    kept = values.nbytes + numpy_helper.to_array(entry.indices).nbytes
    return FileTensor(entry.values.name, shape, str(values.dtype), zeros, kept, True)
