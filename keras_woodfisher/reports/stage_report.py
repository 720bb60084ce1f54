"""What one update, or one stage of it, did and cost, as data and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from keras_woodfisher_backends.protocol import SlowLayers

from keras_woodfisher.reports.rendering import aligned


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

    def cells(self) -> tuple[str, str, str]:
        """A line of a table: name, seconds and memory."""
        return self.name, f"{self.seconds:.2f}", "" if self.peak_bytes is None else mebibytes(self.peak_bytes)


def mebibytes(size: int) -> str:
    """Memory, rounded as a table of phases has it."""
    return f"{size / 2**20:.0f} MiB"


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
        slow_layers: Layers that made sampling slow, and why; None if there were none.
        by_magnitude: Whether magnitude pruning was as good on held-out examples, and was done instead.
        note: What went otherwise than it should have, or "".
    """

    sparsity: float
    samples: int = 0
    damp: float | None = None
    calibration: CalibrationReport | None = None
    phases: tuple[PhaseReport, ...] = ()
    epoch: float | None = None
    slow_layers: SlowLayers | None = None
    by_magnitude: bool = False
    note: str = ""


def merged(phases: Sequence[PhaseReport]) -> tuple[PhaseReport, ...]:
    """Phases of the same name as one: seconds added up, the largest peak."""
    found: dict[str, PhaseReport] = {}
    for phase in phases:
        before = found.get(phase.name, PhaseReport(phase.name, 0.0, phase.peak_bytes))
        peaks = [p.peak_bytes for p in (before, phase) if p.peak_bytes is not None]
        found[phase.name] = PhaseReport(phase.name, before.seconds + phase.seconds, max(peaks, default=None))
    return tuple(found.values())


def stages_table(stages: Sequence[StageReport]) -> list[str]:
    """A table of what was chosen, where there was a choice or there were several stages."""
    cells = stages_cells(stages)
    return aligned(cells, left=1) if cells else []


def stages_cells(stages: Sequence[StageReport]) -> list[tuple[str, ...]]:
    """The cells of that table, the header's first; none where there is nothing to tell."""
    if len(stages) < 2 and not any(stage.calibration or stage.by_magnitude for stage in stages):
        return []
    rows = [{"stage": str(number), **_figures(stage)} for number, stage in enumerate(stages, start=1)]
    header = list(dict.fromkeys(name for row in rows for name in row))
    return [tuple(header), *(tuple(row.get(name, "") for name in header) for row in rows)]


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
