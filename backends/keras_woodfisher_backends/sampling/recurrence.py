"""Rules for recurrent layers: one pass through time gives all that the gradients of their kernels are made of.

With `z_t = x_t kernel + bias`, for all times at once before the loop, and `h_{t-1}` the output before time t, the
gradient of an example's kernel is one product of matrices over all times, `sum_t x_t dL/dz_t^T`, and that of its
recurrent kernel is one of `h_{t-1}` and the gradient of `h_{t-1} recurrent_kernel`, which `dL/dz_t` and the gates tell.
So nothing that is inside the loop need be looked at, which TensorFlow and JAX don't allow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from keras import layers, ops, tree

from keras_woodfisher_backends.keras_internals.recurrence import (
    is_conv_lstm_cell,
    is_plain_cell,
    is_plain_loop,
    loop_over_time,
)
from keras_woodfisher_backends.sampling.convolution import KernelGradient, convolution_gradient
from keras_woodfisher_backends.sampling.layer_rules import Rule, dense_gradient, kernel_last
from keras_woodfisher_backends.sampling.listening import Attributes, Record

_KERNELS = ("kernel", "recurrent_kernel")


@dataclass(frozen=True)
class _Geometry:
    """What `convolution_gradient` asks of a layer."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation_rate: tuple[int, ...]
    padding: str
    data_format: str
    groups: int = 1


def recurrent_rule(cell: Any, variable: Any, parent: Any) -> Rule | None:
    """The rule for a kernel of a recurrent cell; None for other variables, and where a layer computes otherwise.

    Args:
        cell: The layer that owns the variable.
        variable: A variable.
        parent: The recurrent layer that runs the cell, as far as there is one.
    """
    owned = next((name for name in _KERNELS if getattr(cell, name, None) is variable), None)
    if owned is None or not is_plain_cell(cell):
        return None
    formula, axes = partial(_FORMULAS[owned], cell), kernel_last(len(variable.shape))
    if parent is None:
        return Rule(cell, _listen_to_calls, {id(cell): formula}, axes)
    if not is_plain_loop(parent) or not all(map(is_plain_cell, cells_of(parent))):
        return None
    return Rule(parent, _listen_through_time, {id(cell): formula}, axes)


def cells_of(layer: Any) -> list[Any]:
    """The cells of a recurrent layer, in the order in which they are called at each time."""
    return list(layer.cell.cells) if isinstance(layer.cell, layers.StackedRNNCells) else [layer.cell]


def _listen_to_calls(cell: Any, record: Record) -> Attributes:
    """Hears a cell that is called by itself."""

    def call(inputs: Any, states: Any, training: bool = False) -> Any:
        listed = _listed(states)
        z = record.watch(_projected(cell, inputs))
        record.add(id(cell), (inputs, listed[0], z), z)
        output, new = _step_of(cell)(z, listed)
        return output, new if tree.is_nested(states) else new[0]

    return {"call": call}


