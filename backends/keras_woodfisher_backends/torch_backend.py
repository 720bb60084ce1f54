"""PyTorch: devices, and gradients by captured layer inputs and output gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from keras import ops

from keras_woodfisher_backends import devices
from keras_woodfisher_backends.capture import Capture, Differentiation
from keras_woodfisher_backends.kernel import BlockKernel
from keras_woodfisher_backends.nest import arrays, map_arrays, take
from keras_woodfisher_backends.numpy_backend import host_kernel
from keras_woodfisher_backends.protocol import Backend, Loss, Sampler
from keras_woodfisher_backends.torch_devices import CudaDevices
from keras_woodfisher_backends.torch_operators import TorchOperators
from keras_woodfisher_backends.verified import VerifiedSampler


class TorchBackend:
    """The adapter for `KERAS_BACKEND=torch`."""

    name = "torch"

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
        return BlockKernel(TorchOperators(self._accelerators.place(index)), lanes=devices.LANES)

    def free_memory(self, device: str) -> int | None:
        kind, index = self._resolve(device)
        return self._accelerators.free_memory(index) if kind == "gpu" else None

    def peak_memory(self, device: str) -> int | None:
        kind, index = self._resolve(device)
        return self._accelerators.peak_memory(index) if kind == "gpu" else None

    def sampler(self, loss: Loss, model: Any, variables: Sequence[Any]) -> Sampler:
        gradients = _TorchGradients(loss, model, variables)
        return VerifiedSampler(gradients.captured, gradients.direct)

    def chunk_groups(self, examples: int) -> int:
        return 32 if examples == 1 else 8

    def write_row(self, buffer: Any, slot: Any, row: Any) -> None:
        buffer.value.index_copy_(0, slot.reshape(1).long(), row[None])

    def _resolve(self, device: str) -> tuple[str, int]:
        return devices.resolve(device, self._accelerators.count(), 1)


class _TorchGradients:
    """Samples by capture, and one backward pass at a time."""

    def __init__(self, loss: Loss, model: Any, variables: Sequence[Any]):
        self._loss = loss
        self._model = model
        self._capture = Capture(model, variables)

    def captured(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray] | None:
        if not self._capture.usable or arrays(batch)[0].shape[1] != 1:
            return None
        values, others = [v.detach() for v in values], [v.detach() for v in others]
        with _evaluating(self._model), torch.enable_grad():
            batch = map_arrays(ops.convert_to_tensor, batch)
            rows = self._capture.sample(_Autograd(), self._loss, values, others, batch)
        return [row.detach().float().cpu().numpy() for row in rows]

    def direct(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        leaves, others = [v.detach().requires_grad_() for v in values], [v.detach() for v in others]
        rows = []
        with _evaluating(self._model), torch.enable_grad():
            batch = map_arrays(ops.convert_to_tensor, batch)
            for index in range(arrays(batch)[0].shape[0]):
                loss = self._loss(leaves, others, take(batch, index))
                grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
                # NumPy has no bfloat16.
                rows.append([grad.detach().float().cpu().numpy() for grad in grads])
        return [np.stack(row) for row in zip(*rows, strict=True)]


class _Autograd:
    """`Differentiation` for capturing."""

    def watch(self, tensor: torch.Tensor) -> None:
        if not tensor.requires_grad:
            tensor.requires_grad_()

    def gradients(self, total: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        return torch.autograd.grad(total, tensors, allow_unused=True)


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
_differentiation: type[Differentiation] = _Autograd
