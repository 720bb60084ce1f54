"""What a dry run found, as data and as text."""

from dataclasses import asdict, dataclass, field
from typing import Any

from keras_woodfisher_backends.protocol import SlowLayers

from keras_woodfisher.callbacks.update_plan import PlannedUpdate
from keras_woodfisher.options.checks import as_json
from keras_woodfisher.options.sizes import size_text
from keras_woodfisher.recipe.dry_run.costs import Cost, ReconstructionCost
from keras_woodfisher.recipe.dry_run.process_costs import ProcessCost
from keras_woodfisher.recipe.modifiers.pruning import Modifier, PruningModifier
from keras_woodfisher.recipe.modifiers.writing import changed_fields
from keras_woodfisher.reports.html.charts import curves, side_by_side
from keras_woodfisher.reports.html.elements import Section, bullets, table, tiles
from keras_woodfisher.reports.left_out import NOTHING, LeftOut
from keras_woodfisher.reports.rendering import aligned
from keras_woodfisher.reports.report import Report

_SHOWN = 6
"""Updates that are printed at each end of a long list."""


@dataclass(frozen=True)
class Problem:
    """Something that would fail.

    Attributes:
        modifier: The label of the modifier, or "" where it is about the training as a whole.
        message: What is wrong, and the mend.
    """

    modifier: str
    message: str

    def __str__(self) -> str:
        return f"{self.modifier}: {self.message}" if self.modifier else self.message


@dataclass(frozen=True)
class CheckedModifier:
    """What one modifier will do.

    Attributes:
        modifier: The modifier.
        label: Its tag, with a number where several have the same one.
        variables: Names of the variables that it works on.
        weights: Their weights.
        nearly: Names of variables that its names and patterns nearly match.
        frozen: Names of variables that it means and leaves alone, since they are frozen.
        dense: What stays dense since it fills no group of the mask, or "".
        emptied: Names of the variables that will have no weight left.
        updates: Every pruning update.
        source: `"data"` or `"buffer"`: where gradients come from; "" where none are needed.
        slow_layers: Layers that make sampling slow; None if there are none, or no data to try it on.
        cost: Bytes and seconds of updates.
        process: What each of several processes would take, where that was asked for.
        reconstruction: The same of a reconstruction.
        problems: What would fail.
        keys: Identity of the variables, as two may have one name.
    """

    modifier: Modifier
    label: str = ""
    variables: tuple[str, ...] = ()
    weights: int = 0
    nearly: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    dense: str = ""
    emptied: tuple[str, ...] = ()
    updates: tuple[PlannedUpdate, ...] = ()
    source: str = ""
    slow_layers: SlowLayers | None = None
    cost: Cost = field(default_factory=Cost)
    process: ProcessCost | None = None
    reconstruction: ReconstructionCost | None = None
    problems: tuple[Problem, ...] = ()
    keys: tuple[int, ...] = ()

    @property
    def window(self) -> tuple[float, float]:
        """The first and last position at which it makes new zeros, in epochs."""
        start = max(self.modifier.first_epoch, 0.0)
        return start, self.modifier.last_epoch if isinstance(self.modifier, PruningModifier) else start

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        first = {"modifier": self.modifier.tag, "label": self.label, "fields": changed_fields(self.modifier)}
        found = {name: value for name, value in asdict(self).items() if name not in (*first, "keys")}
        found["cost"]["memory"] = self.cost.memory and self.cost.memory.as_dict()
        return first | as_json(found)

    def section(self) -> Section:
        """The same as HTML."""
        ramp = {"sparsity": [(update.position, update.sparsity) for update in self.updates]}
        figure = side_by_side([curves(ramp, "sparsity (fraction of zeros)", "epochs", (0.0, 1.0))])
        updates = figure + table(_cells(self.updates), left=0) if self.updates else ""
        return Section(self.label or self.modifier.tag, bullets([*self._targets(), *self._costs()]) + updates)

    def lines(self) -> list[str]:
        """The same as text."""
        updates = _table(self.updates) if self.updates else []
        lines = [*self._targets(), *updates, *self._costs()]
        return [self.label or self.modifier.tag, *(f"  {line}" for line in lines)]

    def _targets(self) -> list[str]:
        lines = []
        if self.variables:
            first = ", ".join(self.variables[:3]) + (", ..." if len(self.variables) > 3 else "")
            lines.append(f"{len(self.variables)} variables, {self.weights:,} weights: {first}")
        if self.nearly:
            lines.append(f"nearly matched, and left alone: {', '.join(self.nearly)}")
        if self.frozen:
            lines.append(f"frozen, and left alone: {', '.join(self.frozen)}")
        if self.dense:
            lines.append(self.dense)
        if self.emptied:
            lines.append(f"no weight will be left of: {', '.join(self.emptied)}")
        return lines

    def _costs(self) -> list[str]:
        lines = self._cost_lines() if self.updates else []
        if (cost := self.reconstruction) is not None:
            lines.append(f"reconstruction by {cost.examples:,} examples, passes: {cost.passes}; {cost.memory}")
            more = f"; more {', and '.join(cost.without)}" if cost.without else ""
            lines.append(f"time: about {cost.seconds:.1f} s{more}")
        return lines

    def _cost_lines(self) -> list[str]:
        cost = self.cost
        if not self.source:
            return ["by magnitude: no gradients"]
        lines = [f"gradients: {cost.gradient_bytes:,} bytes at the update that needs most, from {self.source}"]
        if self.slow_layers is not None:
            lines.append(str(self.slow_layers))
        if cost.buffer_bytes:
            lines.append(f"buffer: {cost.buffer_bytes:,} bytes beside the optimizer's variables; {self._filling()}")
        if cost.memory is not None:
            lines += str(cost.memory).splitlines()
        lines += [f"{name}: about {size_text(size)} at its peak" for name, size in (cost.device_bytes or {}).items()]
        if cost.gradient_seconds is None:
            lines.append("time: give data to have that of the gradients measured")
        elif self.source == "data":
            lines.append(f"time: about {cost.gradient_seconds:.1f} s for gradients")
        if cost.inverse_seconds is not None:
            lines.append(f"time: about {cost.inverse_seconds:.1f} s for scores and corrections")
        return lines + ([] if self.process is None else self.process.lines())

    def _filling(self) -> str:
        """Whether the buffer holds enough gradients at each update."""
        used = [u for u in self.updates if u.num_grads]
        if any(u.steps_before is None for u in used):
            return "give steps_per_epoch to know whether it can be full in time"
        late = sum((u.steps_before or 0) < u.num_grads for u in used)
        return f"too few steps come before {late} of {len(used)} updates" if late else "full enough at each update"


