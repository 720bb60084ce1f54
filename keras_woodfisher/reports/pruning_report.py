"""What was pruned and what it cost, as data and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from keras_woodfisher_backends.protocol import SlowLayers

from keras_woodfisher.options.checks import as_json
from keras_woodfisher.reports.batchnorm_report import BatchNormReport
from keras_woodfisher.reports.epoch_report import SPARSITY, EpochReport, history_section
from keras_woodfisher.reports.html.elements import Section, bullets, settings, table, tiles
from keras_woodfisher.reports.layer_report import ReconstructionReport
from keras_woodfisher.reports.left_out import NOTHING, LeftOut
from keras_woodfisher.reports.rendering import aligned, axes_of
from keras_woodfisher.reports.report import Report
from keras_woodfisher.reports.stage_report import (
    PhaseReport,
    StageReport,
    mebibytes,
    merged,
    stages_cells,
    stages_table,
)
from keras_woodfisher.reports.variable_report import VariableReport, bytes_section


def combined(
    reports: Sequence["PruningReport"], variables: tuple[VariableReport, ...], left_out: LeftOut = NOTHING
) -> "PruningReport":
    """Several reports as one, in their order; settings are numbered where there are several.

    Args:
        reports: Of work that was done one after the other.
        variables: As they are now.
        left_out: What none of them considered.
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
        next((report.batchnorm for report in reversed(reports) if report.batchnorm is not None), None),
        _rebuilt([report.reconstruction for report in reports if report.reconstruction is not None]),
        left_out,
        _joint_history([report.history for report in reports if report.history]),
    )


def _joint_history(found: Sequence[tuple[EpochReport, ...]]) -> tuple[EpochReport, ...]:
    """The epochs of callbacks of one training run, with the sparsity of all of them together, as they log it."""
    first = found[0] if found else ()
    return tuple(replace(entry, sparsity=entry.logs.get(SPARSITY, entry.sparsity)) for entry in first)


def _rebuilt(found: Sequence[ReconstructionReport]) -> ReconstructionReport | None:
    """The layers of all reconstructions, with the outputs of the last one."""
    layers = tuple(layer for report in found for layer in report.layers)
    return replace(found[-1], layers=layers) if found else None


