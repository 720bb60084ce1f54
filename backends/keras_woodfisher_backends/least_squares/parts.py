"""The matrices that a layer consists of, and what each of them multiplies when the layer is called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from keras import layers, ops

from keras_woodfisher_backends.least_squares.matrix_form import (
    MatrixForm,
    dense_form,
    depthwise_form,
    matrix_form,
    pointwise_form,
)
from keras_woodfisher_backends.least_squares.own_layers import CELLS, SEPARABLE, does_as_keras


class Side(NamedTuple):
    """A call of a layer within one of the two models.

    Attributes:
        x: The layer's input, (N, ...).
        kernels: The layer's kernels, by name.
        states: `states(kernels)`: what a recurrent layer remembers before each step of x, (N, T, units).
    """

    x: Any
    kernels: Mapping[str, np.ndarray]
    states: Callable[[Mapping[str, np.ndarray]], Any]


class Call(NamedTuple):
    """One call of a layer, with the same examples in the dense model and in the pruned one.

    Attributes:
        dense: In the dense model.
        pruned: In the pruned one, with the new kernels as far as they are known.
        output: What the dense layer gives, before bias and activation.
    """

    dense: Side
    pruned: Side
    output: Any


@dataclass(frozen=True)
class Part:
    """One matrix (g, k, o) of a layer: kernels below each other, as their inputs lie beside each other.

    Attributes:
        forms: The form of each kernel, by name.
        seen: `seen(call)`: the inputs of the kernels in the pruned model, and the output in the dense one.
    """

    forms: Mapping[str, MatrixForm]
    seen: Callable[[Call], tuple[Sequence[Any], Any]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(g, k, o)."""
        shapes = [form.shape for form in self.forms.values()]
        return shapes[0][0], sum(inputs for _, inputs, _ in shapes), shapes[0][2]

    def matrix(self, kernels: Mapping[str, np.ndarray]) -> np.ndarray:
        """The matrix of some kernels, or of arrays of their shapes."""
        found = [form.matrix(kernels[name]) for name, form in self.forms.items()]
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)

    def kernels(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """The kernels of a matrix."""
        if len(self.forms) == 1:
            return {name: form.kernel(matrix) for name, form in self.forms.items()}
        edges = np.cumsum([form.shape[1] for form in self.forms.values()])[:-1]
        parts = np.split(matrix, edges, axis=1)
        return {name: form.kernel(part) for (name, form), part in zip(self.forms.items(), parts, strict=True)}

    def positions(self, output: Any) -> tuple[int, ...]:
        """The shape of the positions of each example."""
        return next(iter(self.forms.values())).positions(output)

    def ready(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Inputs as `rows` takes them, or a list of one output as `targets` does."""
        # Sums of products of small whole numbers would overflow.
        floats = (array if array.dtype.kind == "f" else array.astype(np.float32) for array in arrays)
        return [form.ready(array) for form, array in zip(self.forms.values(), floats, strict=False)]

    def rows(self, inputs: Sequence[np.ndarray], places: np.ndarray) -> np.ndarray:
        """(g, R, k) at flat indices of (example, position)."""
        found = [form.rows(x, places) for form, x in zip(self.forms.values(), inputs, strict=True)]
        return found[0] if len(found) == 1 else np.concatenate(found, axis=2)

    def targets(self, output: np.ndarray, places: np.ndarray) -> np.ndarray:
        """(g, R, o) in the same way."""
        return next(iter(self.forms.values())).targets(output, places)


def parts_of(layer: Any, apart: bool = False) -> Sequence[Part]:
    """The matrices of a layer in the order in which they work; empty for a layer that has none.

    Args:
        layer: The layer.
        apart: Whether each kernel is a matrix of its own, where two could be one.
    """
    if isinstance(layer, SEPARABLE):
        return _separable(layer) if does_as_keras(layer) else []
    if isinstance(cell := getattr(layer, "cell", None), CELLS):
        return _recurrent(cell, apart) if does_as_keras(layer) else []
    form = matrix_form(layer)
    return [] if form is None else [Part({"kernel": form}, lambda call: ([call.pruned.x], call.output))]


def _separable(layer: Any) -> Sequence[Part]:
    def middle(x: Any, kernel: np.ndarray) -> Any:
        return ops.depthwise_conv(
            x,
            ops.convert_to_tensor(kernel, x.dtype),
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def first(call: Call) -> tuple[Sequence[Any], Any]:
        return [call.pruned.x], middle(call.dense.x, call.dense.kernels["depthwise_kernel"])

    def second(call: Call) -> tuple[Sequence[Any], Any]:
        return [middle(call.pruned.x, call.pruned.kernels["depthwise_kernel"])], call.output

    return [
        Part({"depthwise_kernel": depthwise_form(layer, layer.depthwise_kernel)}, first),
        Part({"pointwise_kernel": pointwise_form(layer)}, second),
    ]


def _recurrent(cell: Any, apart: bool) -> Sequence[Part]:
    """All that enters the gates of an LSTM is one product of the input beside the state; a GRU keeps them apart."""
    forms = {name: dense_form(getattr(cell, name)) for name in ("kernel", "recurrent_kernel")}

    def both(call: Call) -> tuple[Sequence[Any], Any]:
        (x, kernels, states), pruned = call.dense, call.pruned
        output = _times(x, kernels["kernel"]) + _times(states(kernels), kernels["recurrent_kernel"])
        return [pruned.x, pruned.states(pruned.kernels)], output

    def of_input(call: Call) -> tuple[Sequence[Any], Any]:
        return [call.pruned.x], _times(call.dense.x, call.dense.kernels["kernel"])

    def of_state(call: Call) -> tuple[Sequence[Any], Any]:
        (_, kernels, states), pruned = call.dense, call.pruned
        return [pruned.states(pruned.kernels)], _times(states(kernels), kernels["recurrent_kernel"])

    if not (apart or isinstance(cell, layers.GRUCell)):
        return [Part(forms, both)]
    return [
        Part({"kernel": forms["kernel"]}, of_input),
        Part({"recurrent_kernel": forms["recurrent_kernel"]}, of_state),
    ]


def _times(x: Any, kernel: np.ndarray) -> Any:
    return ops.matmul(x, ops.convert_to_tensor(kernel, x.dtype))
