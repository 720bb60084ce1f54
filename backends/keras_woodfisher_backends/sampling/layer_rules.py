"""The gradient of a layer's kernel for each group of examples, from the layer's input and its output's gradient.

A rule's result lies in memory in weight order (output axes, input axes, kernel positions), so that putting it there
later moves nothing; `axes` turns it into Keras's layout. Subclasses have the rule of their base: what their calls do
otherwise is found out by comparing samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from keras import layers, ops

from keras_woodfisher_backends.sampling.convolution import (
    KernelGradient,
    adjoint_gradient,
    convolution_gradient,
    depthwise_gradient,
    pointwise_gradient,
)
from keras_woodfisher_backends.sampling.listening import Listen, listen_to_call, listen_to_reversible

_CONVOLUTION = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel", "embeddings", "reverse_embeddings")

Formula = Callable[[tuple[Any, ...], Any, int, KernelGradient], Any]
"""`formula(tensors, grad, groups, kernels)`: the gradient of one variable for each group.

The tensors of a `Use` and the gradient of its output have a first axis of n b, or a multiple of it, in which what
belongs to one group lies next to each other; `groups` is n.
"""


@dataclass(frozen=True)
class Rule:
    """How to get the gradient of one variable.

    Attributes:
        host: The layer to listen to.
        listen: How; rules of one host listen alike.
        formulas: For each role of a use what it adds to the gradient.
        axes: The transposition of the result that gives (n, *shape).
    """

    host: Any
    listen: Listen
    formulas: Mapping[Any, Formula]
    axes: tuple[int, ...]


def rule_of(layer: Any, variable: Any) -> Rule | None:
    """The rule for a variable of a layer that is no recurrent cell, or None for a layer that isn't known."""
    owned = next((name for name in _KERNELS if getattr(layer, name, None) is variable), "")
    if isinstance(layer, layers.Embedding):
        return _embedding_rule(layer, owned)
    found = _formula(layer, owned, len(variable.shape)) if owned else None
    return None if found is None else Rule(layer, listen_to_call, {"": found[0]}, found[1])


def _formula(  # noqa: PLR0911 - a table
    layer: Any, owned: str, rank: int
) -> tuple[Formula, tuple[int, ...]] | None:
    last = kernel_last(rank)
    if isinstance(layer, _SEPARABLE):
        if owned == "pointwise_kernel":
            return _of_one(partial(pointwise_gradient, layer)), last
        return _of_one(partial(depthwise_gradient, layer)), (0, *range(3, rank + 1), 1, 2)
    if isinstance(layer, _DEPTHWISE):
        return _of_one(partial(depthwise_gradient, layer)), (0, *range(3, rank + 1), 1, 2)
    if isinstance(layer, layers.EinsumDense):
        return _einsum_formula(layer.equation)
    if isinstance(layer, layers.Dense):
        return _of_one(dense_gradient), last
    if isinstance(layer, _TRANSPOSED):
        return (_of_one(partial(adjoint_gradient, layer)), last) if layer.output_padding is None else None
    if isinstance(layer, _CONVOLUTION):
        return _of_one(partial(convolution_gradient, layer)), last
    return None


def kernel_last(rank: int) -> tuple[int, ...]:
    """From (n, outputs, inputs, *positions) to (n, *positions, inputs, outputs)."""
    return (0, *range(3, rank + 1), 2, 1)


def dense_gradient(x: Any, grad: Any, groups: int, kernels: KernelGradient | None = None) -> Any:
    """(n, outputs, inputs), of a product of matrices."""
    x = ops.reshape(x, (groups, -1, x.shape[-1]))
    grad = ops.reshape(grad, (groups, -1, grad.shape[-1]))
    return ops.matmul(ops.swapaxes(grad, 1, 2), x)


def _of_one(gradient: Callable[[Any, Any, int, KernelGradient], Any]) -> Formula:
    return lambda tensors, grad, groups, kernels: gradient(tensors[0], grad, groups, kernels)


def _einsum_formula(equation: str) -> tuple[Formula, tuple[int, ...]]:
    inputs, output = equation.replace(" ", "").split("->")
    kernel = inputs.split(",")[1]
    # As weight order has it.
    stored = [letter for letter in kernel if letter in output] + [letter for letter in kernel if letter not in output]
    axes = (0, *(1 + stored.index(letter) for letter in kernel))
    return _of_one(partial(_einsum_gradient, inputs.split(",")[0], output, "".join(stored))), axes


def _einsum_gradient(
    left: str, output: str, stored: str, x: Any, grad: Any, groups: int, kernels: KernelGradient
) -> Any:
    used = set(left + output + stored)
    free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in used]
    spread = "".join(free[1 : 1 + x.ndim - len(left.replace("...", ""))]) if "..." in left else ""
    left, output = left.replace("...", spread), output.replace("...", spread)
    x = ops.reshape(x, (groups, -1, *x.shape[1:]))
    grad = ops.reshape(grad, (groups, -1, *grad.shape[1:]))
    return ops.einsum(f"{free[0]}{left},{free[0]}{output}->{free[0]}{stored}", x, grad)


def _embedding_rule(layer: Any, owned: str) -> Rule | None:
    """Of an embedding, which may also give logits (`reverse=True`), by the same table or one of its own."""
    reverse = partial(_logits_gradient, getattr(layer, "logit_soft_cap", None))
    if owned == "embeddings":
        formulas: dict[str, Formula] = {"": partial(_lookup_gradient, layer)}
        if getattr(layer, "tie_weights", True):
            formulas["reverse"] = reverse
        return Rule(layer, listen_to_reversible, formulas, (0, 1, 2))
    if owned == "reverse_embeddings":
        return Rule(layer, listen_to_reversible, {"reverse": reverse}, (0, 2, 1))
    return None


def _lookup_gradient(layer: Any, tensors: tuple[Any, ...], grad: Any, groups: int, kernels: KernelGradient) -> Any:
    tokens, width = layer.embeddings.shape
    # Each group has a table of its own.
    places = ops.reshape(ops.cast(tensors[0], "int32"), (groups, -1))
    places = places + tokens * ops.arange(groups, dtype="int32")[:, None]
    rows = ops.segment_sum(ops.reshape(grad, (-1, width)), ops.reshape(places, (-1,)), groups * tokens)
    return ops.reshape(rows, (groups, tokens, width))


def _logits_gradient(
    soft_cap: float | None, tensors: tuple[Any, ...], grad: Any, groups: int, kernels: KernelGradient
) -> Any:
    """(n, tokens, width) of `cap tanh(x embeddings^T / cap)`, which has no cap mostly."""
    x, logits = tensors
    if soft_cap is not None:
        grad = grad * (1.0 - ops.square(logits / soft_cap))
    return dense_gradient(x, grad, groups)
