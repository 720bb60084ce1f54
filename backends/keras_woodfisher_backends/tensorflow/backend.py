"""TensorFlow: devices, and gradients in `tf.function`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from keras_woodfisher_backends import devices
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import host_kernel
from keras_woodfisher_backends.kernel.stacking import Stacking
from keras_woodfisher_backends.nest import arrays, fill, outline
from keras_woodfisher_backends.protocol import Backend, Loss, Sampler
from keras_woodfisher_backends.sampling.capture import Capture, Differentiation
from keras_woodfisher_backends.sampling.convolution import positions
from keras_woodfisher_backends.sampling.verified import VerifiedSampler
from keras_woodfisher_backends.tensorflow.operators import ONE_AT_A_TIME, TensorFlowOperators, full_precision

_FEW_POSITIONS = 8
"""Up to so many positions of the output for each filter, a product of matrices is faster than TensorFlow's own way."""


class TensorFlowBackend:
    """The adapter for `KERAS_BACKEND=tensorflow`."""

    name = "tensorflow"
    is_out_of_memory = staticmethod(TensorFlowOperators.is_out_of_memory)

    def devices(self) -> list[str]:
        return list(devices.names(len(_logical("GPU")), len(_logical("CPU"))))

    def kernel(self, device: str) -> BlockKernel:
        found = self._device(device)
        if found is None:
            return host_kernel()
        operators = TensorFlowOperators(found)
        if "GPU" in found:
            return BlockKernel(operators, lanes=devices.LANES, stacking=Stacking(operators))
        return BlockKernel(operators)

    def free_memory(self, device: str) -> int | None:
        # TensorFlow reserves nearly all of a GPU for itself and doesn't tell the size of its pool.
        return None

    def peak_memory(self, device: str) -> int | None:
        found = self._device(device)
        if found is None or "GPU" not in found:
            return None
        return tf.config.experimental.get_memory_info(found)["peak"]

    @contextmanager
    def placed(self, device: str) -> Iterator[None]:
        with full_precision.changed(), tf.device(self._device(device) or "CPU:0"):
            yield

    def in_turn(self) -> AbstractContextManager[Any]:
        return ONE_AT_A_TIME

    def sampler(self, loss: Loss, model: Any, variables: Sequence[Any]) -> Sampler:
        capture = Capture(model, variables)
        gradients = _TensorFlowGradients(loss, capture)
        return VerifiedSampler(capture, [gradients.captured], gradients.direct, self.is_out_of_memory)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # In a graph, layers and their activations are fused, and then `relu` makes 0 of NaN.
        return function

    def dry_call(self, function: Callable[[Any], None], x: Any) -> None:
        function(x)

    def chunk_groups(self, examples: int) -> int:
        return max(1, (devices.EXAMPLES if _logical("GPU") else 64) // examples)

    def write_row(self, buffer: Any, slot: Any, row: Any) -> None:
        buffer.value[slot].assign(row)

    def _device(self, name: str) -> str | None:
        kind, index = devices.resolve(name, len(_logical("GPU")), len(_logical("CPU")))
        return None if index < 0 else f"{kind.upper()}:{index}"


class _TensorFlowGradients:
    """Samples by capture, and one backward pass at a time; each structure of a batch is traced once."""

    def __init__(self, loss: Loss, capture: Capture):
        self._loss = loss
        self._capture = capture
        self._compiled: dict[tuple[str, str], Any] = {}

    def captured(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        return self._capture.in_keras_layout(self._run(self._capture_chunk, values, others, batch))

    def direct(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        return self._run(self._loop_over_chunk, values, others, batch)

    def _run(self, rows: Callable[..., Any], values: Any, others: Any, batch: Any) -> list[np.ndarray]:
        # A loop in the graph takes no None: the structure of the batch is kept aside.
        outlined = outline(batch)
        key = rows.__name__, repr(outlined)
        if key not in self._compiled:
            self._compiled[key] = tf.function(partial(rows, outlined), autograph=False)
        leaves = [tf.convert_to_tensor(leaf) for leaf in arrays(batch)]
        rows_of = self._compiled[key]
        with full_precision.changed():
            # Not `.numpy()`, which copies.
            return [np.asarray(tf.cast(row, tf.float32)) for row in rows_of(list(values), list(others), leaves)]

    def _capture_chunk(self, outlined: Any, values: Any, others: Any, leaves: Any) -> list[Any]:
        batch = fill(outlined, leaves)
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            return self._capture.sample(_Tape(tape), self._loss, values, others, batch)

    def _loop_over_chunk(self, outlined: Any, values: Any, others: Any, leaves: Any) -> list[Any]:
        def one(group: Any) -> list[Any]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                value = self._loss(values, others, fill(outlined, group))
            grads = tape.gradient(value, values, unconnected_gradients="zero")
            return [tf.convert_to_tensor(grad) for grad in grads]

        kinds = [value.dtype for value in values]
        return tf.map_fn(one, leaves, fn_output_signature=kinds, parallel_iterations=2)


class _Tape:
    """`Differentiation` for capturing."""

    def __init__(self, tape: Any):
        self._tape = tape

    def watch(self, tensor: Any) -> None:
        self._tape.watch(tensor)

    def gradients(
        self, measure: Callable[[Any, Any], Any], batch: Any, output: Any, tensors: Sequence[Any]
    ) -> Sequence[Any]:
        outlines = outline(batch), outline(output)
        outputs = arrays(output)

        def of_group(group: Any) -> Any:
            parts, predicted = group
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(predicted)
                loss = measure(fill(outlines[0], parts), fill(outlines[1], predicted))
            return tape.gradient(loss, predicted, unconnected_gradients="zero")

        with self._tape.stop_recording():
            # A loop in the graph: losses may do what can't be vectorised.
            kinds = [leaf.dtype for leaf in outputs]
            grads = tf.map_fn(of_group, (arrays(batch), outputs), fn_output_signature=kinds)
            return self._tape.gradient(outputs, tensors, output_gradients=grads)

    def kernel_gradient(self, x: Any, grad: Any, layer: Any, groups: int) -> Any:
        if len(layer.kernel_size) != 2 or layer.groups > 1 or max(layer.dilation_rate) > 1:
            return None
        if positions(grad, groups) <= _FEW_POSITIONS * grad.shape[-1]:
            return None
        shape = [*layer.kernel_size, x.shape[-1], grad.shape[-1]]
        strides, padding = [1, *layer.strides, 1], layer.padding.upper()
        with self._tape.stop_recording():
            kernels = [
                tf.raw_ops.Conv2DBackpropFilter(
                    input=part, filter_sizes=shape, out_backprop=g, strides=strides, padding=padding
                )
                for part, g in zip(tf.split(x, groups), tf.split(grad, groups), strict=True)
            ]
            return tf.transpose(tf.stack(kernels), (0, 4, 3, 1, 2))


def _logical(kind: str) -> list[Any]:
    return tf.config.list_logical_devices(kind)


_backend: type[Backend] = TensorFlowBackend
_differentiation: Callable[..., Differentiation] = _Tape
