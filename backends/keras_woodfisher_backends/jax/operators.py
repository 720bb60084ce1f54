"""JAX: the block-wise mathematics by `jax.scipy.linalg` in float64, on the chosen device."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from keras_woodfisher_backends.kernel.operators import StackedOperators, fill_stack

_SMALLEST_PANEL = 128
_ROWS = 32
_SMALLEST_BLOCK = 32
_GROUP = 8


class JaxOperators:
    """`StackedOperators` on one JAX device. Panels are padded, so that few shapes are ever compiled."""

    def __init__(self, device: Any):
        self._device = device

    @contextmanager
    def scope(self) -> Iterator[None]:
        with jax.enable_x64(True), jax.default_device(self._device), jax.default_matmul_precision("highest"):
            yield

    def finish(self) -> None:
        pass

    @staticmethod
    def is_out_of_memory(error: Exception) -> bool:
        of_device = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
        return of_device or isinstance(error, MemoryError)

    def load(self, panel: np.ndarray) -> jax.Array:
        rows, columns = panel.shape
        # A sample that was dropped changes the number of rows.
        padded = np.zeros((-(-rows // _ROWS) * _ROWS, _power_of_two(columns, _SMALLEST_PANEL)), np.float32)
        padded[:rows, :columns] = panel
        return jax.device_put(padded, self._device)

    def padded(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        number, rows, columns = shape
        return _power_of_two(number), -(-rows // _ROWS) * _ROWS, _power_of_two(columns, _SMALLEST_BLOCK)

    def load_stack(self, shape: tuple[int, int, int], parts: Iterable[np.ndarray]) -> tuple[np.ndarray, jax.Array]:
        number, rows, columns = shape
        padded = np.zeros(self.padded(shape), np.float32)
        host = padded[:number, :rows, :columns]
        fill_stack(host, parts)
        return host, jax.device_put(padded, self._device)

    def masked(self, panels: jax.Array, keep: np.ndarray) -> jax.Array:
        return _masked(panels, _padded(keep, panels.shape[0], panels.shape[2]))

    def one(self, factors: jax.Array, place: int) -> jax.Array:
        return _one(factors, place)

    def gram(self, panel: jax.Array, total: jax.Array | None) -> jax.Array:
        return _gram(panel) if total is None else total + _gram(panel)

    def fisher(self, panel: jax.Array, total: jax.Array | None) -> jax.Array:
        return self.gram(panel.mT, total)

    def plus(self, total: jax.Array, part: jax.Array) -> jax.Array:
        return total + part

    def minus(self, total: jax.Array, part: jax.Array) -> jax.Array:
        return total - part

    def factor(self, matrix: jax.Array, ridge: float) -> jax.Array:
        factor = _factor(matrix, ridge)
        if not np.isfinite(np.asarray(factor[..., -1, -1])).all():
            raise np.linalg.LinAlgError("Not positive definite.")
        return factor

    def leverage(self, factor: jax.Array) -> Callable[[jax.Array], tuple[np.ndarray, np.ndarray]]:
        inverse = _triangular_inverse(factor).astype(jnp.float32)

        def column_sums(panel: jax.Array) -> tuple[np.ndarray, np.ndarray]:
            leverage, spread = _product_sums(inverse, panel)
            return np.array(leverage, np.float64), np.array(spread, np.float64)

        return column_sums

    def leverage_float64(self, factor: jax.Array, panel: jax.Array) -> np.ndarray:
        return np.array(_solved_sums(factor, panel))

    def inverse_diagonal(self, factor: jax.Array) -> np.ndarray:
        return np.array(jnp.square(_triangular_inverse(factor)).sum(-2))

    def group_gram(self, factor: jax.Array, groups: np.ndarray) -> np.ndarray:
        rows, number, size = groups.shape
        # Few shapes are compiled: zero columns belong to no result.
        shape = factor.shape[0], 1 << (number - 1).bit_length(), -(-size // _GROUP) * _GROUP if size > _GROUP else size
        padded = np.zeros(shape, np.float32)
        padded[:rows, :number, :size] = groups
        blocks = np.array(_group_gram(factor, jax.device_put(padded, self._device)))
        return np.ascontiguousarray(blocks[:number, :size, :size])

    def solve(self, factor: jax.Array, right: np.ndarray) -> np.ndarray:
        return np.array(_solve(factor, _padded(right, *_like(factor, right))))

    def host(self, matrix: jax.Array) -> np.ndarray:
        return np.array(matrix)

    def combine(self, panel: jax.Array, coefficients: np.ndarray) -> np.ndarray:
        return np.array(_apply(panel, _padded(coefficients, *_like(panel, coefficients))))

    def project(self, panel: jax.Array, dual: np.ndarray) -> np.ndarray:
        return np.array(_apply(panel.mT, _padded(dual, *_like(panel.mT, dual))))


def _power_of_two(number: int, smallest: int = 1) -> int:
    """The next power of two, not below the smallest."""
    return max(smallest, 1 << (number - 1).bit_length())


def _like(matrix: jax.Array, right: np.ndarray) -> tuple[int, ...]:
    """The shape of what a matrix (or a stack of them) is to be multiplied by."""
    return (matrix.shape[0], matrix.shape[2]) if matrix.ndim == 3 else (matrix.shape[1], *right.shape[1:])


def _padded(array: np.ndarray, *shape: int) -> np.ndarray:
    """Zeros at the end of each axis."""
    return np.pad(array, [(0, size - now) for size, now in zip(shape, array.shape, strict=True)])


_QUICK = {"xla_gpu_enable_triton_gemm": False}
"""XLA would try dozens of kernels of its own for each product on a GPU (20 s for an update, not 2); none is faster."""


@cache
def _options() -> dict[str, bool]:
    """Of those only what this XLA knows."""
    try:
        jax.jit(lambda x: x, compiler_options=_QUICK)(0.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return _QUICK


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    @cache
    def jitted() -> Callable[..., Any]:
        return jax.jit(function, compiler_options=_options())

    @wraps(function)
    def run(*args: Any) -> Any:
        return jitted()(*args)

    return run


@_compiled
def _gram(panel: jax.Array) -> jax.Array:
    double = panel.astype(jnp.float64)
    return double @ double.mT


@_compiled
def _factor(matrix: jax.Array, ridge: float) -> jax.Array:
    return jnp.linalg.cholesky(matrix + ridge * jnp.eye(matrix.shape[-1], dtype=matrix.dtype))


@_compiled
def _triangular_inverse(factor: jax.Array) -> jax.Array:
    identity = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return solve_triangular(factor, identity, lower=True)


@_compiled
def _masked(panels: jax.Array, keep: jax.Array) -> jax.Array:
    return panels * keep[:, None]


@_compiled
def _one(factors: jax.Array, place: int) -> jax.Array:
    return factors[place]


@_compiled
def _product_sums(inverse: jax.Array, panel: jax.Array) -> tuple[jax.Array, jax.Array]:
    columns = jnp.square(inverse).sum(-2, keepdims=True)
    return jnp.square(inverse @ panel).sum(-2), (columns @ jnp.square(panel)).squeeze(-2)


@_compiled
def _solved_sums(factor: jax.Array, panel: jax.Array) -> jax.Array:
    rows = solve_triangular(factor, panel.astype(jnp.float64), lower=True)
    return jnp.square(rows).sum(0)


@_compiled
def _group_gram(factor: jax.Array, groups: jax.Array) -> jax.Array:
    panel = groups.astype(jnp.float64).reshape(groups.shape[0], -1)
    by_group = solve_triangular(factor, panel, lower=True).reshape(groups.shape).transpose(1, 2, 0)
    return by_group @ by_group.transpose(0, 2, 1)


@_compiled
def _solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    half = solve_triangular(factor, right[..., None], lower=True)
    return solve_triangular(factor, half, trans=1, lower=True)[..., 0]


@_compiled
def _apply(panel: jax.Array, vector: jax.Array) -> jax.Array:
    double = panel.astype(jnp.float64)
    return double @ vector if double.ndim == 2 else (double @ vector[..., None])[..., 0]


_: type[StackedOperators] = JaxOperators
