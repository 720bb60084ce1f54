"""PyTorch: devices, and gradients by captured layer inputs and output gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import numpy as np
import torch
from keras import ops
from torch.overrides import TorchFunctionMode

from keras_woodfisher_backends import devices
from keras_woodfisher_backends.keras_internals.recurrence import has_loops_over_time
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import host_kernel
from keras_woodfisher_backends.kernel.stacking import Stacking
from keras_woodfisher_backends.nest import arrays, fill, map_arrays, outline, take
from keras_woodfisher_backends.protocol import Backend, Loss, Sampler
from keras_woodfisher_backends.ranks.transport import Transport
from keras_woodfisher_backends.sampling.capture import Differentiation, Pass
from keras_woodfisher_backends.sampling.convolution import padded
from keras_woodfisher_backends.sampling.verified import Gradients, VerifiedSampler, compared_in_place
from keras_woodfisher_backends.sampling.ways import Ways
from keras_woodfisher_backends.torch.operators import TorchOperators, full_precision
from keras_woodfisher_backends.torch.transport import transport_now


class CudaDevices:
    """The accelerators that torch sees, CUDA's (or ROCm's), by index."""

    def count(self) -> int:
        return torch.cuda.device_count()

    def place(self, index: int) -> torch.device:
        """The device itself."""
        return torch.device("cuda", index)

    def free_memory(self, index: int) -> int:
        """Free bytes, what torch holds in reserve included."""
        unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        return torch.cuda.mem_get_info(index)[0] + unused

    def peak_memory(self, index: int) -> int:
        """Most bytes in use so far."""
        return torch.cuda.max_memory_allocated(index)


class TorchBackend:
    """The adapter for `KERAS_BACKEND=torch`."""

    name = "torch"
    is_out_of_memory = staticmethod(TorchOperators.is_out_of_memory)

    def __init__(self, accelerators: CudaDevices | None = None):
        self._accelerators = accelerators or CudaDevices()

    def devices(self) -> list[str]:
        return list(devices.names(self._accelerators.count(), 1, "cuda"))

    def kernel(self, device: str) -> BlockKernel:
        kind, index = self._resolve(device)
        if index < 0:
            return host_kernel()
        if kind == "cpu":
            return BlockKernel(TorchOperators(torch.device("cpu")))
        operators = TorchOperators(self._accelerators.place(index))
        return BlockKernel(operators, lanes=devices.LANES, stacking=Stacking(operators))

    def free_memory(self, device: str) -> int | None:
        kind, index = self._resolve(device)
        return self._accelerators.free_memory(index) if kind == "gpu" else None

    def peak_memory(self, device: str) -> int | None:
        kind, index = self._resolve(device)
        return self._accelerators.peak_memory(index) if kind == "gpu" else None

    @contextmanager
    def placed(self, device: str) -> Iterator[None]:
        kind, index = self._resolve(device)
        with full_precision.changed(), torch.no_grad(), keras.device(f"{kind}:{max(index, 0)}"):
            yield

    def in_turn(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def sampler(self, loss: Loss, model: Any, variables: Sequence[Any]) -> Sampler:
        return VerifiedSampler(_TorchGradients(loss, model, Ways(model, variables)), self.is_out_of_memory)

    def compiled(self, function: Callable[..., Any], loss: Loss) -> Callable[..., Any]:
        return function

    def outlined(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def dry_call(self, function: Callable[[Any], None], x: Any) -> None:
        function(x)

    def unfollowed(self, model: Any) -> str:
        spread = any(type(variable.value).__name__ == "DTensor" for variable in model.variables)
        return "variables of which each process holds a part (FSDP, DTensor)" if spread else ""

    def transport(self) -> Transport | None:
        return transport_now()

    def whole(self, variable: Any) -> np.ndarray:
        return ops.convert_to_numpy(variable)

    def spread(self, array: np.ndarray, variable: Any) -> Any:
        return array

    def chunk_groups(self, examples: int, model: Any = None) -> int:
        on_host = devices.EXAMPLES_IN_TIME if has_loops_over_time(model) else 64
        return max(1, (devices.EXAMPLES if self._accelerators.count() else on_host) // examples)

    def write_row(self, buffer: Any, slot: Any, row: Any) -> None:
        buffer.value.index_copy_(0, slot.reshape(1).long(), row[None])

    def _resolve(self, device: str) -> tuple[str, int]:
        return devices.resolve(device, self._accelerators.count(), 1)


class _TorchGradients:
    """Samples by capture, and one backward pass at a time."""

    manners = ((True, True), (True, False), (False, False))
    """Whether the losses of all groups are taken at once, and layers run again for all of them at once."""

    def __init__(self, loss: Loss, model: Any, ways: Ways):
        self.ways = ways
        self._loss = loss
        self._model = model

    def captured(
        self, manner: tuple[bool, bool], values: Sequence[Any], others: Sequence[Any], batch: Any
    ) -> list[np.ndarray | None]:
        values, others = [v.detach() for v in values], [v.detach() for v in others]
        with self._mode():
            return self._pass(manner, values, others, batch).in_keras_layout(_on_host)

    def direct(
        self, values: Sequence[Any], others: Sequence[Any], batch: Any, places: Sequence[int]
    ) -> list[np.ndarray]:
        leaves, others = [v.detach() for v in values], [v.detach() for v in others]
        wanted = [leaves[place].requires_grad_() for place in places]
        rows = []
        with self._mode(), _ContiguousKernels():
            batch = map_arrays(ops.convert_to_tensor, batch)
            for index in range(arrays(batch)[0].shape[0]):
                loss = self._loss(leaves, others, take(batch, index))
                grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
                # NumPy has no bfloat16.
                rows.append([grad.detach().float().cpu().numpy() for grad in grads])
        # One variable after the other, and not all of them twice.
        return [np.stack([row.pop(0) for row in rows]) for _ in wanted]

    def direct_few(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        return self.direct(values, others, batch, range(len(values)))

    def in_place(
        self, manner: tuple[bool, bool], values: Sequence[Any], others: Sequence[Any], batch: Any, groups: Sequence[int]
    ) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
        leaves, others = [v.detach().requires_grad_() for v in values], [v.detach() for v in others]
        with self._mode():
            batch = map_arrays(ops.convert_to_tensor, batch)
            found = self._pass(manner, leaves, others, batch)
            return compared_in_place(found, self._loss, leaves, others, batch, groups, _on_host)

    def _pass(self, manner: tuple[bool, bool], values: Sequence[Any], others: Sequence[Any], batch: Any) -> Pass:
        how = _Autograd(*manner)
        return Pass(how, self._loss, values, others, map_arrays(ops.convert_to_tensor, batch), self.ways)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        with full_precision.changed(), _evaluating(self._model), torch.enable_grad():
            yield


def _on_host(row: torch.Tensor | None) -> np.ndarray:
    # Contiguous here, with all threads: NumPy would have to move it with one.
    return np.zeros((), np.float32) if row is None else row.detach().float().contiguous().cpu().numpy()


_CONVOLUTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}


class _ContiguousKernels(TorchFunctionMode):
    """Lets torch differentiate convolutions of one example by kernels of one filter (of one channel, transposed).

    Keras transposes kernels. Where their first axis has length 1, its stride says nothing, but torch goes by it, and on
    the CPU it fails: "slow_conv2d: grad_weight must be contiguous".
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _CONVOLUTIONS and len(args) > 1 and len(args[1]) == 1:
            args = (args[0], args[1].contiguous(), *args[2:])
        return function(*args, **(kwargs or {}))