def _listen_through_time(layer: Any, record: Record) -> Attributes:
    """Hears all cells of a recurrent layer at all times, one cell after the other."""
    cells = cells_of(layer)

    def inner_loop(sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        mask = mask[0] if tree.is_nested(mask) else mask
        x, states = sequences, _listed(initial_state)
        if layer.go_backwards:
            x, mask = ops.flip(x, 1), None if mask is None else ops.flip(mask, 1)
        last = []
        for cell, state in zip(cells, states if len(cells) > 1 else [states], strict=True):
            first = _listed(state)
            z = record.watch(_projected(cell, x))
            outputs, new = loop_over_time(_step_of(cell), z, first, mask, layer.unroll)
            record.add(id(cell), (x, _shifted(outputs, first[0], mask), z), z)
            last.append(list(new))
            x = outputs
        if mask is not None and layer.zero_output_for_mask:
            x = x * ops.cast(_spread(mask, x), x.dtype)
        return x[:, -1], x, last if len(cells) > 1 else last[0]

    # Neither this layer nor one around it is to run all times by a routine of the framework's.
    return {"inner_loop": inner_loop, "use_cudnn": False}


def _listed(states: Any) -> list[Any]:
    return list(states) if tree.is_nested(states) else [states]


def _shifted(outputs: Any, first: Any, mask: Any) -> Any:
    """The output before each time, (N, T, ...)."""
    before = ops.concatenate([ops.expand_dims(first, 1), outputs[:, :-1]], 1)
    if mask is None:
        return before
    # Before the first time that counts the state is what it was.
    begun = ops.cumsum(ops.cast(mask, "int32"), 1) - ops.cast(mask, "int32") > 0
    return ops.where(_spread(begun, before), before, ops.expand_dims(first, 1))


def _spread(mask: Any, tensor: Any) -> Any:
    return ops.reshape(mask, (*mask.shape[:2], *[1] * (tensor.ndim - 2)))


def _projected(cell: Any, x: Any) -> Any:
    """What a cell's input adds to the sums of its gates, of all times at once."""
    if is_conv_lstm_cell(cell):
        geometry = _input_geometry(cell)
        flat = ops.reshape(x, (-1, *x.shape[-len(geometry.kernel_size) - 1 :]))
        z = _convolved(geometry, flat, cell.kernel)
        if cell.bias is not None:
            z = z + (cell.bias if geometry.data_format == "channels_last" else _per_channel(cell))
        return ops.reshape(z, (*x.shape[: x.ndim - len(geometry.kernel_size) - 1], *z.shape[1:]))
    bias = cell.bias
    if isinstance(cell, layers.GRUCell) and cell.reset_after and bias is not None:
        bias = bias[0]
    z = ops.matmul(x, cell.kernel)
    return z if bias is None else z + bias


def _per_channel(cell: Any) -> Any:
    return ops.reshape(cell.bias, (1, -1, *[1] * len(cell.kernel_size)))


def _step_of(cell: Any) -> Callable[[Any, Any], Any]:
    """`step(z, states) -> (output, new states)` of a cell."""
    kernel, activation = ops.convert_to_tensor(cell.recurrent_kernel), cell.activation
    if isinstance(cell, layers.GRUCell):
        return partial(_gru_step, cell, kernel, _recurrent_bias(cell))
    if isinstance(cell, layers.SimpleRNNCell):
        return lambda z, states: _twice(activation(z + states[0] @ kernel))
    if not is_conv_lstm_cell(cell):
        return lambda z, states: _lstm_step(cell, z + states[0] @ kernel, states[1], -1)
    geometry = _recurrent_geometry(cell)
    channels = 1 if geometry.data_format == "channels_first" else -1
    return lambda z, states: _lstm_step(cell, z + _convolved(geometry, states[0], kernel), states[1], channels)


def _twice(output: Any) -> tuple[Any, list[Any]]:
    return output, [output]


def _lstm_step(cell: Any, total: Any, carry: Any, axis: int) -> tuple[Any, list[Any]]:
    i, f, c, o = ops.split(total, 4, axis)
    gate, activation = cell.recurrent_activation, cell.activation
    carry = gate(f) * carry + gate(i) * activation(c)
    output = gate(o) * activation(carry)
    return output, [output, carry]


def _recurrent_bias(cell: Any) -> Any:
    return ops.convert_to_tensor(cell.bias)[1] if cell.reset_after and cell.bias is not None else 0.0


def _gru_step(cell: Any, kernel: Any, bias: Any, z: Any, states: Any) -> tuple[Any, list[Any]]:
    units, before = cell.units, states[0]
    if cell.reset_after:
        inner = before @ kernel + bias
        gates = cell.recurrent_activation(z[:, : 2 * units] + inner[:, : 2 * units])
        candidate = gates[:, units:] * inner[:, 2 * units :]
    else:
        gates = cell.recurrent_activation(z[:, : 2 * units] + before @ kernel[:, : 2 * units])
        candidate = (gates[:, units:] * before) @ kernel[:, 2 * units :]
    candidate = cell.activation(z[:, 2 * units :] + candidate)
    update = gates[:, :units]
    return _twice(update * before + (1 - update) * candidate)


def _kernel_gradient(cell: Any, tensors: tuple[Any, ...], grad: Any, groups: int, kernels: KernelGradient) -> Any:
    if is_conv_lstm_cell(cell):
        return _convolution(_input_geometry(cell), tensors[0], grad, groups, kernels)
    return dense_gradient(tensors[0], grad, groups)


def _recurrent_kernel_gradient(
    cell: Any, tensors: tuple[Any, ...], grad: Any, groups: int, kernels: KernelGradient
) -> Any:
    _, before, z = tensors
    if is_conv_lstm_cell(cell):
        return _convolution(_recurrent_geometry(cell), before, grad, groups, kernels)
    if not isinstance(cell, layers.GRUCell):
        return dense_gradient(before, grad, groups)
    # The reset gate stands after the product of the candidate, or before it.
    units = cell.units
    gate, bias = slice(units, 2 * units), _recurrent_bias(cell)
    total = z[..., gate] + ops.matmul(before, cell.recurrent_kernel[:, gate])
    reset = cell.recurrent_activation(total + (bias[gate] if cell.reset_after and cell.bias is not None else 0.0))
    gates, candidate = grad[..., : 2 * units], grad[..., 2 * units :]
    if cell.reset_after:
        return dense_gradient(before, ops.concatenate([gates, reset * candidate], -1), groups)
    parts = dense_gradient(before, gates, groups), dense_gradient(reset * before, candidate, groups)
    return ops.concatenate(parts, 1)


def _input_geometry(cell: Any) -> _Geometry:
    return _Geometry(cell.kernel_size, cell.strides, cell.dilation_rate, cell.padding, cell.data_format)


def _recurrent_geometry(cell: Any) -> _Geometry:
    ones = (1,) * len(cell.kernel_size)
    return _Geometry(cell.kernel_size, ones, ones, "same", cell.data_format)


def _convolved(geometry: _Geometry, x: Any, kernel: Any) -> Any:
    return ops.conv(
        x,
        kernel,
        strides=geometry.strides,
        padding=geometry.padding,
        data_format=geometry.data_format,
        dilation_rate=geometry.dilation_rate,
    )


def _convolution(geometry: _Geometry, x: Any, grad: Any, groups: int, kernels: KernelGradient) -> Any:
    """Times count as examples."""
    rank = len(geometry.kernel_size) + 1
    x, grad = (ops.reshape(t, (-1, *t.shape[t.ndim - rank :])) for t in (x, grad))
    return convolution_gradient(geometry, x, grad, groups, kernels)


_FORMULAS: dict[str, Callable[..., Any]] = {"kernel": _kernel_gradient, "recurrent_kernel": _recurrent_kernel_gradient}
