"""What reconstruction did to each layer, as data and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from keras_woodfisher.reports.html.elements import Section, bullets, table
from keras_woodfisher.reports.rendering import aligned
from keras_woodfisher.reports.report import Report


@dataclass(frozen=True)
class LayerReport:
    """One matrix of a layer.

        >>> report = kw.prune(model, x, 0.5, verbose=0)
        >>> first = report.reconstruction.layers[0]
        >>> first.name, first.dead_inputs, 0.0 < first.error < 1.0
        ('sequential/hidden/kernel', 0, True)

    Attributes:
        name: Its variable (of a recurrent layer both, with a comma).
        rows: Positions of examples that it was fitted to.
        error: The relative squared error of the layer's output, `sum |pruned - dense|^2 / sum |dense|^2`, each on its
            own model's inputs; None where it wasn't reconstructed.
        dead_inputs: Inputs that were zero everywhere, so that their weights went first.
        seconds: Time of rows and solution.
        note: Why its kept weights are as they were, and were chosen by magnitude, or "".
        inputs: How many weights an output has. With fewer rows than that the ridge towards the dense weights decides.
    """

    name: str
    rows: int = 0
    error: float | None = None
    dead_inputs: int = 0
    seconds: float = 0.0
    note: str = ""
    inputs: int = 0


@dataclass(frozen=True)
class RefinementReport:
    """What steps on the kept weights of all layers together did.

    Attributes:
        steps: How many there were; 0 where they brought the outputs no nearer, so that nothing was changed.
        rate: The first one, as a part of the root mean square of a variable's kept weights.
        examples: How many examples were differentiated, those to find the rate included.
        error: The distance of the outputs before.
    """

    steps: int
    rate: float
    examples: int
    error: float


@dataclass(frozen=True)
class ReconstructionReport(Report):
    """What reconstruction did; `print`, show or `save` it.

        >>> done = kw.prune(model, x, 0.5, verbose=0).reconstruction
        >>> done.examples + done.held_out == len(x), done.allocation
        (True, 'between')

    Attributes:
        layers: A line a matrix, in the order of calls.
        examples: How many examples the layers were fitted to.
        held_out: How many others the error of the outputs was measured on; the same ones where they are too few.
        error: The distance of the pruned model's outputs from the dense one's on those: the mean Kullback-Leibler
            divergence of probabilities, or the squared error of other outputs over their variance.
        allocation: How the zeros were divided among the variables.
        compared: That distance for each way to divide them, where several were tried, on a part of the examples.
        refined: What steps on all layers together did, where there were any.
        same: Whether the error was measured on the examples that layers were fitted to.
    """

    layers: tuple[LayerReport, ...]
    examples: int
    held_out: int
    error: float
    allocation: str
    compared: tuple[tuple[str, float], ...] = ()
    refined: RefinementReport | None = None
    same: bool = False

    title = "Reconstruction report"

    def sections(self, whole: bool = False) -> list[Section]:
        return [Section("Reconstruction of layers", bullets(self.lines()) + table(layers_cells(self.layers)))]

    def lines(self) -> list[str]:
        """What is to be said of all layers together."""
        lines = []
        on = f"the same {self.held_out:,}, too few to hold any out" if self.same else f"{self.held_out:,} others"
        lines.append(
            f"fitted to {self.examples:,} examples; distance of the outputs from the dense model's, on "
            f"{on}: {self.error:.4g}"
        )
        tried = ", ".join(f"{name} {value:.4g}" for name, value in self.compared)
        lines.append(f"zeros divided by {self.allocation}" + (f" (compared: {tried})" if tried else ""))
        if (done := self.refined) is not None:
            lines.append(
                f"refined in {done.steps:,} steps from rate {done.rate:g} ({done.examples:,} examples differentiated): "
                f"{done.error:.4g} before"
            )
        return lines

    def __str__(self) -> str:
        return "\n".join([*aligned(layers_cells(self.layers), left=1), *self.lines()])


def layers_cells(layers: Sequence[LayerReport]) -> list[tuple[str, ...]]:
    """A table with a line a layer; where it has more unknowns than rows, it says how many."""
    rows: list[tuple[str, ...]] = [("layer", "rows", "dead inputs", "output error", "seconds")]
    for layer in layers:
        error = (f"by magnitude: {layer.note}" if layer.note else "") or (
            "" if layer.error is None else f"{layer.error:.2e}"
        )
        few = f" of {layer.inputs:,}" if layer.rows < layer.inputs else ""
        rows.append((layer.name, f"{layer.rows:,}{few}", str(layer.dead_inputs), error, f"{layer.seconds:.2f}"))
    return rows