class _Autograd:
    """`Differentiation` for capturing.

    Args:
        losses_at_once: Whether the losses of all groups are differentiated at once, or one after the other.
        groups_at_once: The same of layers that are run again.
    """

    def __init__(self, losses_at_once: bool, groups_at_once: bool):
        self._losses_at_once = losses_at_once
        self._groups_at_once = groups_at_once

    def watch(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - no public way to tell
            return None
        if not tensor.requires_grad:
            tensor.requires_grad_()
        return tensor

    def of_outputs(self, measure: Callable[[Any, Any], Any], batch: Any, output: Any) -> list[torch.Tensor]:
        outputs = [leaf.detach() for leaf in arrays(output)]
        for leaf in outputs:
            if leaf.is_floating_point():
                leaf.requires_grad_()
        outlines = outline((batch, output))

        def loss(*group: torch.Tensor) -> torch.Tensor:
            return measure(*fill(outlines, group))

        leaves = [*arrays(batch), *outputs]
        if self._losses_at_once:
            losses = torch.vmap(loss)(*leaves)
        else:
            losses = torch.stack([loss(*group) for group in zip(*leaves, strict=True)])
        floats = [leaf for leaf in outputs if leaf.requires_grad]
        return list(torch.autograd.grad(losses.sum(), floats, allow_unused=True, materialize_grads=True))

    def pulled_back(self, output: Any, grads: Any, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        pairs = [(leaf, grad) for leaf, grad in zip(_floats(output), grads, strict=True) if leaf.requires_grad]
        if not pairs or not tensors:
            return [None] * len(tensors)
        outputs, seeds = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, tensors, seeds, allow_unused=True, retain_graph=True)

    def group_by_group(
        self,
        function: Callable[[Sequence[Any], Sequence[Any]], Any],
        values: Sequence[torch.Tensor],
        parts: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        values = tuple(value.detach() for value in values)

        def gradient(values: tuple[torch.Tensor, ...], *part: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.func.grad(lambda leaves: function(leaves, part))(values)

        if self._groups_at_once:
            return torch.vmap(gradient, (None, *[0] * len(parts)))(values, *parts)
        rows = []
        for part in zip(*parts, strict=True):
            leaves = [value.clone().requires_grad_() for value in values]
            total = function(leaves, part)
            rows.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
        return [torch.stack(row) for row in zip(*rows, strict=True)]

    def kernel_gradient(self, x: torch.Tensor, grad: torch.Tensor, layer: Any, groups: int) -> torch.Tensor | None:
        size = x.shape[0] // groups
        if size == 1 or not hasattr(layer, "groups"):
            return None
        x = padded(layer, x, grad.shape[1:-1])
        kernel = x.new_empty((grad.shape[-1], x.shape[-1] // layer.groups, *layer.kernel_size))
        none = [0] * len(layer.kernel_size)
        steps = list(layer.strides), none, list(layer.dilation_rate), False, none, layer.groups
        pairs = zip(grad.movedim(-1, 1).split(size), x.movedim(-1, 1).split(size), strict=True)
        backward = torch.ops.aten.convolution_backward
        # Neither the gradient of the input nor that of a bias.
        return torch.stack([backward(g, part, kernel, None, *steps, [False, True, False])[1] for g, part in pairs])


def _floats(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in arrays(output) if leaf.is_floating_point()]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Puts wrapped torch modules into inference mode, and back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


_backend: type[Backend] = TorchBackend
_differentiation: Callable[..., Differentiation] = _Autograd
_gradients: Callable[..., Gradients] = _TorchGradients
