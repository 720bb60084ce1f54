"""PyTorch: captured layer inputs and output gradients, `torch.linalg` on the chosen device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from keras import ops

from keras_woodfisher_backends import devices
from keras_woodfisher_backends.capture import Capture, Differentiation
from keras_woodfisher_backends.kernel import BlockKernel, Operators
from keras_woodfisher_backends.nest import arrays, fill, map_arrays, outline, take
from keras_woodfisher_backends.numpy_backend import host_kernel
from keras_woodfisher_backends.protocol import Backend, Loss, Sampler
from keras_woodfisher_backends.shared_setting import SharedSetting
from keras_woodfisher_backends.verified import VerifiedSampler


class TorchOperators:
    """`Operators` on one torch device."""

    def __init__(self, device: str):
        self._device = torch.device(device)

    @contextmanager
    def scope(self) -> Iterator[None]:
        with _full_precision.changed(), torch.no_grad():
            yield

    def load(self, panel: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(panel)).to(self._device)

    def gram(self, panel: torch.Tensor) -> torch.Tensor:
        double = panel.double()
        return double @ double.T

    def fisher(self, panel: torch.Tensor) -> torch.Tensor:
        double = panel.double()
        return double.T @ double

    def factor(self, matrix: torch.Tensor, ridge: float) -> torch.Tensor:
        matrix.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise np.linalg.LinAlgError(f"Not positive definite at row {int(info)}.")
        return factor

    def leverage(self, factor: torch.Tensor) -> Callable[[torch.Tensor], tuple[np.ndarray, np.ndarray]]:
        inverse = _triangular_inverse(factor).float()
        columns = inverse.square().sum(0)
        return lambda panel: (_column_sums(inverse @ panel), _host(columns @ panel.square()))

    def leverage_float64(self, factor: torch.Tensor, panel: torch.Tensor) -> np.ndarray:
        return _column_sums(torch.linalg.solve_triangular(factor, panel.double(), upper=False))

    def inverse_diagonal(self, factor: torch.Tensor) -> np.ndarray:
        return _column_sums(_triangular_inverse(factor))

    def solve(self, factor: torch.Tensor, right: np.ndarray) -> np.ndarray:
        column = torch.from_numpy(right).to(self._device)[:, None]
        return torch.cholesky_solve(column, factor)[:, 0].cpu().numpy()

    def combine(self, panel: torch.Tensor, coefficients: np.ndarray) -> np.ndarray:
        return (panel.double() @ torch.from_numpy(coefficients).to(self._device)).cpu().numpy()

    def project(self, panel: torch.Tensor, dual: np.ndarray) -> np.ndarray:
        return (panel.double().T @ torch.from_numpy(dual).to(self._device)).cpu().numpy()


def _triangular_inverse(factor: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def _column_sums(rows: torch.Tensor) -> np.ndarray:
    return _host(rows.square().sum(0))


def _host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def _without_tf32() -> Callable[[], Any]:
    # TF32 has 10 bits of mantissa: a product in it would lose the small eigenvalues.
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The user chose it by `fp32_precision`, which torch refuses to mix with the older interface.
        backends: Any = torch.backends
        places = (backends.cuda.matmul, backends.mkldnn.matmul)
        chosen = [place.fp32_precision for place in places]
        _set_precisions(places, ["ieee"] * len(places))
        return lambda: _set_precisions(places, chosen)
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


def _set_precisions(places: Sequence[Any], values: Sequence[str]) -> None:
    for place, value in zip(places, values, strict=True):
        place.fp32_precision = value


_full_precision = SharedSetting(_without_tf32)


class TorchBackend:
    """The adapter for `KERAS_BACKEND=torch`."""

    name = "torch"

    def devices(self) -> list[str]:
        return list(devices.names(torch.cuda.device_count(), 1, "cuda"))

    def kernel(self, device: str) -> BlockKernel:
        kind, index = devices.resolve(device, torch.cuda.device_count(), 1)
        if index < 0:
            return host_kernel()
        return BlockKernel(TorchOperators("cpu" if kind == "cpu" else f"cuda:{index}"))

    def free_memory(self, device: str) -> int | None:
        kind, index = devices.resolve(device, torch.cuda.device_count(), 1)
        return torch.cuda.mem_get_info(index)[0] if kind == "gpu" else None

    def peak_memory(self, device: str) -> int | None:
        kind, index = devices.resolve(device, torch.cuda.device_count(), 1)
        return torch.cuda.max_memory_allocated(index) if kind == "gpu" else None

    def sampler(self, loss: Loss, model: Any, variables: Sequence[Any]) -> Sampler:
        capture = Capture(model, variables)
        gradients = _TorchGradients(loss, model, capture)
        ways = [partial(gradients.captured, vectorised) for vectorised in (True, False)]
        return VerifiedSampler(capture, ways, gradients.direct)

    def chunk_groups(self, examples: int) -> int:
        return max(1, 64 // examples)

    def write_row(self, buffer: Any, slot: Any, row: Any) -> None:
        buffer.value.index_copy_(0, slot.reshape(1).long(), row[None])


class _TorchGradients:
    """Samples by capture, and one backward pass at a time."""

    def __init__(self, loss: Loss, model: Any, capture: Capture):
        self._loss = loss
        self._model = model
        self._capture = capture

    def captured(self, vectorised: bool, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        values, others = [v.detach() for v in values], [v.detach() for v in others]
        with _evaluating(self._model), torch.enable_grad():
            batch = map_arrays(ops.convert_to_tensor, batch)
            rows = self._capture.sample(_Autograd(vectorised), self._loss, values, others, batch)
        return self._capture.in_keras_layout([row.detach().float().cpu().numpy() for row in rows])

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
    """`Differentiation` for capturing; the losses of all groups at once, or one after the other."""

    def __init__(self, vectorised: bool):
        self._vectorised = vectorised

    def watch(self, tensor: torch.Tensor) -> None:
        if not tensor.requires_grad:
            tensor.requires_grad_()

    def gradients(
        self, measure: Callable[[Any, Any], Any], batch: Any, output: Any, tensors: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor | None]:
        outlines = outline((batch, output))
        leaves = arrays((batch, output))

        def loss(*group: torch.Tensor) -> torch.Tensor:
            return measure(*fill(outlines, group))

        if self._vectorised:
            losses = torch.vmap(loss)(*leaves)
        else:
            losses = torch.stack([loss(*group) for group in zip(*leaves, strict=True)])
        return torch.autograd.grad(losses.sum(), tensors, allow_unused=True)

    def kernel_gradient(self, x: torch.Tensor, grad: torch.Tensor, layer: Any, groups: int) -> torch.Tensor | None:
        size = x.shape[0] // groups
        if size == 1:
            return None
        kernel = x.new_empty((grad.shape[-1], x.shape[-1] // layer.groups, *layer.kernel_size))
        none = [0] * len(layer.kernel_size)
        steps = list(layer.strides), none, list(layer.dilation_rate), False, none, layer.groups
        pairs = zip(grad.movedim(-1, 1).split(size), x.movedim(-1, 1).split(size), strict=True)
        backward = torch.ops.aten.convolution_backward
        # Neither the gradient of the input nor that of a bias.
        return torch.stack([backward(g, part, kernel, None, *steps, [False, True, False])[1] for g, part in pairs])


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


_operators: type[Operators] = TorchOperators
_backend: type[Backend] = TorchBackend
_differentiation: Callable[..., Differentiation] = _Autograd
