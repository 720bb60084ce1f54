"""TensorFlow: the block-wise mathematics by `tf.linalg`, on the chosen device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from keras_woodfisher_backends.operators import Operators
from keras_woodfisher_backends.tensorflow_precision import full_precision


class TensorFlowOperators:
    """`Operators` on one TensorFlow device."""

    def __init__(self, device: str):
        self._device = device

    @contextmanager
    def scope(self) -> Iterator[None]:
        with full_precision.changed(), tf.device(self._device):
            yield

    def finish(self) -> None:
        pass

    def is_out_of_memory(self, error: Exception) -> bool:
        return is_out_of_memory(error)

    def load(self, panel: np.ndarray) -> Any:
        return tf.convert_to_tensor(panel)

    def gram(self, panel: Any, total: Any) -> Any:
        double = tf.cast(panel, tf.float64)
        return _sum(total, tf.matmul(double, double, transpose_b=True))

    def fisher(self, panel: Any, total: Any) -> Any:
        double = tf.cast(panel, tf.float64)
        return _sum(total, tf.matmul(double, double, transpose_a=True))

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

    def group_gram(self, factor: Any, groups: np.ndarray) -> np.ndarray:
        panel = tf.cast(self.load(groups.reshape(len(groups), -1)), tf.float64)
        solved = tf.linalg.triangular_solve(factor, panel)
        by_group = tf.transpose(tf.reshape(solved, groups.shape), (1, 2, 0))
        # A copy: the tensor's own memory can't be written.
        return np.array(tf.matmul(by_group, by_group, transpose_b=True))

    def solve(self, factor: Any, right: np.ndarray) -> np.ndarray:
        return tf.linalg.cholesky_solve(factor, right[:, None])[:, 0].numpy()

    def host(self, matrix: Any) -> np.ndarray:
        return matrix.numpy()

    def combine(self, panel: Any, coefficients: np.ndarray) -> np.ndarray:
        return _apply(panel, coefficients, transpose=False)

    def project(self, panel: Any, dual: np.ndarray) -> np.ndarray:
        return _apply(panel, dual, transpose=True)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host is full."""
    return isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError))


def _apply(panel: Any, right: np.ndarray, transpose: bool) -> np.ndarray:
    columns = right.reshape(len(right), -1)
    product = tf.matmul(tf.cast(panel, tf.float64), columns, transpose_a=transpose).numpy()
    return product.reshape(-1, *right.shape[1:])


def _sum(total: Any, product: Any) -> Any:
    return product if total is None else total + product


def _triangular_inverse(factor: Any) -> Any:
    return tf.linalg.triangular_solve(factor, tf.eye(factor.shape[0], dtype=factor.dtype))


def _column_sums(rows: Any) -> np.ndarray:
    return np.array(tf.reduce_sum(tf.square(rows), axis=0), np.float64)


_: type[Operators] = TensorFlowOperators