@dataclass(frozen=True)
class RecipeCheck(Report):
    """The outcome of `check_recipe`; `print` it, or show or `save` it as a page.

        >>> recipe = kw.load_recipe({"modifiers": [{"ConstantPruningModifier": {"params": ["hiden/kernel"]}}]})
        >>> check = kw.check_recipe(recipe, model, verbose=0)
        >>> len(check.problems), check.modifiers[0].nearly
        (1, ('sequential/hidden/kernel',))

    Attributes:
        modifiers: What each modifier will do.
        problems: Everything that would fail, with its mend; empty if nothing would.
        steps_per_epoch: As given.
        epochs: As given, or as the recipe has it.
        left_out: Which weights no modifier prunes or holds, why, and how to name them.
    """

    modifiers: tuple[CheckedModifier, ...]
    problems: tuple[Problem, ...]
    steps_per_epoch: int | None
    epochs: int | None
    left_out: LeftOut = NOTHING

    title = "Dry run of a recipe"

    def sections(self, whole: bool = False) -> list[Section]:
        known = {"epochs": self.epochs or "unknown", "steps an epoch": self.steps_per_epoch or "unknown"}
        figures = {name: str(value) for name, value in known.items()} | {"problems": str(len(self.problems))}
        parts = [Section("", tiles(figures))]
        if self.problems:
            parts.append(Section("Problems", bullets([str(problem) for problem in self.problems])))
        parts += [entry.section() for entry in self.modifiers]
        left_out = self.left_out.lines()
        return [*parts, Section("Notes", bullets(left_out) if left_out else "")]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "epochs": self.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "modifiers": [entry.as_dict() for entry in self.modifiers],
            "problems": [asdict(problem) for problem in self.problems],
            "left_out": self.left_out.as_dict(),
        }

    def __str__(self) -> str:
        steps = "unknown (give steps_per_epoch)" if self.steps_per_epoch is None else str(self.steps_per_epoch)
        lines = [f"{self.epochs or 'unknown'} epochs, steps an epoch: {steps}"]
        lines += [line for entry in self.modifiers for line in entry.lines()]
        lines += self.left_out.lines()
        lines.append("problems:" if self.problems else "no problems")
        return "\n".join([*lines, *(f"  - {problem}" for problem in self.problems)])


def _cells(updates: tuple[PlannedUpdate, ...]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = [("update", "epoch", "step", "sparsity", "gradients", "bytes")]
    for number, update in enumerate(updates):
        step = "-" if update.step is None else str(update.step)
        size = 4 * update.num_grads * update.kept
        sparsity = f"{update.sparsity:.4f}"
        cells.append((str(number), f"{update.position:g}", step, sparsity, f"{update.num_grads:,}", f"{size:,}"))
    return cells


def _table(updates: tuple[PlannedUpdate, ...]) -> list[str]:
    lines = aligned(_cells(updates), left=0)
    if len(updates) > 2 * _SHOWN:
        lines = [*lines[: 1 + _SHOWN], f"... {len(updates) - 2 * _SHOWN} more", *lines[-_SHOWN:]]
    return lines
