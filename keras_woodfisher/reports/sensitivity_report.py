"""How much each variable may be pruned, as data, as a table and as curves."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from keras_woodfisher_backends.protocol import SlowLayers

from keras_woodfisher.options.checks import as_json
from keras_woodfisher.reports.html.charts import MOST_CURVES, curves, side_by_side
from keras_woodfisher.reports.html.elements import Section, bullets, heat_table, tiles
from keras_woodfisher.reports.left_out import NOTHING, LeftOut
from keras_woodfisher.reports.rendering import aligned, axes_of
from keras_woodfisher.reports.report import Report
from keras_woodfisher.reports.stage_report import PhaseReport

_DARKEST = 0.75
"""Of a cell: what is written in it has to be read."""


@dataclass(frozen=True)
class Sensitivity:
    """One variable, pruned alone to one level.

        >>> report = kw.sensitivity(model, levels=[0.5], eval_data=(x, y), method="magnitude", verbose=0)
        >>> [(entry.weights, entry.level, entry.pruned, entry.predicted) for entry in report.entries]
        [(32, 0.5, 16, None), (48, 0.5, 24, None)]

    Attributes:
        name: The variable.
        weights: Its number of weights.
        level: The sparsity that was asked for.
        pruned: Its zeros at that level, those that were there before included.
        predicted: The increase of the loss that the Fisher predicts; None for other methods, which predict none.
        measured: The increase of the loss that was measured.
        output_error: The relative squared error of the layer's output, `sum |pruned - dense|^2 / sum |dense|^2`, where
            it was reconstructed, else None.
        note: Why it couldn't be reconstructed, so that it was pruned by magnitude, or "".
    """

    name: str
    weights: int
    level: float
    pruned: int
    predicted: float | None
    measured: float
    output_error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class SensitivityReport(Report):
    """The outcome of `sensitivity`; `print` it to see tables, or show or `save` it as a page.

        >>> report = kw.sensitivity(model, levels=[0.5, 0.9], eval_data=(x, y), method="magnitude", verbose=0)
        >>> report.levels, report.examples, report.predicts
        ((0.5, 0.9), 240, False)

    Attributes:
        entries: Variable after variable, each with all levels from the lowest to the highest.
        levels: The levels.
        dense_loss: The loss of the model as it is.
        examples: How many examples losses were measured on.
        samples: Gradient samples that were used.
        phases: Where time and memory went.
        left_out: Which weights weren't considered, why, and how to name them.
        slow_layers: Layers that made sampling slow, and why.
    """

    entries: tuple[Sensitivity, ...]
    levels: tuple[float, ...]
    dense_loss: float
    examples: int
    samples: int = 0
    phases: tuple[PhaseReport, ...] = ()
    left_out: LeftOut = NOTHING
    slow_layers: tuple[SlowLayers, ...] = ()

    title = "Sensitivity report"

    def sections(self, whole: bool = False) -> list[Section]:
        names = [entries[0].name for entries in self.variables()]
        head = {"loss without pruning": f"{self.dense_loss:.4f}", "examples": f"{self.examples:,}"}
        found = [Section("", tiles(head | {"variables": f"{len(names):,}"}))]
        found += [
            Section(title[0].upper() + title[1:], self._heat(figure, form)) for title, figure, form in self._figures()
        ]
        if found[1:]:
            found.insert(1, Section("The most sensitive variables", self._curves()))
        return [*found, Section("Notes", bullets(notes) if (notes := self._notes()) else "")]

    def _curves(self) -> str:
        def harm(entries: tuple[Sensitivity, ...]) -> float:
            return max(entry.measured if math.isfinite(entry.measured) else math.inf for entry in entries)

        # Two variables of one name would be one curve.
        named = {entries[0].name: entries for entries in sorted(self.variables(), key=harm)}
        most = list(reversed(list(named.items())[-MOST_CURVES:]))
        series = {name: [(entry.level, entry.measured) for entry in entries] for name, entries in most}
        title, axis = "increase of the loss, measured", "sparsity of one variable (fraction of zeros)"
        return side_by_side([curves(series, title, axis)])

    def _heat(self, figure: str, form: str) -> str:
        """A figure of each variable and level; the darker the larger."""
        cells = self._cells(figure, form)
        values = [[getattr(entry, figure) for entry in entries] for entries in self.variables()]
        most = max((v for row in values for v in row if v is not None and math.isfinite(v)), default=0.0)
        return heat_table(cells, [[_shade(value, most) for value in row] for row in values])

    @property
    def zeroed(self) -> tuple[tuple[str, float], ...]:
        """Variables that were zero as a whole, each with the lowest level at which it was."""
        found: dict[str, float] = {}
        for entry in self.entries:
            if entry.pruned == entry.weights:
                found.setdefault(entry.name, entry.level)
        return tuple(found.items())

    @property
    def predicts(self) -> bool:
        """Whether there are predictions."""
        return all(entry.predicted is not None for entry in self.entries)

    def variables(self) -> Iterator[tuple[Sensitivity, ...]]:
        """The entries of one variable after the other (by place, since two may have the same name)."""
        step = len(self.levels)
        for start in range(0, len(self.entries), step):
            yield self.entries[start : start + step]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        data = asdict(self)
        data |= {name: list(data[name]) for name in ("entries", "levels", "phases")}
        data["slow_layers"] = as_json(data["slow_layers"])
        zeroed = [{"name": name, "level": level} for name, level in self.zeroed]
        return data | {"left_out": self.left_out.as_dict(), "zeroed": zeroed}

    def plot(self, ax: Any = None) -> Any:
        """Draws a curve a variable: the increase of the loss over its sparsity. Dashed is what the Fisher predicts.

        Args:
            ax: The matplotlib `Axes` to draw on; by default a new figure's.

        Returns:
            The `Axes`.

        Raises:
            ImportError: If matplotlib isn't installed.
            TypeError: If `ax` is something else.
        """
        names = [entries[0].name for entries in self.variables()]
        ax = axes_of(ax, (10, max(5.0, 1.5 + 0.22 * len(names))))
        # Predictions are far smaller than what is measured, which may be negative.
        ax.set_yscale("symlog", linthresh=1e-3)
        for entries in self.variables():
            (line,) = ax.plot(self.levels, [entry.measured for entry in entries], marker="o", label=entries[0].name)
            if self.predicts:
                # A label that begins with an underscore isn't in the legend.
                predicted = [entry.predicted for entry in entries]
                ax.plot(self.levels, predicted, linestyle="--", color=line.get_color(), label="_predicted")
        ax.axhline(0.0, color="black", linewidth=0.8, label="_none")
        ax.set_xlabel("sparsity of one variable (fraction of zeros)")
        ax.set_ylabel("increase of the loss" + (" (dashed: predicted)" if self.predicts else ""))
        ax.set_title(f"loss without pruning {self.dense_loss:.4f}, on {self.examples:,} examples")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
        return ax

    def __str__(self) -> str:
        lines = [f"loss without pruning: {self.dense_loss:.4f}, on {self.examples:,} examples"]
        for title, figure, form in self._figures():
            lines += ["", title, *self._table(figure, form)]
        more = self._notes()
        return "\n".join([*lines, "", *more] if more else lines)

    def _figures(self) -> list[tuple[str, str, str]]:
        """The figures that there are: title, attribute and form."""
        found = [("increase of the loss when one variable alone is pruned, measured", "measured", ".4f")]
        if self.predicts:
            found.append(("increase of the loss, predicted by the Fisher", "predicted", ".1e"))
        if any(entry.output_error is not None for entry in self.entries):
            found.append(("relative error of the layer's output", "output_error", ".1e"))
        return found

    def _notes(self) -> list[str]:
        more = [f"zero as a whole from level {level:g} on: {name}" for name, level in self.zeroed]
        more += [f"by magnitude: {name}, since {why}" for name, why in self._by_magnitude().items()]
        return [*more, *map(str, self.slow_layers), *self.left_out.lines()]

    def _by_magnitude(self) -> dict[str, str]:
        return {entry.name: entry.note for entry in self.entries if entry.note}

    def _table(self, figure: str, form: str) -> list[str]:
        lines = aligned(self._cells(figure, form), left=1)
        lines.insert(1, "-" * len(lines[0]))
        return lines

    def _cells(self, figure: str, form: str) -> list[tuple[str, ...]]:
        cells: list[tuple[str, ...]] = [("variable", "weights", *(f"{level:g}" for level in self.levels))]
        for entries in self.variables():
            found = (getattr(entry, figure) for entry in entries)
            values = ("" if value is None else format(value, form) for value in found)
            cells.append((entries[0].name, f"{entries[0].weights:,}", *values))
        return cells


def _shade(value: float | None, most: float) -> float:
    """How dark a cell is: by the root, so that small ones can be told apart; what isn't finite is darkest."""
    if value is None or (math.isfinite(value) and value <= 0.0):
        return 0.0
    return math.sqrt(value / most) * _DARKEST if math.isfinite(value) else _DARKEST
