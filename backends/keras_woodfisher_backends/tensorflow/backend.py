"""TensorFlow: devices, and gradients in `tf.function`."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from keras_woodfisher_backends import devices
from keras_woodfisher_backends.keras_internals.recurrence import has_loops_over_time
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import host_kernel
from keras_woodfisher_backends.kernel.stacking import Stacking
from keras_woodfisher_backends.nest import arrays, fill, map_arrays, outline, take
from keras_woodfisher_backends.protocol import Backend, Loss, Sampler
from keras_woodfisher_backends.ranks.transport import Transport
from keras_woodfisher_backends.sampling.capture import Differentiation, Pass
from keras_woodfisher_backends.sampling.convolution import positions
from keras_woodfisher_backends.sampling.traces import trace_of
from keras_woodfisher_backends.sampling.verified import Gradients, VerifiedSampler, compared_in_place
from keras_woodfisher_backends.sampling.ways import Ways
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
        return VerifiedSampler(_TensorFlowGradients(loss, Ways(model, variables)), self.is_out_of_memory)

    def compiled(self, function: Callable[..., Any], loss: Loss) -> Callable[..., Any]:
        # In a graph, layers and their activations are fused, and then `relu` makes 0 of NaN.
        return function

    def outlined(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def dry_call(self, function: Callable[[Any], None], x: Any) -> None:
        function(x)

    def unfollowed(self, model: Any) -> str:
        strategy = getattr(model, "distribute_strategy", None)
        followed = (tf.distribute.MirroredStrategy, tf.distribute.OneDeviceStrategy)
        if getattr(strategy, "num_replicas_in_sync", 1) == 1 or type(strategy) in followed:
            return ""
        return type(strategy).__name__

    def transport(self) -> Transport | None:
        return None

    def whole(self, variable: Any) -> np.ndarray:
        return ops.convert_to_numpy(variable)

    def spread(self, array: np.ndarray, variable: Any) -> Any:
        return array

    def chunk_groups(self, examples: int, model: Any = None) -> int:
        on_host = devices.EXAMPLES_IN_TIME if has_loops_over_time(model) else 64
        return max(1, (devices.EXAMPLES if _logical("GPU") else on_host) // examples)

    def write_row(self, buffer: Any, slot: Any, row: Any) -> None:
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            # Each replica has the gradient of its part of the loss.
            row = context.all_reduce(tf.distribute.ReduceOp.SUM, row)
        buffer.value[slot].assign(row)

    def _device(self, name: str) -> str | None:
        kind, index = devices.resolve(name, len(_logical("GPU")), len(_logical("CPU")))
        return None if index < 0 else f"{kind.upper()}:{index}"


class _TensorFlowGradients:
    """Samples by capture, and one backward pass at a time; each structure of a batch is traced once."""

    manners = (True, False)
    """Whether the losses of all groups are taken at once."""

    def __init__(self, loss: Loss, ways: Ways):
        self.ways = ways
        self._loss = loss

    def captured(self, manner: bool, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[Any]:
        wanted = [place for place in range(len(values)) if place not in self.ways.direct]
        rows = partial(self._pass_over_chunk, manner)
        key = "captured", manner, *self.ways.left
        found = dict(zip(wanted, self._run(key, rows, wanted, values, others, batch), strict=True))
        return self.ways.in_keras_layout([found.get(place) for place in range(len(values))])

    def direct(
        self, values: Sequence[Any], others: Sequence[Any], batch: Any, places: Sequence[int]
    ) -> list[np.ndarray]:
        return self._run(("direct",), self._loop_over_chunk, list(places), values, others, batch)

    def direct_few(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        # Eagerly: to trace it would take longer than all else of a first call.
        batch = map_arrays(tf.convert_to_tensor, batch)
        rows = []
        with full_precision.changed():
            for index in range(arrays(batch)[0].shape[0]):
                grads = self._gradient(list(range(len(values))), values, others, take(batch, index))
                rows.append([_on_host(grad) for grad in grads])
        return [np.stack(row) for row in zip(*rows, strict=True)]

    def in_place(
        self, manner: bool, values: Sequence[Any], others: Sequence[Any], batch: Any, groups: Sequence[int]
    ) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
        batch = map_arrays(tf.convert_to_tensor, batch)
        with full_precision.changed(), tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(values)
            found = Pass(_Tape(tape, manner), self._loss, values, others, batch, self.ways)
            return compared_in_place(found, self._loss, values, others, batch, groups, _on_host)

    def _run(
        self, kind: Hashable, rows: Callable[..., Any], places: list[int], values: Any, others: Any, batch: Any
    ) -> list[np.ndarray]:
        # A loop in the graph takes no None: the structure of the batch is kept aside.
        outlined = outline(batch)
        key = kind, repr(outlined), *places, self._loss.identity
        trace = trace_of(self._loss.model, key, partial(tf.function, autograph=False))
        leaves = [tf.convert_to_tensor(leaf) for leaf in arrays(batch)]
        with full_precision.changed():
            found = trace(partial(rows, places, outlined), list(values), list(others), leaves)
            return [_on_host(row) for row in found]

    def _pass_over_chunk(
        self, manner: bool, places: list[int], outlined: Any, values: Any, others: Any, leaves: Any
    ) -> list[Any]:
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            found = Pass(_Tape(tape, manner), self._loss, values, others, fill(outlined, leaves), self.ways)
            rows = found.rows()
        return [rows[place] for place in places]

    def _loop_over_chunk(self, places: list[int], outlined: Any, values: Any, others: Any, leaves: Any) -> list[Any]:
        def one(group: Any) -> list[Any]:
            return self._gradient(places, values, others, fill(outlined, group))

        kinds = [values[place].dtype for place in places]
        return tf.map_fn(one, leaves, fn_output_signature=kinds, parallel_iterations=2)

    def _gradient(self, places: list[int], values: Any, others: Any, group: Any) -> list[Any]:
        wanted = [values[place] for place in places]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(wanted)
            value = self._loss(values, others, group)
        grads = tape.gradient(value, wanted, unconnected_gradients="zero")
        return [tf.convert_to_tensor(grad) for grad in grads]


def _on_host(row: Any) -> np.ndarray:
    # Not `.numpy()`, which copies.
    return np.zeros((), np.float32) if row is None else np.asarray(tf.cast(tf.convert_to_tensor(row), tf.float32))


class _Tape:
    """`Differentiation` for capturing.

    Args:
        tape: Records the pass.
        losses_at_once: Whether the losses of all groups are differentiated at once, or in a loop.
    """

    def __init__(self, tape: Any, losses_at_once: bool):
        self._losses_at_once = losses_at_once
        self._tape = tape
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

    def watch(self, tensor: Any) -> Any:
        if self._graph is not None and tensor.graph is not self._graph:
            return None
        self._tape.watch(tensor)
        return tensor

    def of_outputs(self, measure: Callable[[Any, Any], Any], batch: Any, output: Any) -> list[Any]:
        outlines = outline(batch), outline(output)
        outputs = arrays(output)

        def of_group(group: Any) -> Any:
            parts, predicted = group
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(predicted)
                loss = measure(fill(outlines[0], parts), fill(outlines[1], predicted))
            return tape.gradient(loss, predicted, unconnected_gradients="zero")

        with self._tape.stop_recording():
            if self._losses_at_once:
                return tf.vectorized_map(of_group, (arrays(batch), outputs), fallback_to_while_loop=False)
            kinds = [leaf.dtype for leaf in outputs]
            return tf.map_fn(of_group, (arrays(batch), outputs), fn_output_signature=kinds)

    def pulled_back(self, output: Any, grads: Any, tensors: Sequence[Any]) -> Sequence[Any]:
        with self._tape.stop_recording():
            return self._tape.gradient(arrays(output), list(tensors), output_gradients=list(grads))

    def group_by_group(
        self, function: Callable[[Sequence[Any], Sequence[Any]], Any], values: Sequence[Any], parts: Sequence[Any]
    ) -> Sequence[Any]:
        def of_group(part: Any) -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                total = function(values, part)
            grads = tape.gradient(total, values, unconnected_gradients="zero")
            return [tf.convert_to_tensor(grad) for grad in grads]

        with self._tape.stop_recording():
            kinds = [value.dtype for value in values]
            return tf.map_fn(of_group, list(parts), fn_output_signature=kinds, parallel_iterations=2)

    def kernel_gradient(self, x: Any, grad: Any, layer: Any, groups: int) -> Any:
        if len(layer.kernel_size) != 2 or max(layer.dilation_rate) > 1:
            return None
        if not hasattr(layer, "groups"):
            return None if len(set(layer.strides)) > 1 else self._depthwise_gradient(x, grad, layer, groups)
        if layer.groups > 1:
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

    def _depthwise_gradient(self, x: Any, grad: Any, layer: Any, groups: int) -> Any:
        """Groups stand side by side as channels, none of which looks at another."""

        def side_by_side(tensor: Any) -> Any:
            parts = tf.reshape(tensor, (groups, -1, *tensor.shape[1:]))
            return tf.reshape(tf.transpose(parts, (1, 2, 3, 0, 4)), (-1, *tensor.shape[1:3], groups * tensor.shape[3]))

        channels, size = x.shape[3], tuple(layer.kernel_size)
        shape = (*size, groups * channels, grad.shape[3] // channels)
        with self._tape.stop_recording():
            kernels = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
                input=side_by_side(x),
                filter_sizes=shape,
                out_backprop=side_by_side(grad),
                strides=[1, *layer.strides, 1],
                padding=layer.padding.upper(),
            )
            return tf.transpose(tf.reshape(kernels, (*size, groups, channels, shape[3])), (2, 3, 4, 0, 1))


def _logical(kind: str) -> list[Any]:
    return tf.config.list_logical_devices(kind)


_backend: type[Backend] = TensorFlowBackend
_differentiation: Callable[..., Differentiation] = _Tape
_gradients: Callable[..., Gradients] = _TensorFlowGradients
