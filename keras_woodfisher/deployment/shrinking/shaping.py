"""Rules of layers that move values, or gather them over places, and leave channels apart."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras_woodfisher_backends.keras_internals.graphs import Call

from keras_woodfisher.deployment.shrinking.channels import UNKNOWN, Channels
from keras_woodfisher.deployment.shrinking.notes import Notes
from keras_woodfisher.deployment.shrinking.records import Count, Sizes


def unchanged(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """What does nothing in inference."""
    if getattr(call.operation, "noise_shape", None) is not None:
        return walk.barrier(call, given)
    return given[0]


def over_places(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """Pooling, cropping and upsampling: a channel that is constant stays so."""
    found = given[0]
    if found.axis in (None, _channel_axis(call)):
        return found
    return walk.barrier(call, given)


def padded(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """Zeros around: a constant that isn't zero varies behind them."""
    found = over_places(walk, call, given)
    if found.axis is None or not np.any(call.operation.padding):
        return found
    lost = ~np.isnan(found.constants) & (found.constants != 0)
    walk.ties.vary(found.sets[lost], f"{call.operation.name} puts zeros around their constant, which isn't zero")
    return found.holding(np.where(lost, np.nan, found.constants))


def global_pooled(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """One value a channel."""
    found = over_places(walk, call, given)
    if found.axis is None or call.operation.keepdims:
        return found
    return Channels(1, found.sets, found.constants)


def flattened(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """Each channel becomes as many as there are places."""
    first = call.operation.data_format == "channels_first"
    return _rearranged(walk, call, given, lambda values: (np.moveaxis(values, 0, -1) if first else values).reshape(-1))


def reshaped(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """Goes where one axis still counts the channels."""
    layer, shape = call.operation, call.outputs[0].shape[1:]
    found = _rearranged(walk, call, given, lambda values: values.reshape(shape), None in shape)
    if found.axis is None or id(layer) in walk.sizes:
        walk.fixed.add(id(layer))
    if found.axis is not None:
        place = found.axis - 1

        def config(count: Count) -> dict[str, Any]:
            target = list(layer.target_shape)
            return {"target_shape": (*target[:place], count(found.sets), *target[place + 1 :])}

        walk.note(Sizes(layer, found.sets, found.sets, {}, config), found.sets)
    return found


def permuted(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """Axes in another order."""
    found = given[0]
    if found.axis is None:
        return found
    return Channels(1 + tuple(call.operation.dims).index(found.axis), found.sets, found.constants)


def repeated(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """A new axis before that of the channels."""
    found = given[0]
    return found if found.axis is None else Channels(2, found.sets, found.constants)


def _rearranged(
    walk: Notes, call: Call, given: list[Channels], move: Callable[[np.ndarray], np.ndarray], unknown: bool = False
) -> Channels:
    """The channels after values (of one example) were moved; a barrier where no single axis counts them any more."""
    found, shape = given[0], call.inputs[0].shape[1:]
    if found.axis is None:
        return UNKNOWN
    if unknown or None in shape:
        return walk.barrier(call, given)
    line = [1] * len(shape)
    line[found.axis - 1] = -1
    moved = move(np.broadcast_to(np.arange(len(found.sets)).reshape(line), shape))
    for axis in reversed(range(moved.ndim)):
        across = moved[tuple(slice(None) if place == axis else slice(1) for place in range(moved.ndim))]
        if np.all(moved == across):
            order = across.reshape(-1)
            return Channels(axis + 1, found.sets[order], found.constants[order])
    return walk.barrier(call, given)


def _channel_axis(call: Call) -> int:
    first = getattr(call.operation, "data_format", "channels_last") == "channels_first"
    return 1 if first else len(call.inputs[0].shape) - 1
