"""What was pruned and what it cost, as data and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import keras
import numpy as np

from keras_woodfisher.targets import Target, find_targets, prunable_targets


@dataclass(frozen=True)
class VariableReport:
    """One variable: its name, shape, number of weights and how many of them are zero."""

    name: str
    shape: tuple[int, ...]
    weights: int
    pruned: int

    @property
    def sparsity(self) -> float:
        return self.pruned / self.weights


@dataclass(frozen=True)
class PhaseReport:
    """One phase of the work.

    Attributes:
        name: `"gradients"`, `"inverse"` or `"update"`.
        seconds: Wall-clock time.
        peak_bytes: Growth of the process's anonymous memory at its peak, plus the peak on GPUs; None where
            the system doesn't tell.
    """

    name: str
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class PruningReport:
    """The outcome of `prune` or `sparsity_report`; `print` it to see a table.

    Attributes:
        variables: One entry a variable.
        phases: Where time and memory went (empty for `sparsity_report`).
        samples: Gradient samples that were used.
    """

    variables: tuple[VariableReport, ...]
    phases: tuple[PhaseReport, ...] = ()
    samples: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def weights(self) -> int:
        return sum(v.weights for v in self.variables)

    @property
    def pruned(self) -> int:
        return sum(v.pruned for v in self.variables)

    @property
    def sparsity(self) -> float:
        return self.pruned / self.weights if self.weights else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        data = asdict(self)
        data["variables"] = [{**asdict(v), "shape": list(v.shape), "sparsity": v.sparsity} for v in self.variables]
        return data | {"weights": self.weights, "pruned": self.pruned, "sparsity": self.sparsity}

    def __str__(self) -> str:
        rows = [(v.name, str(v.shape), v.weights, v.pruned, v.sparsity) for v in self.variables]
        rows.append(("total", "", self.weights, self.pruned, self.sparsity))
        cells: list[tuple[str, ...]] = [("variable", "shape", "weights", "pruned", "sparsity")]
        cells += [(n, s, f"{w:,}", f"{p:,}", f"{f:.4f}") for n, s, w, p, f in rows]
        lines = _align(cells)
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        for phase in self.phases:
            lines.append(f"{phase.name}: {phase.seconds:.2f} s{_memory(phase.peak_bytes)}")
        return "\n".join([*lines, *self.notes])


def sparsity_report(model: keras.Model, params: str | Sequence[str] | None = None) -> PruningReport:
    """Counts the zeros of a model's prunable variables.

    Args:
        model: Any built Keras model, pruned by whatever means.
        params: Names and patterns as in `WoodFisherPruning`; by default all kernels, frozen ones included.

    Raises:
        ValueError: If the model isn't built.
        KeyError: If a name matches nothing.
    """
    targets = prunable_targets(model) if params is None else find_targets(model, params)
    return PruningReport(count_zeros(targets))


def count_zeros(targets: Sequence[Target]) -> tuple[VariableReport, ...]:
    """A report of each variable as it is now."""
    return tuple(
        VariableReport(
            target.name,
            tuple(target.variable.shape),
            target.size,
            int(np.count_nonzero(target.read() == 0)),
        )
        for target in targets
    )


def _align(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _memory(peak: int | None) -> str:
    return "" if peak is None else f", {peak / 2**20:.0f} MiB at its peak"
