"""What reconstruction did to each layer, as data and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from keras_woodfisher.reports.rendering import aligned


@dataclass(frozen=True)
class LayerReport:
    """One matrix of a layer.

    Attributes:
        name: Its variable (of a recurrent layer both, with a comma).
        rows: Positions of examples that it was fitted to.
        error: The relative squared error of the layer's output, `sum |pruned - dense|^2 / sum |dense|^2`, each on its
            own model's inputs; None where it wasn't reconstructed.
        dead_inputs: Inputs that were zero everywhere, so that their weights went first.
        seconds: Time of rows and solution.
        note: Why it was pruned by magnitude instead, or "".
    """

    name: str
    rows: int = 0
    error: float | None = None
    dead_inputs: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class ReconstructionReport:
    """What reconstruction did.

    Attributes:
        layers: A line a matrix, in the order of calls.
        examples: How many examples the layers were fitted to.
        held_out: How many others the error of the outputs was measured on.
        error: The distance of the pruned model's outputs from the dense one's on those: the mean Kullback-Leibler
            divergence of probabilities, or the squared error of other outputs over their variance.
        allocation: How the zeros were divided among the variables.
        compared: That distance for each way to divide them, where several were tried, on a part of the examples.
    """

    layers: tuple[LayerReport, ...]
    examples: int
    held_out: int
    error: float
    allocation: str
    compared: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        lines = layers_table(self.layers)
        lines.append(
            f"fitted to {self.examples:,} examples; distance of the outputs from the dense model's on {self.held_out:,} "
            f"others: {self.error:.4g}"
        )
        tried = ", ".join(f"{name} {value:.4g}" for name, value in self.compared)
        lines.append(f"zeros divided by {self.allocation}" + (f" (compared: {tried})" if tried else ""))
        return "\n".join(lines)


def layers_table(layers: Sequence[LayerReport]) -> list[str]:
    """A line a layer."""
    rows = [("layer", "rows", "dead inputs", "output error", "seconds")]
    for layer in layers:
        error = layer.note or ("" if layer.error is None else f"{layer.error:.2e}")
        rows.append((layer.name, f"{layer.rows:,}", str(layer.dead_inputs), error, f"{layer.seconds:.2f}"))
    return aligned(rows, left=1)
