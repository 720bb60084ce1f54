"""Rules of layers that compute on channels: all together (dense layers, convolutions), or each by itself."""

from typing import Any

import numpy as np
from keras import layers
from keras_woodfisher_backends.keras_internals.graphs import Call
from keras_woodfisher_backends.keras_internals.models import renormalises

from keras_woodfisher.deployment.shrinking import elementwise
from keras_woodfisher.deployment.shrinking.channels import UNKNOWN, Channels
from keras_woodfisher.deployment.shrinking.kernels import (
    array_of,
    bias_of,
    depthwise_sums,
    groups_of,
    pads_with_zeros,
    reads_of,
    response_of,
)
from keras_woodfisher.deployment.shrinking.notes import Notes
from keras_woodfisher.deployment.shrinking.records import Linear, Sizes, linear_sizes


def linear(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """Dense layers and convolutions: new channels, each the sum of what it reads."""
    layer = call.operation
    found = walk.along(given[0], call.inputs[0], _channel_axis(call), call)
    if groups_of(layer) > 1:
        return _grouped(walk, call, found)
    if id(layer) not in walk.linears:
        outputs = walk.ties.fresh(call.outputs[0].shape[found.axis])
        walk.linears[id(layer)] = Linear(layer, linear_sizes(layer, found.sets, outputs))
    record = walk.linears[id(layer)]
    pads = pads_with_zeros(layer, call.inputs[0].shape)
    record.called(found.constants, pads)
    sizes = walk.note(record.sizes, found.sets)
    counted, answers = _answers(layer, found.constants, pads, record.reads)
    return _activated(walk, call, sizes, Channels(found.axis, sizes.outputs, np.where(counted, answers, np.nan)))


def _grouped(walk: Notes, call: Call, found: Channels) -> Channels:
    """A grouped convolution: its groups go as a whole."""
    layer, groups = call.operation, call.operation.groups
    firsts = found.sets.reshape(groups, -1)[:, 0]
    walk.ties.tie(found.sets, np.repeat(firsts, len(found.sets) // groups))
    outputs = np.repeat(firsts, layer.filters // groups)
    sizes = walk.note(
        Sizes(
            layer,
            found.sets,
            outputs,
            {"kernel": ((-1, outputs),), "bias": ((0, outputs),)},
            lambda count: {"filters": count(outputs), "groups": count(firsts)},
        ),
        found.sets,
    )
    counted, answers = _answers(layer, found.constants, pads_with_zeros(layer, call.inputs[0].shape), reads_of(layer))
    return _activated(walk, call, sizes, Channels(found.axis, outputs, np.where(counted, answers, np.nan)))


def depthwise(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """Each channel by itself, to one or several."""
    layer = call.operation
    found = walk.along(given[0], call.inputs[0], _channel_axis(call), call)
    outputs = np.repeat(found.sets, layer.depth_multiplier)
    cuts = {"kernel": ((-2, found.sets),), "bias": ((0, outputs),)}
    sizes = walk.note(Sizes(layer, found.sets, outputs, cuts), found.sets)
    before = np.repeat(found.constants, layer.depth_multiplier)
    read, sums = depthwise_sums(layer)
    if pads_with_zeros(layer, call.inputs[0].shape):
        lost = read & ~np.isnan(before) & (before != 0)
        walk.ties.vary(outputs[lost], f"{layer.name} pads their constant, which isn't zero, with zeros")
        before = np.where(lost, np.nan, before)
    held = np.where(read, before * sums, 0.0) + bias_of(layer, len(outputs))
    return _activated(walk, call, sizes, Channels(found.axis, outputs, held))


def batch_normalized(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """`gamma (x - mean) / sqrt(variance + epsilon) + beta`, with the moving statistics."""
    layer = call.operation
    if renormalises(layer):
        return walk.barrier(call, given)
    found = walk.along(given[0], call.inputs[0], layer.axis % len(call.inputs[0].shape), call)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    walk.note(Sizes(layer, found.sets, found.sets, dict.fromkeys(names, ((0, found.sets),))), found.sets)
    mean, variance = (array_of(variable).astype(np.float64) for variable in (layer.moving_mean, layer.moving_variance))
    gamma = array_of(layer.gamma) if layer.scale else 1.0
    beta = array_of(layer.beta) if layer.center else 0.0
    return found.holding((found.constants - mean) / np.sqrt(variance + layer.epsilon) * gamma + beta)


def prelu(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """With one slope a channel."""
    layer = call.operation
    wide = [axis for axis, size in enumerate(layer.alpha.shape, start=1) if size > 1]
    if len(wide) != 1:
        return walk.barrier(call, given)
    found = walk.along(given[0], call.inputs[0], wide[0], call)
    walk.note(Sizes(layer, found.sets, found.sets, {"alpha": ((wide[0] - 1, found.sets),)}), found.sets)
    slopes = array_of(layer.alpha).reshape(-1).astype(np.float64)
    return found.holding(np.where(found.constants < 0, slopes, 1.0) * found.constants)


def rescaled(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """By one number for all channels."""
    layer, found = call.operation, given[0]
    if not all(isinstance(number, (int, float)) for number in (layer.scale, layer.offset)):
        return walk.barrier(call, given)
    return found.holding(found.constants * layer.scale + layer.offset)


def activation(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """A layer that only applies a function."""
    layer, found = call.operation, given[0]
    function = layer.activation if isinstance(layer, layers.Activation) else layer
    if not elementwise.is_elementwise(function):
        return walk.barrier(call, given)
    if found.axis is None:
        return UNKNOWN
    return found.holding(elementwise.values_of(function, found.constants, layer.compute_dtype))


def operation(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """An elementwise operation of `keras.ops`."""
    found, dtype = given[0], call.outputs[0].dtype
    if len(given) > 1 or not (call.args and call.args[0] is call.inputs[0]):
        return walk.barrier(call, given)
    if found.axis is None:
        return UNKNOWN
    rest, named = call.args[1:], call.kwargs
    return found.holding(elementwise.values_of(lambda x: call.operation(x, *rest, **named), found.constants, dtype))


def _answers(layer: Any, constants: np.ndarray, pads: bool, reads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which outputs are constant before the activation, and the values of these."""
    counted = (constants == 0) | (~np.isnan(constants) & (not pads))
    constant = ~reads[~counted].any(0)
    return constant, response_of(layer, np.where(counted, constants, 0.0)) + bias_of(layer, reads.shape[1])


def _activated(walk: Notes, call: Call, sizes: Sizes, found: Channels) -> Channels:
    """The channels behind a layer's own activation."""
    layer = call.operation
    if elementwise.is_elementwise(layer.activation):
        found = found.holding(elementwise.values_of(layer.activation, found.constants, layer.compute_dtype))
    else:
        walk.ties.need(found.sets, f"the activation of {layer.name} isn't known to work on each channel by itself")
        found = found.holding(np.full(len(found.sets), np.nan))
    constant = ~np.isnan(found.constants)
    sizes.constant = sizes.constant & constant if len(sizes.constant) else constant
    return found


def _channel_axis(call: Call) -> int:
    first = getattr(call.operation, "data_format", "channels_last") == "channels_first"
    return 1 if first else len(call.inputs[0].shape) - 1
