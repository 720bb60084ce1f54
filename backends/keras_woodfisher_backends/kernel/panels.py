"""The gradient samples of a block, panel by panel: what bounds the memory of a device, and fills its lanes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from keras_woodfisher_backends.kernel.lanes import side_by_side
from keras_woodfisher_backends.kernel.operators import Operators

PANEL = 4096
"""Columns of `G` that are worked on at a time: it bounds the memory when one block spans everything."""


SMALLEST_PANEL = 64
"""A device that has no room for so many columns is too small."""


class Samples(Protocol):
    """The gradient samples of a block: an array, or what reads them from elsewhere panel by panel."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, B)."""
        ...

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        """`samples[rows, columns]`, float32."""
        ...


Result = TypeVar("Result")


class Panels:
    """Sums and products over the columns of `G`, on one device.

    Where the device's memory is full, the panel is halved and the work begins anew.

    Args:
        operators: The framework's operators, bound to the device.
        panel: Columns of `G` to hold on the device at a time.
        lanes: See the attribute.
        on_host: See the attribute.

    Attributes:
        lanes: How many threads should call it at the same time, each for a block of its own.
        on_host: Whether its lanes share the cores of the host, and their BLAS threads.
    """

    def __init__(self, operators: Operators, panel: int = PANEL, lanes: int = 1, on_host: bool = False):
        self._ops = operators
        self._widest = self._panel = panel
        self.lanes = lanes
        self.on_host = on_host

    def memory(self, samples: int, width: int, group: int = 1, blocks: int | None = None) -> int:
        """Bytes that a lane takes at most, beside the gradients.

        Args:
            samples: Gradient samples (m).
            width: Weights of the widest block (B).
            group: The most weights that are scored together.
            blocks: How many blocks there are, if it is known.
        """
        matrix = 8 * min(samples, width) ** 2
        panel = 8 * samples * min(width, self._panel)
        # Double panel, product of the panel, and Fisher or Gram matrix, factor, its inverse and a copy.
        single = panel + panel // 2 + 4 * matrix
        if group == 1:
            return single
        rows, largest = min(samples, width), min(group, samples, width)
        columns = max(min(width, self._panel // 2), largest)
        # Columns of groups in float32, in float64, solved, and by group; the matrix of each group and its factor.
        return max(single, (4 + 3 * 8) * rows * columns + 2 * 8 * columns * largest + 5 * matrix)

    def staged(self, samples: int, width: int, columns: int) -> int:
        """Bytes of samples on their way to the device, which are contiguous copies on the host.

        Args:
            samples: Gradient samples (m).
            width: Weights of the widest block (B).
            columns: Weights of all blocks that may be taken together.
        """
        return 4 * samples * min(width, self._panel)

    def fit(self, samples: int, width: int, free: int, group: int = 1) -> None:
        """Makes the panel as narrow as the free memory of the device demands.

        Args:
            samples: Gradient samples (m).
            width: Weights of the widest block (B).
            free: Bytes that one lane may use.
            group: As in `memory`.
        """
        self._panel = self._widest
        while self._panel > SMALLEST_PANEL and self.memory(samples, width, group) > free:
            self._panel //= 2

    def gram(self, grads: Samples, keep: np.ndarray) -> np.ndarray:
        """`G_K G_K^T`, (m, m) float64, with the panels shared among all lanes.

        Args:
            grads: (m, B) float32.
            keep: (B,) bool, the set K; not empty.
        """
        lower = self._within_memory(lambda: self._ops.host(self._gram(grads, keep, alone=True)))
        size = grads.shape[0]
        lower = np.tril(lower[:size, :size])
        return lower + np.tril(lower, -1).T

    def combine(self, grads: Samples, coefficients: np.ndarray, alone: bool = False) -> np.ndarray:
        """`G u`, float64.

        Args:
            grads: (m, B) float32.
            coefficients: (B,) or (B, k).
            alone: Nothing else is worked on meanwhile: the panels are shared among all lanes.

        Returns:
            (m,) or (m, k).
        """
        return self._within_memory(lambda: self._combine(grads, coefficients, alone))

    def project(self, grads: Samples, keep: np.ndarray, dual: np.ndarray, out: np.ndarray, alone: bool = False) -> None:
        """`(G_K^T x)^T`, computed in float64.

        Args:
            grads: (m, B) float32.
            keep: (B,) bool, the set K.
            dual: (m,) or (m, k).
            out: (B,) or (k, B), written where `keep` is.
            alone: As in `combine`.
        """
        self._within_memory(lambda: self._project(grads, keep, dual, out, alone))

    def _within_memory(self, work: Callable[[], Result]) -> Result:
        while True:
            panel = self._panel
            try:
                with self._ops.scope():
                    return work()
            except Exception as error:
                if not self._ops.is_out_of_memory(error):
                    raise
                if panel <= SMALLEST_PANEL:
                    raise MemoryError(
                        f"A device has no room for the inverse Fisher of a block, {panel} columns at a time: {error}. "
                        "Lower num_grads, or use another device (available_gpus)."
                    ) from error
            # Another lane may have halved it meanwhile.
            self._panel = min(self._panel, panel // 2)

    def _gram(self, grads: Samples, keep: np.ndarray | None, alone: bool) -> Any:
        totals: dict[int, Any] = {}

        def work(part: slice, lane: int = 0) -> None:
            if keep is None or keep[part].any():
                panel = grads[:, part] if keep is None else chosen(grads[:, part], keep[part])
                totals[lane] = self._ops.gram(self._ops.load(panel), totals.get(lane))

        self._each(work, grads.shape[1], alone)
        first, *others = (totals[share] for share in sorted(totals))
        for total in others:
            first = self._ops.plus(first, total)
        return first

    def _project(
        self, grads: Samples, keep: np.ndarray, dual: np.ndarray, out: np.ndarray, alone: bool = False
    ) -> None:
        def work(part: slice, lane: int = 0) -> None:
            if keep[part].any():
                panel = chosen(grads[:, part], keep[part])
                out[..., part][..., keep[part]] = self._ops.project(self._ops.load(panel), dual)[: panel.shape[1]].T

        self._each(work, keep.size, alone)

    def _combine(self, grads: Samples, coefficients: np.ndarray, alone: bool = False) -> np.ndarray:
        size = grads.shape[0]
        totals = np.zeros((self.lanes, size, *coefficients.shape[1:]))

        def work(part: slice, lane: int = 0) -> None:
            here = coefficients[part]
            used: np.ndarray = (here.reshape(len(here), -1) != 0).any(axis=1)
            if used.any():
                panel = self._ops.load(chosen(grads[:, part], used))
                totals[lane] += self._ops.combine(panel, here[used])[:size]

        self._each(work, grads.shape[1], alone)
        return totals.sum(0)

    def _each(self, work: Callable[..., None], width: int, alone: bool) -> None:
        """Calls `work(columns, lane)` for each panel."""
        self._share(work, list(self._parts(width)), alone)

    def _share(self, work: Callable[..., None], parts: Sequence[Any], alone: bool) -> None:
        """Calls `work(part, lane)` for each part."""
        lanes = min(self.lanes, len(parts)) if alone else 1
        if lanes < 2:
            for part in parts:
                work(part)
            return

        def within(_: Any, share: int) -> None:
            with self._ops.scope():
                for part in parts[share::lanes]:
                    work(part, share)
                self._ops.finish()

        self._ops.finish()
        # Which panels are summed together doesn't depend on which lane is free: the result is always the same.
        side_by_side(range(lanes), range(lanes), within, cores=self.lanes if self.on_host else lanes)

    def _parts(self, size: int) -> Iterator[slice]:
        # Another lane may halve the panel meanwhile.
        step = self._panel
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))


def chosen(panel: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Some columns of a panel."""
    # `panel[:, columns]` would be laid out column after column, which is slow to work on.
    return panel if columns.all() else np.take(panel, np.flatnonzero(columns), axis=1)


class Factors(Panels):
    """Cholesky factors over panels; see `Panels` for its arguments."""

    def _dual_factor(self, grads: Samples, damp: float, keep: np.ndarray | None, alone: bool) -> Any:
        """Of `m damp I + G_K G_K^T` (m, m)."""
        return self._factor(self._gram(grads, keep, alone), grads.shape[0], damp)

    def _primal_factor(self, grads: Samples, damp: float, keep: np.ndarray | None) -> Any:
        """Of `m F_KK = m damp I + G_K^T G_K`, for few weights and any number of samples."""
        total = None
        for rows in self._parts(grads.shape[0]):
            panels = [
                grads[rows, part] if keep is None else chosen(grads[rows, part], keep[part])
                for part in self._parts(grads.shape[1])
            ]
            panel = panels[0] if len(panels) == 1 else np.concatenate(panels, axis=1)
            total = self._ops.fisher(self._ops.load(panel), total)
        return self._factor(total, grads.shape[0], damp)

    def _factor(self, matrix: Any, samples: int, damp: float) -> Any:
        try:
            return self._ops.factor(matrix, samples * damp)
        except np.linalg.LinAlgError as error:
            raise np.linalg.LinAlgError(
                f"The Fisher of a block isn't positive definite with damp={damp:g}: its gradients are too large for "
                "that damp, or not finite. Give a larger damp."
            ) from error


def least(panel: np.ndarray, damp: float) -> np.ndarray:
    """`damp / F_jj`: no `1 - leverage` is below it, whatever rounding says, so scores stay positive."""
    ridge = panel.shape[0] * damp
    return ridge / (ridge + np.square(panel.astype(np.float64)).sum(0))
