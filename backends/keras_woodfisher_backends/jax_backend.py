"""JAX: `jit(vmap(grad))`, and `jax.scipy.linalg` in float64 on the chosen device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from keras_woodfisher_backends import devices
from keras_woodfisher_backends.kernel import BlockKernel, Operators
from keras_woodfisher_backends.numpy_backend import host_kernel
from keras_woodfisher_backends.protocol import Backend, Loss, Sampler

_SMALLEST_PANEL = 128


class JaxOperators:
    """`Operators` on one JAX device. Panels are padded, so that few shapes are ever compiled."""

    def __init__(self, device: Any):
        self._device = device

    @contextmanager
    def scope(self) -> Iterator[None]:
        with (
            jax.enable_x64(True),
            jax.default_device(self._device),
            jax.default_matmul_precision("highest"),
        ):
            yield

    def load(self, panel: np.ndarray) -> jax.Array:
        width = max(_SMALLEST_PANEL, 1 << (panel.shape[1] - 1).bit_length())
        padded = np.zeros((panel.shape[0], width), np.float32)
        padded[:, : panel.shape[1]] = panel
        return jax.device_put(padded, self._device)

    def gram(self, panel: jax.Array) -> jax.Array:
        return _gram(panel)

    def fisher(self, panel: jax.Array) -> jax.Array:
        return _gram(panel.T)

    def factor(self, matrix: jax.Array, ridge: float) -> jax.Array:
        factor = _factor(matrix, ridge)
        if not bool(jnp.isfinite(factor[-1, -1])):
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
        return np.array(jnp.square(_triangular_inverse(factor)).sum(0))

    def solve(self, factor: jax.Array, right: np.ndarray) -> np.ndarray:
        full = np.zeros(factor.shape[0])
        full[: right.size] = right
        return np.array(_solve(factor, full))

    def combine(self, panel: jax.Array, coefficients: np.ndarray) -> np.ndarray:
        full = np.zeros(panel.shape[1])
        full[: coefficients.size] = coefficients
        return np.array(_apply(panel, full))

    def project(self, panel: jax.Array, dual: np.ndarray) -> np.ndarray:
        return np.array(_apply(panel.T, dual))


@jax.jit
def _gram(panel: jax.Array) -> jax.Array:
    double = panel.astype(jnp.float64)
    return double @ double.T


@jax.jit
def _factor(matrix: jax.Array, ridge: float) -> jax.Array:
    return jnp.linalg.cholesky(matrix + ridge * jnp.eye(matrix.shape[0], dtype=matrix.dtype))


@jax.jit
def _triangular_inverse(factor: jax.Array) -> jax.Array:
    identity = jnp.eye(factor.shape[0], dtype=factor.dtype)
    return solve_triangular(factor, identity, lower=True)


@jax.jit
def _product_sums(inverse: jax.Array, panel: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.square(inverse @ panel).sum(0), jnp.square(inverse).sum(0) @ jnp.square(panel)


@jax.jit
def _solved_sums(factor: jax.Array, panel: jax.Array) -> jax.Array:
    rows = solve_triangular(factor, panel.astype(jnp.float64), lower=True)
    return jnp.square(rows).sum(0)


@jax.jit
def _solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    return cho_solve((factor, True), right)


@jax.jit
def _apply(panel: jax.Array, vector: jax.Array) -> jax.Array:
    return panel.astype(jnp.float64) @ vector


class JaxBackend:
    """The adapter for `KERAS_BACKEND=jax`."""

    name = "jax"

    def devices(self) -> list[str]:
        return list(devices.names(len(_gpus()), len(jax.devices("cpu"))))

    def kernel(self, device: str) -> BlockKernel:
        found = self._device(device)
        return host_kernel() if found is None else BlockKernel(JaxOperators(found))

    def free_memory(self, device: str) -> int | None:
        stats = self._memory(device)
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None

    def peak_memory(self, device: str) -> int | None:
        return self._memory(device).get("peak_bytes_in_use")

    def sampler(self, loss: Loss, model: Any, variables: Sequence[Any]) -> Sampler:
        return _JaxSampler(loss)

    def chunk_groups(self, examples: int) -> int:
        return max(1, 16 // examples)

    def write_row(self, buffer: Any, slot: Any, row: Any) -> None:
        start = (slot.astype("int32"), jnp.zeros((), "int32"))
        buffer.assign(jax.lax.dynamic_update_slice(buffer.value, row[None], start))

    def _device(self, name: str) -> Any:
        gpus, cpus = _gpus(), jax.devices("cpu")
        kind, index = devices.resolve(name, len(gpus), len(cpus))
        return None if index < 0 else (gpus if kind == "gpu" else cpus)[index]

    def _memory(self, name: str) -> dict[str, int]:
        device = self._device(name)
        return {} if device is None else device.memory_stats() or {}


class _JaxSampler:
    """`vmap` knows every layer."""

    slow_layers = None

    def __init__(self, loss: Loss):
        self._rows = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, None, 0)))

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        return [np.asarray(row, np.float32) for row in self._rows(list(values), list(others), batch)]


def _gpus() -> list[Any]:
    return [device for device in jax.devices() if device.platform == "gpu"]


_operators: type[Operators] = JaxOperators
_backend: type[Backend] = JaxBackend
