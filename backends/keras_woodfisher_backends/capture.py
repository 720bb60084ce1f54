"""Per-example gradients from one batched pass: the input of each layer and the gradient of its output.

For `z = op(x, kernel)` the kernel's gradient for one example needs only that example's rows of `x` and
`dL/dz`, which a batched forward and backward pass gives for all examples at once (Goodfellow, arXiv
1510.01799; for convolutions Rochette et al., arXiv 1912.06015).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from keras import layers, ops

from keras_woodfisher_backends.nest import arrays, take
from keras_woodfisher_backends.protocol import Loss

_KNOWN = (layers.Dense, layers.EinsumDense, layers.Conv1D, layers.Conv2D, layers.Conv3D)


class Differentiation(Protocol):
    """What capturing needs of a framework."""

    def watch(self, tensor: Any) -> None:
        """Makes sure that the gradient with respect to a tensor can be asked for."""
        ...

    def gradients(self, total: Any, tensors: Sequence[Any]) -> Sequence[Any]:
        """`d total / d tensor` for each; None where it doesn't depend on it."""
        ...


class Capture:
    """Knows which layers own `variables`, and listens to them during one pass.

    Args:
        model: The Keras model.
        variables: The variables to differentiate.

    Attributes:
        usable: Whether each variable is the kernel of a layer whose rule is known.
    """

    def __init__(self, model: Any, variables: Sequence[Any]):
        owners: dict[int, list[Any]] = {id(variable): [] for variable in variables}
        for layer in model._flatten_layers():
            for variable in layer._trainable_variables:
                if id(variable) in owners:
                    owners[id(variable)].append(layer)
        found = [owners[id(variable)] for variable in variables]
        self.usable = all(
            len(owner) == 1 and type(owner[0]) in _KNOWN and owner[0].kernel is variable
            for owner, variable in zip(found, variables, strict=True)
        )
        self._layers = [owner[0] for owner in found if owner]

    def sample(self, how: Differentiation, loss: Loss, values: Any, others: Any, batch: Any) -> list[Any]:
        """The gradient of each of n examples, in Keras's layout: a list of (n, *shape)."""
        examples = take(batch, (slice(None), 0))
        calls: list[list[tuple[Any, Any]]] = [[] for _ in self._layers]
        with _listening(self._layers, calls, how):
            output = loss.predict(values, others, examples)
        count = arrays(examples)[0].shape[0]
        total = sum(loss.measure(take(batch, index), take(output, slice(index, index + 1))) for index in range(count))
        grads = iter(how.gradients(total, [z for call in calls for _, z in call]))
        rows = []
        for layer, call, value in zip(self._layers, calls, values, strict=True):
            row = ops.zeros((count, *value.shape), "float32")
            for x, _ in call:
                grad = next(grads)
                if grad is not None:
                    row = row + _kernel_gradient(layer, x, grad)
            rows.append(row)
        return rows


@contextmanager
def _listening(owners: Sequence[Any], calls: Sequence[list], how: Differentiation) -> Iterator[None]:
    """Records (input, pre-activation output) of each call of each layer, and leaves no trace."""
    # On torch, an activation that is a layer isn't in the instance's own dictionary.
    activations = [vars(layer).get("activation") for layer in owners]
    try:
        for layer, call in zip(owners, calls, strict=True):
            _listen(layer, call, how)
        yield
    finally:
        for layer, activation in zip(owners, activations, strict=True):
            vars(layer).pop("call", None)
            if activation is None:
                vars(layer).pop("activation", None)
            else:
                vars(layer)["activation"] = activation


def _listen(layer: Any, record: list, how: Differentiation) -> None:
    original, activation = layer.call, layer.activation
    inputs: list[Any] = []

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.append(x)
        return original(x, *args, **kwargs)

    def listen(z: Any) -> Any:
        how.watch(z)
        record.append((inputs.pop(), z))
        return activation(z)

    # Past Keras's __setattr__, which would track them.
    vars(layer)["call"] = call
    vars(layer)["activation"] = listen


def _kernel_gradient(layer: Any, x: Any, grad: Any) -> Any:
    if isinstance(layer, layers.EinsumDense):
        return _einsum_gradient(layer.equation, x, grad)
    if isinstance(layer, layers.Dense):
        x = ops.reshape(x, (x.shape[0], -1, x.shape[-1]))
        grad = ops.reshape(grad, (grad.shape[0], -1, grad.shape[-1]))
        return ops.matmul(ops.swapaxes(x, 1, 2), grad)
    return _convolution_gradient(layer, x, grad)


def _einsum_gradient(equation: str, x: Any, grad: Any) -> Any:
    inputs, output = equation.replace(" ", "").split("->")
    left, kernel = inputs.split(",")
    spread = "ABCDEFGH"[: x.ndim - len(left.replace("...", ""))]
    left, output = left.replace("...", spread), output.replace("...", spread)
    return ops.einsum(f"{left},{output}->{left[0]}{kernel}", x, grad)


def _convolution_gradient(layer: Any, x: Any, grad: Any) -> Any:
    """Correlates shifted views of the input with the output's gradient, in any number of dimensions."""
    if layer.data_format == "channels_first":
        x, grad = ops.moveaxis(x, 1, -1), ops.moveaxis(grad, 1, -1)
    size, stride, dilation = layer.kernel_size, layer.strides, layer.dilation_rate
    pads = _padding(layer.padding, x.shape[1:-1], size, stride, dilation)
    if any(sum(pad) for pad in pads):
        x = ops.pad(x, [(0, 0), *pads, (0, 0)])
    count, outputs, channels = x.shape[0], grad.shape[1:-1], x.shape[-1]
    views = []
    for offset in np.ndindex(*size):
        window = tuple(
            slice(k * d, k * d + (n - 1) * s + 1, s)
            for k, d, n, s in zip(offset, dilation, outputs, stride, strict=True)
        )
        views.append(ops.reshape(x[(slice(None), *window)], (count, -1, channels)))
    grad = ops.reshape(grad, (count, -1, layer.filters))
    if layer.groups == 1:
        rows = ops.matmul(ops.swapaxes(ops.concatenate(views, -1), 1, 2), grad)
    else:
        patches = ops.reshape(ops.stack(views, 2), (count, -1, len(views), layer.groups, channels // layer.groups))
        grad = ops.reshape(grad, (count, -1, layer.groups, layer.filters // layer.groups))
        rows = ops.einsum("npkgc,npgo->nkcgo", patches, grad)
    return ops.reshape(rows, (count, *size, channels // layer.groups, layer.filters))


def _padding(mode: str, shape: Any, size: Any, stride: Any, dilation: Any) -> list[tuple[int, int]]:
    pads = []
    for length, k, s, d in zip(shape, size, stride, dilation, strict=True):
        reach = (k - 1) * d
        total = max((math.ceil(length / s) - 1) * s + reach + 1 - length, 0)
        pads.append({"same": (total // 2, total - total // 2), "causal": (reach, 0), "valid": (0, 0)}[mode])
    return pads
