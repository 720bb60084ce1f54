"""What was pruned and what it cost, as data and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import keras
import numpy as np

from keras_woodfisher.batchnorm_report import BatchNormReport
from keras_woodfisher.options import names
from keras_woodfisher.targets import ALL_PRUNABLE, Target, all_targets, named_targets

_PACKED = ("int4", "gptq", "awq")


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
        name: `"gradients"`, `"inverse"`, `"update"`, `"calibration"` or `"batchnorm"`.
        seconds: Wall-clock time.
        peak_bytes: Growth of the process's anonymous memory at its peak, plus the peak on GPUs; None where
            the system doesn't tell.
    """

    name: str
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class CalibrationReport:
    """What was chosen by the loss on held-out examples.

    Attributes:
        compensation: Damping of the compensation, or None: the weights that stay weren't compensated.
        steps: Damping of each Newton step.
        loss_removed: The loss on the held-out examples with the weights removed and nothing corrected.
        loss: The loss on them after the correction.
    """

    compensation: float | None
    steps: tuple[float, ...]
    loss_removed: float
    loss: float


@dataclass(frozen=True)
class StageReport:
    """One update, or one stage of several.

    Attributes:
        sparsity: Fraction of zeros after it.
        samples: Gradient samples that were used.
        damp: Ridge on the Fisher's diagonal for the scores; None without gradients.
        calibration: What was chosen, where there was a choice.
        phases: Where time and memory went.
    """

    sparsity: float
    samples: int = 0
    damp: float | None = None
    calibration: CalibrationReport | None = None
    phases: tuple[PhaseReport, ...] = ()


def merged(phases: Sequence[PhaseReport]) -> tuple[PhaseReport, ...]:
    """Phases of the same name as one: seconds added up, the largest peak."""
    found: dict[str, PhaseReport] = {}
    for phase in phases:
        before = found.get(phase.name, PhaseReport(phase.name, 0.0, phase.peak_bytes))
        peaks = [p.peak_bytes for p in (before, phase) if p.peak_bytes is not None]
        found[phase.name] = PhaseReport(phase.name, before.seconds + phase.seconds, max(peaks, default=None))
    return tuple(found.values())


@dataclass(frozen=True)
class PruningReport:
    """The outcome of `prune` or `sparsity_report`; `print` it to see a table.

    Attributes:
        variables: One entry a variable.
        phases: Where time and memory went (empty for `sparsity_report`).
        samples: Gradient samples that were used.
        notes: What else is worth knowing, printed under the table.
        stages: What was done in which order, and chosen on the way; printed where there were several.
        settings: How it was done: the values of `prune`'s options, given or taken from the preset.
        batchnorm: What became of BatchNorm statistics, where they were re-estimated.
    """

    variables: tuple[VariableReport, ...]
    phases: tuple[PhaseReport, ...] = ()
    samples: int = 0
    notes: tuple[str, ...] = field(default=())
    stages: tuple[StageReport, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    batchnorm: BatchNormReport | None = None

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
        data |= {"phases": list(data["phases"]), "notes": list(self.notes), "settings": dict(self.settings)}
        data["stages"] = [{**stage, "phases": list(stage["phases"])} for stage in data["stages"]]
        return data | {"weights": self.weights, "pruned": self.pruned, "sparsity": self.sparsity}

    def plot(self, ax: Any = None) -> Any:
        """Draws the sparsity of each variable as a horizontal bar, the first variable on top.

        Args:
            ax: The matplotlib `Axes` to draw on; by default a new figure's.

        Returns:
            The `Axes`.

        Raises:
            ImportError: If matplotlib isn't installed.
        """
        ax = new_axes((8, 1 + 0.3 * len(self.variables))) if ax is None else ax
        # By place, since two variables of one model may have the same name.
        places = range(len(self.variables))
        ax.barh(places, [v.sparsity for v in self.variables])
        ax.set_yticks(places, [v.name for v in self.variables])
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.axvline(self.sparsity, color="black", linestyle="--", label=f"total {self.sparsity:.4f}")
        ax.set_xlabel("sparsity (fraction of zeros)")
        ax.legend(loc="lower right")
        return ax

    def __str__(self) -> str:
        rows = [(v.name, str(v.shape), v.weights, v.pruned, v.sparsity) for v in self.variables]
        rows.append(("total", "", self.weights, self.pruned, self.sparsity))
        cells: list[tuple[str, ...]] = [("variable", "shape", "weights", "pruned", "sparsity")]
        cells += [(n, s, f"{w:,}", f"{p:,}", f"{f:.4f}") for n, s, w, p, f in rows]
        lines = aligned(cells)
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        for phase in self.phases:
            lines.append(f"{phase.name}: {phase.seconds:.2f} s{_memory(phase.peak_bytes)}")
        lines += _stages(self.stages)
        if self.settings:
            lines.append("settings: " + ", ".join(f"{name}={value!r}" for name, value in self.settings.items()))
        batchnorm = [] if self.batchnorm is None else [str(self.batchnorm)]
        return "\n".join([*lines, *batchnorm, *self.notes])


def _stages(stages: Sequence[StageReport]) -> list[str]:
    """A table of what was chosen, where there was a choice or there were several stages."""
    if len(stages) < 2 and not any(stage.calibration for stage in stages):
        return []
    cells: list[tuple[str, ...]] = [
        ("stage", "sparsity", "samples", "damp", "compensation", "Newton steps", "loss, weights removed", "corrected")
    ]
    for number, stage in enumerate(stages, start=1):
        chosen = stage.calibration
        figures = (
            ("", "", "", "")
            if chosen is None
            else (
                _damping(chosen.compensation),
                " ".join(f"{damp:.2g}" for damp in chosen.steps) or "-",
                f"{chosen.loss_removed:.4g}",
                f"{chosen.loss:.4g}",
            )
        )
        cells.append((str(number), f"{stage.sparsity:.4f}", f"{stage.samples:,}", _damping(stage.damp), *figures))
    return aligned(cells, left=1)


def _damping(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def sparsity_report(model: keras.Model, params: str | Sequence[str] = ALL_PRUNABLE) -> PruningReport:
    """Counts the zeros of a model's prunable variables.

    Args:
        model: Any built Keras model, pruned by whatever means.
        params: Names and patterns as in `WoodFisherPruning`; frozen and int8 variables are counted too.

    Raises:
        ValueError: If the model isn't built.
        KeyError: If a name matches nothing.
    """
    targets = named_targets(all_targets(model), names("params", params))
    packed = [t for t in targets if getattr(t.layer, "quantization_mode", None) in _PACKED]
    notes = [f"Not counted, since {t.layer.quantization_mode} packs several weights in one: {t.name}" for t in packed]
    return PruningReport(count_zeros([t for t in targets if t not in packed]), notes=tuple(notes))


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


def new_axes(size: tuple[float, float]) -> Any:
    """The `Axes` of a new figure of so many inches."""
    return load_pyplot().subplots(figsize=size, layout="constrained")[1]


def load_pyplot() -> Any:
    """What draws.

    Raises:
        ImportError: If matplotlib isn't installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib, which isn't installed. Install it with: pip install 'keras-woodfisher[plot]'."
        ) from error
    return pyplot


def aligned(cells: list[tuple[str, ...]], left: int = 2) -> list[str]:
    """Lines of a table, its first `left` columns flush left and the others flush right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _memory(peak: int | None) -> str:
    return "" if peak is None else f", {peak / 2**20:.0f} MiB at its peak"
