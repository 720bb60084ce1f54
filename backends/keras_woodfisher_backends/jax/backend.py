"""JAX: devices, and gradients by `jit(vmap(grad))`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from keras import ops

from keras_woodfisher_backends import devices
from keras_woodfisher_backends.jax.operators import JaxOperators
from keras_woodfisher_backends.jax.transport import transport_now
from keras_woodfisher_backends.keras_internals.recurrence import has_loops_over_time
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import host_kernel
from keras_woodfisher_backends.kernel.stacking import Stacking
from keras_woodfisher_backends.protocol import Backend, Loss, Sampler
from keras_woodfisher_backends.ranks.transport import Transport
from keras_woodfisher_backends.sampling.traces import trace_of


class JaxBackend:
    """The adapter for `KERAS_BACKEND=jax`."""

    name = "jax"
    is_out_of_memory = staticmethod(JaxOperators.is_out_of_memory)

    def devices(self) -> list[str]:
        return list(devices.names(len(_gpus()), len(_cpus())))

    def kernel(self, device: str) -> BlockKernel:
        found = self._device(device)
        if found is None:
            return host_kernel()
        operators = JaxOperators(found)
        if found.platform == "gpu":
            return BlockKernel(operators, lanes=devices.LANES, stacking=Stacking(operators))
        return BlockKernel(operators)

    def free_memory(self, device: str) -> int | None:
        stats = self._memory(device)
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None

    def peak_memory(self, device: str) -> int | None:
        return self._memory(device).get("peak_bytes_in_use")

    @contextmanager
    def placed(self, device: str) -> Iterator[None]:
        found = self._device(device) or jax.local_devices(backend="cpu")[0]
        with jax.default_device(found), jax.default_matmul_precision("highest"):
            yield

    def in_turn(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def sampler(self, loss: Loss, model: Any, variables: Sequence[Any]) -> Sampler:
        return _JaxSampler(loss)

    def compiled(self, function: Callable[..., Any], loss: Loss) -> Callable[..., Any]:
        return partial(trace_of(loss.model, ("loss", loss.identity), jax.jit), function)

    def outlined(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            shapes = jax.eval_shape(function, *args)
        except jax.errors.JAXTypeError:
            return function(*args)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def dry_call(self, function: Callable[[Any], None], x: Any) -> None:
        try:
            jax.eval_shape(function, x)
        except Exception:  # noqa: BLE001 (from within a layer, Keras makes other errors of JAX's own)
            function(x)

    def unfollowed(self, model: Any) -> str:
        return ""

    def transport(self) -> Transport | None:
        return transport_now()

    def whole(self, variable: Any) -> np.ndarray:
        value = getattr(variable, "value", variable)
        if value.is_fully_addressable or value.is_fully_replicated:
            return np.asarray(ops.convert_to_numpy(value))
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))

    def spread(self, array: np.ndarray, variable: Any) -> Any:
        value = variable.value
        if value.is_fully_addressable:
            return array
        # JAX compares what it is to spread itself: a process that fails meanwhile would leave the others there.
        cast = array.astype(value.dtype)
        return jax.make_array_from_callback(cast.shape, value.sharding, lambda index: cast[index])

    def chunk_groups(self, examples: int, model: Any = None) -> int:
        on_host = 64 if has_loops_over_time(model) else 16
        return max(1, (devices.EXAMPLES if _gpus() else on_host) // examples)

    def write_row(self, buffer: Any, slot: Any, row: Any) -> None:
        start = (slot.astype("int32"), jnp.zeros((), "int32"))
        buffer.assign(jax.lax.dynamic_update_slice(buffer.value, row[None], start))

    def _device(self, name: str) -> Any:
        gpus, cpus = _gpus(), _cpus()
        kind, index = devices.resolve(name, len(gpus), len(cpus))
        return None if index < 0 else (gpus if kind == "gpu" else cpus)[index]

    def _memory(self, name: str) -> dict[str, int]:
        device = self._device(name)
        return {} if device is None else device.memory_stats() or {}


class _JaxSampler:
    """`vmap` knows every layer."""

    slow_layers = None

    def __init__(self, loss: Loss):
        self._loss = loss
        self._trace = trace_of(loss.model, ("rows", loss.identity), _gradients_of_groups)

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        # GPUs would round the factors of products to TF32.
        with jax.default_matmul_precision("highest"):
            rows = self._trace(self._loss, list(values), list(others), batch)
            return [np.asarray(row, np.float32) for row in rows]


def _gradients_of_groups(loss: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, None, 0)))


@contextmanager
def light_compilation() -> Iterator[None]:
    """What is compiled meanwhile is hardly optimised: worth it for what runs once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _gpus() -> list[Any]:
    return [device for device in jax.local_devices() if device.platform == "gpu"]


def _cpus() -> list[Any]:
    try:
        return jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves them out
        return []


_backend: type[Backend] = JaxBackend