@dataclass(frozen=True)
class PruningReport(Report):
    """The outcome of `prune` or `sparsity_report`; `print` it to see a table, or show or `save` it as a page.

        >>> report = kw.prune(model, sparsity=0.25, method="magnitude")
        >>> report.pruned, report.weights, report.sparsity
        (20, 80, 0.25)
        >>> sorted(report.as_dict())[:3]
        ['batchnorm', 'history', 'left_out']

    Attributes:
        variables: One entry a variable.
        phases: Where time and memory went (empty for `sparsity_report`).
        samples: Gradient samples that were used.
        notes: What else is worth knowing, printed under the table.
        stages: What was done in which order, and chosen on the way; printed where there were several.
        settings: How it was done: the values of `prune`'s options, given or taken from the preset.
        batchnorm: What became of BatchNorm statistics, where they were re-estimated.
        reconstruction: What became of each layer's output, where layers were reconstructed.
        left_out: Which weights weren't considered, why, and how to name them.
        history: How training went meanwhile, epoch by epoch.
    """

    variables: tuple[VariableReport, ...]
    phases: tuple[PhaseReport, ...] = ()
    samples: int = 0
    notes: tuple[str, ...] = field(default=())
    stages: tuple[StageReport, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    batchnorm: BatchNormReport | None = None
    reconstruction: ReconstructionReport | None = None
    left_out: LeftOut = NOTHING
    history: tuple[EpochReport, ...] = ()

    title = "Pruning report"

    @property
    def weights(self) -> int:
        return sum(v.weights for v in self.variables)

    @property
    def pruned(self) -> int:
        return sum(v.pruned for v in self.variables)

    @property
    def sparsity(self) -> float:
        return self.pruned / self.weights if self.weights else 0.0

    @property
    def overall_sparsity(self) -> float:
        """The fraction of zeros over all weights, considered or not (vectors such as biases aside)."""
        weights = self.weights + self.left_out.weights
        return (self.pruned + self.left_out.pruned) / weights if weights else 0.0

    @property
    def zeroed(self) -> tuple[str, ...]:
        """Names of the variables that are zero as a whole."""
        return tuple(v.name for v in self.variables if v.pruned == v.weights > 0)

    @property
    def slow_layers(self) -> tuple[SlowLayers, ...]:
        """Layers that made sampling slow in some stage, and why."""
        return tuple(dict.fromkeys(stage.slow_layers for stage in self.stages if stage.slow_layers is not None))

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        data = asdict(replace(self, variables=()))
        data["variables"] = [
            {"name": v.name, "shape": list(v.shape), "weights": v.weights, "pruned": v.pruned, "sparsity": v.sparsity}
            for v in self.variables
        ]
        data |= {"phases": list(data["phases"]), "notes": list(self.notes), "history": as_json(data["history"])}
        # The keys of JSON objects are texts.
        data["settings"] = {
            name: {str(key): part for key, part in value.items()} if isinstance(value, Mapping) else value
            for name, value in self.settings.items()
        }
        data["stages"] = [{**as_json(stage), "phases": list(stage["phases"])} for stage in data["stages"]]
        data["left_out"] = self.left_out.as_dict()
        data["zeroed"] = list(self.zeroed)
        data["slow_layers"] = as_json([asdict(slow) for slow in self.slow_layers])
        figures = ("weights", "pruned", "sparsity", "overall_sparsity")
        return data | {name: getattr(self, name) for name in figures}

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

    def sections(self, whole: bool = False) -> list[Section]:
        figures = {"weights": f"{self.weights:,}", "zeros": f"{self.pruned:,}", "sparsity": f"{self.sparsity:.4f}"}
        if self.left_out.variables:
            figures["sparsity of all weights"] = f"{self.overall_sparsity:.4f}"
        shares = [*(v.sparsity for v in self.variables), self.sparsity]
        parts = [Section("", tiles(figures)), history_section(self.history, self.stages)]
        parts.append(Section("Variables", table(self._cells(), 2, shares, total=True)))
        parts += [bytes_section(self.variables)] if whole else []
        if (stages := stages_cells(self.stages)) and len(stages) > 1:
            parts.append(Section("Updates", table(stages)))
        for part in (self.reconstruction, self.batchnorm):
            parts += [] if part is None else part.sections(whole)
        phases = [("phase", "seconds", "peak memory"), *(phase.cells() for phase in self.phases)]
        parts.append(Section("Time and memory", table(phases) if self.phases else ""))
        parts.append(Section("Settings", settings(self.settings) if self.settings else ""))
        notes = [*self.remarks(), *self.notes]
        return [*parts, Section("Notes and warnings", bullets(notes) if notes else "")]

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [(v.name, str(v.shape), v.weights, v.pruned, v.sparsity) for v in self.variables]
        rows.append(("total", "", self.weights, self.pruned, self.sparsity))
        cells: list[tuple[str, ...]] = [("variable", "shape", "weights", "pruned", "sparsity")]
        return cells + [(n, s, f"{w:,}", f"{p:,}", f"{f:.4f}") for n, s, w, p, f in rows]

    def __str__(self) -> str:
        lines = aligned(self._cells())
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        lines += self.remarks()
        for phase in self.phases:
            lines.append(f"{phase.name}: {phase.seconds:.2f} s{_memory(phase.peak_bytes)}")
        lines += stages_table(self.stages)
        if self.settings:
            lines.append("settings: " + ", ".join(f"{name}={value!r}" for name, value in self.settings.items()))
        parts = [str(part) for part in (self.reconstruction, self.batchnorm) if part is not None]
        return "\n".join([*lines, *parts, *self.notes])

    def remarks(self) -> list[str]:
        """What the table of variables doesn't show: what was left out, sampled slowly, or is zero as a whole."""
        lines = self.left_out.lines()
        if lines:
            lines.insert(1, f"  {100 * self.overall_sparsity:.1f} % of all these weights are zero")
        if self.zeroed:
            lines.append(f"zero as a whole: {', '.join(self.zeroed)}")
        return [*lines, *map(str, self.slow_layers)]


def _memory(peak: int | None) -> str:
    return "" if peak is None else f", {mebibytes(peak)} at its peak"
