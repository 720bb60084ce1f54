"""How training went, epoch by epoch, beside the pruning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from keras_woodfisher.reports.html.charts import Points, curves, side_by_side
from keras_woodfisher.reports.html.elements import Section, table
from keras_woodfisher.reports.stage_report import StageReport

SPARSITY = "sparsity"
"""The key under which logs have it; those of single variables begin with it and a slash."""

_VALIDATION = "val_"


@dataclass(frozen=True)
class EpochReport:
    """One epoch of a training run.

        >>> pruner = kw.WoodFisherPruning(0.5, end_epoch=1, method="magnitude", verbose=0)
        >>> history = model.fit(x, y, epochs=2, callbacks=[pruner], verbose=0)
        >>> [(entry.epoch, entry.sparsity, sorted(entry.logs)) for entry in pruner.report().history]
        [(0, 0.0, ['loss', 'sparsity']), (1, 0.5, ['loss', 'sparsity'])]

    Attributes:
        epoch: Its index.
        sparsity: Fraction of zeros at its end, over the variables of the report.
        logs: The numbers that Keras told callbacks at its end, by name, those of single variables aside.
    """

    epoch: int
    sparsity: float
    logs: Mapping[str, float] = field(default_factory=dict)


def history_section(history: Sequence[EpochReport], stages: Sequence[StageReport]) -> Section:
    """Losses and sparsity over epochs: curves and a table; nothing where there was no training."""
    if not history:
        return Section("", "")
    names = list(dict.fromkeys(name for entry in history for name in entry.logs if name != SPARSITY))
    charts = [_metric(history, name, names) for name in names if not name.startswith(_VALIDATION)]
    steps = curves({SPARSITY: _steps(history, stages)}, "sparsity (fraction of zeros)", "epochs", (0.0, 1.0))
    cells = [("epoch", SPARSITY, *names)]
    for entry in history:
        found = (entry.logs.get(name) for name in names)
        cells.append((str(entry.epoch + 1), f"{entry.sparsity:.4f}", *("" if v is None else f"{v:.5g}" for v in found)))
    return Section("Training", side_by_side([*charts[:1], steps, *charts[1:]]) + table(cells, left=0))


def _metric(history: Sequence[EpochReport], name: str, names: Sequence[str]) -> str:
    """One metric, of the training and of the validation."""
    of_both = {label: key for label, key in (("training", name), ("validation", _VALIDATION + name)) if key in names}
    series = {
        label: [(entry.epoch + 1.0, entry.logs[key]) for entry in history if key in entry.logs]
        for label, key in of_both.items()
    }
    return curves(series, name, "epochs")


def _steps(history: Sequence[EpochReport], stages: Sequence[StageReport]) -> Points:
    """The sparsity over time; it changes at one moment, not from one epoch's end to the next."""
    events = [(entry.epoch + 1.0, entry.sparsity) for entry in history]
    # What is due at an epoch's end comes first in the next one.
    events += [(stage.epoch, stage.sparsity) for stage in stages if stage.epoch is not None]
    points: list[tuple[float, float]] = []
    for position, sparsity in sorted(events, key=lambda event: event[0]):
        if points and points[-1][1] != sparsity:
            points.append((position, points[-1][1]))
        points.append((position, sparsity))
    return points
