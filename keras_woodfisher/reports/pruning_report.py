"""What was pruned and what it cost, as data and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from keras_woodfisher.reports.batchnorm_report import BatchNormReport
from keras_woodfisher.reports.layer_report import ReconstructionReport
from keras_woodfisher.reports.rendering import aligned, axes_of


@dataclass(frozen=True)
class VariableReport:
    """One variable.

        >>> first = kw.sparsity_report(model).variables[0]
        >>> first.shape, first.weights, first.pruned, first.sparsity
        ((2, 16), 32, 0, 0.0)

    Attributes:
        name: Its path.
        shape: Its shape.
        weights: Its number of weights.
        pruned: How many of them are zero.
    """

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

        >>> report = kw.prune(model, (x, y), 0.5, quality="fast", num_grads=32, verbose=0)
        >>> [phase.name for phase in report.phases]
        ['gradients', 'inverse', 'update']

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
        examples: How many examples were differentiated for Newton steps, in all (beside those of the samples).
    """

    compensation: float | None
    steps: tuple[float, ...]
    loss_removed: float
    loss: float
    examples: int


@dataclass(frozen=True)
class StageReport:
    """One update, or one stage of several.

        >>> report = kw.prune(model, (x, y), 0.75, quality="fast", stages=2, num_grads=32, verbose=0)
        >>> [(stage.sparsity, stage.samples) for stage in report.stages]
        [(0.5, 32), (0.75, 32)]

    Attributes:
        sparsity: Fraction of zeros after it.
        samples: Gradient samples that were used.
        damp: Ridge on the Fisher's diagonal for the scores; None without gradients.
        calibration: What was chosen, where there was a choice.
        phases: Where time and memory went.
        epoch: When it was, in epochs since training began; None in one shot.
        by_magnitude: Whether magnitude pruning was as good on held-out examples, and was done instead.
    """

    sparsity: float
    samples: int = 0
    damp: float | None = None
    calibration: CalibrationReport | None = None
    phases: tuple[PhaseReport, ...] = ()
    epoch: float | None = None
    by_magnitude: bool = False


def merged(phases: Sequence[PhaseReport]) -> tuple[PhaseReport, ...]:
    """Phases of the same name as one: seconds added up, the largest peak."""
    found: dict[str, PhaseReport] = {}
    for phase in phases:
        before = found.get(phase.name, PhaseReport(phase.name, 0.0, phase.peak_bytes))
        peaks = [p.peak_bytes for p in (before, phase) if p.peak_bytes is not None]
        found[phase.name] = PhaseReport(phase.name, before.seconds + phase.seconds, max(peaks, default=None))
    return tuple(found.values())


def combined(reports: Sequence["PruningReport"], variables: tuple[VariableReport, ...]) -> "PruningReport":
    """Several reports as one, in their order; settings are numbered where there are several.

    Args:
        reports: Of work that was done one after the other.
        variables: As they are now.
    """
    several = len(reports) > 1
    return PruningReport(
        variables,
        merged([phase for report in reports for phase in report.phases]),
        sum(report.samples for report in reports),
        tuple(dict.fromkeys(note for report in reports for note in report.notes)),
        tuple(stage for report in reports for stage in report.stages),
        {
            f"{number}.{name}" if several else name: value
            for number, report in enumerate(reports, start=1)
            for name, value in report.settings.items()
        },
    )


@dataclass(frozen=True)
class PruningReport:
    """The outcome of `prune` or `sparsity_report`; `print` it to see a table.

        >>> report = kw.prune(model, sparsity=0.25, method="magnitude")
        >>> report.pruned, report.weights, report.sparsity
        (20, 80, 0.25)
        >>> sorted(report.as_dict())[:3]
        ['batchnorm', 'notes', 'phases']

    Attributes:
        variables: One entry a variable.
        phases: Where time and memory went (empty for `sparsity_report`).
        samples: Gradient samples that were used.
        notes: What else is worth knowing, printed under the table.
        stages: What was done in which order, and chosen on the way; printed where there were several.
        settings: How it was done: the values of `prune`'s options, given or taken from the preset.
        batchnorm: What became of BatchNorm statistics, where they were re-estimated.
        reconstruction: What became of each layer's output, where layers were reconstructed.
    """

    variables: tuple[VariableReport, ...]
    phases: tuple[PhaseReport, ...] = ()
    samples: int = 0
    notes: tuple[str, ...] = field(default=())
    stages: tuple[StageReport, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    batchnorm: BatchNormReport | None = None
    reconstruction: ReconstructionReport | None = None

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
        data |= {"phases": list(data["phases"]), "notes": list(self.notes)}
        # The keys of JSON objects are texts.
        data["settings"] = {
            name: {str(key): part for key, part in value.items()} if isinstance(value, Mapping) else value
            for name, value in self.settings.items()
        }
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
            TypeError: If `ax` is something else.
        """
        ax = axes_of(ax, (8, 1 + 0.3 * len(self.variables)))
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
        parts = [str(part) for part in (self.reconstruction, self.batchnorm) if part is not None]
        return "\n".join([*lines, *parts, *self.notes])


def _stages(stages: Sequence[StageReport]) -> list[str]:
    """A table of what was chosen, where there was a choice or there were several stages."""
    if len(stages) < 2 and not any(stage.calibration or stage.by_magnitude for stage in stages):
        return []
    rows = [{"stage": str(number), **_figures(stage)} for number, stage in enumerate(stages, start=1)]
    header = list(dict.fromkeys(name for row in rows for name in row))
    return aligned([tuple(header), *(tuple(row.get(name, "") for name in header) for row in rows)], left=1)


def _figures(stage: StageReport) -> dict[str, str]:
    """What is worth printing of a stage, by the title of its column."""
    figures = {} if stage.epoch is None else {"epoch": f"{stage.epoch:.3g}"}
    figures["sparsity"] = f"{stage.sparsity:.4f}"
    if stage.samples:
        figures |= {
            "samples": f"{stage.samples:,}",
            "damp": "by magnitude" if stage.by_magnitude else _damping(stage.damp),
        }
    if (chosen := stage.calibration) is not None:
        figures |= {
            "compensation": _damping(chosen.compensation),
            "Newton steps": " ".join(f"{damp:.2g}" for damp in chosen.steps) or "-",
            "loss, weights removed": f"{chosen.loss_removed:.4g}",
            "corrected": f"{chosen.loss:.4g}",
        }
    return figures


def _damping(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _memory(peak: int | None) -> str:
    return "" if peak is None else f", {peak / 2**20:.0f} MiB at its peak"
