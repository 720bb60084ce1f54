"""TensorFlow: the block-wise mathematics by `tf.linalg`, on the chosen device and in full precision."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import tensorflow as tf

from keras_woodfisher_backends.kernel.operators import StackedOperators, fill_stack
from keras_woodfisher_backends.kernel.threads import SharedSetting

ONE_AT_A_TIME = threading.RLock()
"""Held while operations begin. A GPU goes on with them when it is given back.

On TensorFlow 2.21, threads that hand numbers of the host (shapes, for one) to operations on another device than the
host's first one now and then get each other's, mostly without an error, or wait for each other forever.
"""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def one_at_a_time(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that only one thread is in. It should return tensors: waiting for their numbers is for afterwards."""

    @wraps(function)
    def locked(*args: Any, **kwargs: Any) -> Result:
        with ONE_AT_A_TIME:
            return function(*args, **kwargs)

    return locked


def _without_tf32() -> Callable[[], Any]:
    # TF32 has 10 bits of mantissa: a product in it would lose the small eigenvalues, and gradient samples three digits.
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return partial(tf.config.experimental.enable_tensor_float_32_execution, before)


full_precision = SharedSetting(_without_tf32)
"""float32 products in full float32, on every device."""


class TensorFlowOperators:
    """`StackedOperators` on one TensorFlow device."""

    def __init__(self, device: str):
        self._device = device

    @contextmanager
    def scope(self) -> Iterator[None]:
        with full_precision.changed(), tf.device(self._device):
            yield

    def finish(self) -> None:
        pass

    @staticmethod
    def is_out_of_memory(error: Exception) -> bool:
        return isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError))

    @one_at_a_time
    def load(self, panel: np.ndarray) -> Any:
        return tf.convert_to_tensor(panel)

    def padded(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape

    def load_stack(self, shape: tuple[int, int, int], parts: Iterable[np.ndarray]) -> tuple[np.ndarray, Any]:
        host = np.empty(shape, np.float32)
        fill_stack(host, parts)
        return host, self.load(host)

    @one_at_a_time
    def masked(self, panels: Any, keep: np.ndarray) -> Any:
        return panels * tf.cast(keep[:, None], panels.dtype)

    @one_at_a_time
    def one(self, factors: Any, place: int) -> Any:
        return factors[place]

    @one_at_a_time
    def gram(self, panel: Any, total: Any) -> Any:
        double = tf.cast(panel, tf.float64)
        return _sum(total, tf.matmul(double, double, transpose_b=True))

    @one_at_a_time
    def fisher(self, panel: Any, total: Any) -> Any:
        double = tf.cast(panel, tf.float64)
        return _sum(total, tf.matmul(double, double, transpose_a=True))

    @one_at_a_time
    def plus(self, total: Any, part: Any) -> Any:
        return total + part

    @one_at_a_time
    def minus(self, total: Any, part: Any) -> Any:
        return total - part

    def factor(self, matrix: Any, ridge: float) -> Any:
        try:
            factor, finite = _factor(matrix, ridge)
            if finite.numpy():
                return factor
        except tf.errors.InvalidArgumentError as error:
            raise np.linalg.LinAlgError("Not positive definite.") from error
        raise np.linalg.LinAlgError("Not positive definite.")

    def leverage(self, factor: Any) -> Callable[[Any], tuple[np.ndarray, np.ndarray]]:
        inverse, columns = _single_inverse(factor)

        def column_sums(panel: Any) -> tuple[np.ndarray, np.ndarray]:
            leverage, spread = _product_sums(inverse, columns, panel)
            return np.array(leverage, np.float64), np.array(spread, np.float64)

        return column_sums

    def leverage_float64(self, factor: Any, panel: Any) -> np.ndarray:
        return np.array(_solved_sums(factor, panel))

    def inverse_diagonal(self, factor: Any) -> np.ndarray:
        return np.array(_inverse_sums(factor))

    def group_gram(self, factor: Any, groups: np.ndarray) -> np.ndarray:
        # A copy: the tensor's own memory can't be written.
        return np.array(_group_gram(factor, groups))

    def solve(self, factor: Any, right: np.ndarray) -> np.ndarray:
        return _solve(factor, right).numpy()

    def host(self, matrix: Any) -> np.ndarray:
        return matrix.numpy()

    def combine(self, panel: Any, coefficients: np.ndarray) -> np.ndarray:
        return _apply(panel, coefficients, transpose=False)

    def project(self, panel: Any, dual: np.ndarray) -> np.ndarray:
        return _apply(panel, dual, transpose=True)


def _sum(total: Any, product: Any) -> Any:
    return product if total is None else total + product


@one_at_a_time
def _factor(matrix: Any, ridge: float) -> tuple[Any, Any]:
    factor = tf.linalg.cholesky(tf.linalg.set_diag(matrix, tf.linalg.diag_part(matrix) + ridge))
    # What isn't finite always reaches the last entry.
    return factor, tf.reduce_all(tf.math.is_finite(factor[..., -1, -1]))


@one_at_a_time
def _single_inverse(factor: Any) -> tuple[Any, Any]:
    inverse = tf.cast(_triangular_inverse(factor), tf.float32)
    return inverse, tf.reduce_sum(tf.square(inverse), axis=-2, keepdims=True)


@one_at_a_time
def _product_sums(inverse: Any, columns: Any, panel: Any) -> tuple[Any, Any]:
    leverage = _column_sums(tf.matmul(inverse, panel))
    return leverage, tf.squeeze(tf.matmul(columns, tf.square(panel)), axis=-2)


@one_at_a_time
def _solved_sums(factor: Any, panel: Any) -> Any:
    return _column_sums(tf.linalg.triangular_solve(factor, tf.cast(panel, tf.float64)))


@one_at_a_time
def _inverse_sums(factor: Any) -> Any:
    return _column_sums(_triangular_inverse(factor))


@one_at_a_time
def _group_gram(factor: Any, groups: np.ndarray) -> Any:
    panel = tf.cast(tf.convert_to_tensor(groups.reshape(len(groups), -1)), tf.float64)
    solved = tf.linalg.triangular_solve(factor, panel)
    by_group = tf.transpose(tf.reshape(solved, groups.shape), (1, 2, 0))
    return tf.matmul(by_group, by_group, transpose_b=True)


@one_at_a_time
def _solve(factor: Any, right: np.ndarray) -> Any:
    return tf.squeeze(tf.linalg.cholesky_solve(factor, right[..., None]), axis=-1)


def _apply(panel: Any, right: np.ndarray, transpose: bool) -> np.ndarray:
    # A stack has a vector for each panel, a single panel any number of them.
    columns = right[..., None] if len(panel.shape) == 3 else right.reshape(len(right), -1)
    product = _product(panel, columns, transpose).numpy()
    return product[..., 0] if columns.ndim > right.ndim else product


@one_at_a_time
def _product(panel: Any, columns: np.ndarray, transpose: bool) -> Any:
    return tf.matmul(tf.cast(panel, tf.float64), columns, transpose_a=transpose)


def _triangular_inverse(factor: Any) -> Any:
    identity = tf.eye(factor.shape[-1], batch_shape=factor.shape[:-2], dtype=factor.dtype)
    return tf.linalg.triangular_solve(factor, identity)


def _column_sums(rows: Any) -> Any:
    return tf.reduce_sum(tf.square(rows), axis=-2)


_: type[StackedOperators] = TensorFlowOperators
