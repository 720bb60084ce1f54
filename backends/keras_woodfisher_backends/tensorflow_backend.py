"""TensorFlow: `tf.function` with `vectorized_map`, and `tf.linalg` on the chosen device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from keras_woodfisher_backends import devices
from keras_woodfisher_backends.capture import Capture, Differentiation
from keras_woodfisher_backends.kernel import BlockKernel, Operators
from keras_woodfisher_backends.nest import arrays, fill, outline
from keras_woodfisher_backends.numpy_backend import host_kernel
from keras_woodfisher_backends.protocol import Backend, Loss, Sampler
from keras_woodfisher_backends.shared_setting import SharedSetting
from keras_woodfisher_backends.verified import VerifiedSampler


class TensorFlowOperators:
    """`Operators` on one TensorFlow device."""

    def __init__(self, device: str):
        self._device = device

    @contextmanager
    def scope(self) -> Iterator[None]:
        with _full_precision.changed(), tf.device(self._device):
            yield

    def load(self, panel: np.ndarray) -> Any:
        return tf.convert_to_tensor(panel)

    def gram(self, panel: Any) -> Any:
        double = tf.cast(panel, tf.float64)
        return tf.matmul(double, double, transpose_b=True)

    def fisher(self, panel: Any) -> Any:
        double = tf.cast(panel, tf.float64)
        return tf.matmul(double, double, transpose_a=True)

    def factor(self, matrix: Any, ridge: float) -> Any:
        try:
            factor = tf.linalg.cholesky(tf.linalg.set_diag(matrix, tf.linalg.diag_part(matrix) + ridge))
        except tf.errors.InvalidArgumentError as error:
            raise np.linalg.LinAlgError("Not positive definite.") from error
        if not bool(tf.math.is_finite(factor[-1, -1])):
            raise np.linalg.LinAlgError("Not positive definite.")
        return factor

    def leverage(self, factor: Any) -> Callable[[Any], tuple[np.ndarray, np.ndarray]]:
        inverse = tf.cast(_triangular_inverse(factor), tf.float32)
        columns = tf.reduce_sum(tf.square(inverse), axis=0)
        return lambda panel: (
            _column_sums(tf.matmul(inverse, panel)),
            np.array(tf.linalg.matvec(tf.square(panel), columns, transpose_a=True), np.float64),
        )

    def leverage_float64(self, factor: Any, panel: Any) -> np.ndarray:
        return _column_sums(tf.linalg.triangular_solve(factor, tf.cast(panel, tf.float64)))

    def inverse_diagonal(self, factor: Any) -> np.ndarray:
        return _column_sums(_triangular_inverse(factor))

    def solve(self, factor: Any, right: np.ndarray) -> np.ndarray:
        return tf.linalg.cholesky_solve(factor, right[:, None])[:, 0].numpy()

    def combine(self, panel: Any, coefficients: np.ndarray) -> np.ndarray:
        return tf.linalg.matvec(tf.cast(panel, tf.float64), coefficients).numpy()

    def project(self, panel: Any, dual: np.ndarray) -> np.ndarray:
        return tf.linalg.matvec(tf.cast(panel, tf.float64), dual, transpose_a=True).numpy()


def _triangular_inverse(factor: Any) -> Any:
    return tf.linalg.triangular_solve(factor, tf.eye(factor.shape[0], dtype=factor.dtype))


def _column_sums(rows: Any) -> np.ndarray:
    return np.array(tf.reduce_sum(tf.square(rows), axis=0), np.float64)


def _without_tf32() -> Callable[[], Any]:
    # TF32 has 10 bits of mantissa: a product in it would lose the small eigenvalues.
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return partial(tf.config.experimental.enable_tensor_float_32_execution, before)


_full_precision = SharedSetting(_without_tf32)


class TensorFlowBackend:
    """The adapter for `KERAS_BACKEND=tensorflow`."""

    name = "tensorflow"

    def devices(self) -> list[str]:
        return list(devices.names(len(_logical("GPU")), len(_logical("CPU"))))

    def kernel(self, device: str) -> BlockKernel:
        found = self._device(device)
        return host_kernel() if found is None else BlockKernel(TensorFlowOperators(found))

    def free_memory(self, device: str) -> int | None:
        # TensorFlow reserves nearly all of a GPU for itself and doesn't tell the size of its pool.
        return None

    def peak_memory(self, device: str) -> int | None:
        found = self._device(device)
        if found is None or "GPU" not in found:
            return None
        return tf.config.experimental.get_memory_info(found)["peak"]

    def sampler(self, loss: Loss, model: Any, variables: Sequence[Any]) -> Sampler:
        capture = Capture(model, variables)
        gradients = _TensorFlowGradients(loss, capture)
        return VerifiedSampler(capture, [gradients.captured], gradients.direct)

    def chunk_groups(self, examples: int) -> int:
        return max(1, 64 // examples)

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
        return [tf.cast(row, tf.float32).numpy() for row in rows_of(list(values), list(others), leaves)]

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
        shape = [*layer.kernel_size, x.shape[-1], grad.shape[-1]]
        strides = [1, *layer.strides, 1]
        with self._tape.stop_recording():
            kernels = [
                tf.raw_ops.Conv2DBackpropFilter(
                    input=part, filter_sizes=shape, out_backprop=g, strides=strides, padding="VALID"
                )
                for part, g in zip(tf.split(x, groups), tf.split(grad, groups), strict=True)
            ]
            return tf.transpose(tf.stack(kernels), (0, 4, 3, 1, 2))


def _logical(kind: str) -> list[Any]:
    return tf.config.list_logical_devices(kind)


_operators: type[Operators] = TensorFlowOperators
_backend: type[Backend] = TensorFlowBackend
_differentiation: Callable[..., Differentiation] = _Tape
