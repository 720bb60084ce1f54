"""PyTorch: the block-wise mathematics by `torch.linalg`, on the chosen device and in full precision."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from keras_woodfisher_backends.kernel.operators import StackedOperators, unstacked
from keras_woodfisher_backends.kernel.threads import SharedSetting


def _without_tf32() -> Callable[[], Any]:
    # TF32 has 10 bits of mantissa: a product in it would lose the small eigenvalues, and gradient samples three digits.
    backends: Any = torch.backends
    put_back = [
        _set(
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
            "highest",
            lambda: (backends.cuda.matmul, backends.mkldnn.matmul),
        ),
        _set(
            lambda: backends.cudnn.allow_tf32,
            lambda allowed: setattr(backends.cudnn, "allow_tf32", allowed),
            False,
            lambda: (backends.cudnn.conv, backends.cudnn.rnn),
        ),
    ]
    return lambda: [restore() for restore in put_back]


def _set(
    read: Callable[[], Any], write: Callable[[Any], None], strict: Any, newer: Callable[[], Sequence[Any]]
) -> Callable[[], None]:
    """Changes a setting by torch's older interface, or by its newer one's places; returns what puts it back."""
    try:
        before = read()
    except RuntimeError:
        # The user chose it by `fp32_precision`, which torch refuses to mix with the older interface.
        places = newer()
        before = [place.fp32_precision for place in places]
        _set_precisions(places, ["ieee"] * len(places))
        return lambda: _set_precisions(places, before)
    write(strict)
    return lambda: write(before)


def _set_precisions(places: Sequence[Any], values: Sequence[str]) -> None:
    for place, value in zip(places, values, strict=True):
        place.fp32_precision = value


full_precision = SharedSetting(_without_tf32)
"""float32 products in full float32, on every device."""


class TorchOperators:
    """`StackedOperators` on one torch device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._idle: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            # torch loads its linear algebra at the first call, and fails where two threads make it at the same time.
            torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))

    @contextmanager
    def scope(self) -> Iterator[None]:
        with full_precision.changed(), torch.no_grad(), self._stream():
            yield

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """A stream that no other thread uses meanwhile: one's transfers overlap with another's work."""
        if self._device.type != "cuda":
            yield
            return
        try:
            stream = self._idle.pop()
        except IndexError:
            stream = torch.cuda.Stream(self._device)
        # What is on the device already may have been begun elsewhere.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._idle.append(stream)

    def finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @staticmethod
    def is_out_of_memory(error: Exception) -> bool:
        # Of the host torch says it in a plain RuntimeError.
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
        )
        if full and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return full

    def load(self, panel: np.ndarray) -> torch.Tensor:
        if self._device.type == "cpu":
            return torch.from_numpy(np.ascontiguousarray(panel))
        return self.load_stack((1, *panel.shape), [panel])[1][0]

    def padded(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape

    def load_stack(self, shape: tuple[int, int, int], parts: Iterable[np.ndarray]) -> tuple[np.ndarray, torch.Tensor]:
        host = self._host_array(shape)
        start = 0
        for part in parts:
            blocks = unstacked(part if part.flags.writeable else part.copy(), shape[2])
            # With all threads of torch, which NumPy would do with one.
            host[start : start + len(blocks)].copy_(torch.from_numpy(blocks))
            start += len(blocks)
            # Not beside the next one.
            del part, blocks
        return host.numpy(), host.to(self._device)

    def _host_array(self, shape: tuple[int, ...]) -> torch.Tensor:
        empty = partial(torch.empty, shape, dtype=torch.float32, device="cpu")
        if self._device.type == "cpu":
            return empty()
        try:
            # From there transfers are several times as fast.
            return empty(pin_memory=True)
        except RuntimeError:  # no more of the host's memory can be pinned
            return empty()

    def masked(self, panels: torch.Tensor, keep: np.ndarray) -> torch.Tensor:
        return panels * torch.from_numpy(keep).to(self._device)[:, None]

    def one(self, factors: torch.Tensor, place: int) -> torch.Tensor:
        return factors[place]

    def gram(self, panel: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        double = panel.double()
        return double @ double.mT if total is None else total.addmm_(double, double.mT)

    def fisher(self, panel: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        return self.gram(panel.mT, total)

    def plus(self, total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return total.add_(part)

    def minus(self, total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return total - part

    def factor(self, matrix: torch.Tensor, ridge: float) -> torch.Tensor:
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(ridge)
        # CUDA lets NaN pass in stacks. Samples that aren't finite always show on the diagonal.
        finite = diagonal.isfinite().all()
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not bool(finite & (info == 0).all() & factor.diagonal(dim1=-2, dim2=-1).isfinite().all()):
            raise np.linalg.LinAlgError("Not positive definite.")
        return factor

    def leverage(self, factor: torch.Tensor) -> Callable[[torch.Tensor], tuple[np.ndarray, np.ndarray]]:
        inverse = _triangular_inverse(factor).float()
        columns = inverse.square().sum(-2, keepdim=True)
        return lambda panel: (_column_sums(inverse @ panel), _host((columns @ panel.square()).squeeze(-2)))

    def leverage_float64(self, factor: torch.Tensor, panel: torch.Tensor) -> np.ndarray:
        return _column_sums(torch.linalg.solve_triangular(factor, panel.double(), upper=False))

    def inverse_diagonal(self, factor: torch.Tensor) -> np.ndarray:
        return _column_sums(_triangular_inverse(factor))

    def group_gram(self, factor: torch.Tensor, groups: np.ndarray) -> np.ndarray:
        panel = self.load(groups.reshape(len(groups), -1)).double()
        solved = torch.linalg.solve_triangular(factor, panel, upper=False)
        by_group = solved.reshape(groups.shape).permute(1, 2, 0)
        return _host(by_group @ by_group.transpose(1, 2))

    def solve(self, factor: torch.Tensor, right: np.ndarray) -> np.ndarray:
        column = torch.from_numpy(right).to(self._device)[..., None]
        return torch.cholesky_solve(column, factor)[..., 0].cpu().numpy()

    def host(self, matrix: torch.Tensor) -> np.ndarray:
        return _host(matrix)

    def combine(self, panel: torch.Tensor, coefficients: np.ndarray) -> np.ndarray:
        return self._apply(panel.double(), coefficients)

    def project(self, panel: torch.Tensor, dual: np.ndarray) -> np.ndarray:
        return self._apply(panel.double().mT, dual)

    def _apply(self, matrix: torch.Tensor, right: np.ndarray) -> np.ndarray:
        vectors = torch.from_numpy(right).to(self._device)
        product = matrix @ vectors if matrix.ndim == 2 else (matrix @ vectors[..., None])[..., 0]
        return product.cpu().numpy()


def _triangular_inverse(factor: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def _column_sums(rows: torch.Tensor) -> np.ndarray:
    return _host(rows.square().sum(-2))


def _host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


_: type[StackedOperators] = TorchOperators
