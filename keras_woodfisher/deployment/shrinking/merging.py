"""Rules of layers and operations that put several tensors together."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from keras import tree
from keras_woodfisher_backends.keras_internals.graphs import Call

from keras_woodfisher.deployment.shrinking.channels import UNKNOWN, Channels
from keras_woodfisher.deployment.shrinking.notes import Notes

FUNCTIONS: dict[str, Callable[[list[Any]], Any]] = {
    "Add": lambda parts: reduce(np.add, parts),
    "Average": lambda parts: reduce(np.add, parts) / len(parts),
    "Divide": lambda parts: _quotient(*parts),
    "Maximum": lambda parts: reduce(np.maximum, parts),
    "Minimum": lambda parts: reduce(np.minimum, parts),
    "Multiply": lambda parts: reduce(_product, parts),
    "Subtract": lambda parts: reduce(np.subtract, parts),
}
"""By the names of layers and operations: what becomes of constants, nan standing for what isn't one."""


def combined(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """Number by number: a channel can only go from all parts, and from what they become."""
    rest = iter(given)
    parts: list[Any] = []
    for leaf in tree.flatten((call.args, call.kwargs)):
        if any(leaf is tensor for tensor in call.inputs):
            parts.append(next(rest))
        elif isinstance(leaf, (bool, int, float)):
            parts.append(float(leaf))
        elif leaf is not None:
            return walk.barrier(call, given)
    known = [part for part in parts if isinstance(part, Channels)]
    axis = next((part.axis for part in known if part.axis is not None), None)
    if axis is None:
        return UNKNOWN
    output = call.outputs[0]
    if any(len(tensor.shape) != len(output.shape) or tensor.shape[axis] is None for tensor in call.inputs):
        return walk.barrier(call, given)
    along = iter([walk.along(part, tensor, axis, call) for part, tensor in zip(known, call.inputs, strict=True)])
    parts = [next(along) if isinstance(part, Channels) else part for part in parts]
    known = [part for part in parts if isinstance(part, Channels)]
    sets = next(part.sets for part in known if len(part.sets) == output.shape[axis])
    for part in known:
        if len(part.sets) == len(sets):
            walk.ties.tie(sets, part.sets)
        else:
            walk.ties.need(part.sets, f"{call.operation.name} spreads one channel over several")
    constants = [part.constants if isinstance(part, Channels) else part for part in parts]
    held = np.broadcast_to(FUNCTIONS[type(call.operation).__name__](constants), sets.shape)
    lost = np.isnan(held) & np.any([~np.isnan(part.constants) for part in known], axis=0)
    walk.ties.vary(sets[lost], f"{call.operation.name} combines them with channels that aren't constant")
    return Channels(axis, sets, held)


def concatenated(walk: Notes, call: Call, given: list[Channels]) -> Channels:
    """Side by side: along the axis of channels each part keeps its own, along others they can only go together."""
    axis = next((part.axis for part in given if part.axis is not None), None)
    if axis is None:
        return UNKNOWN
    if any(tensor.shape[axis] is None for tensor in call.inputs):
        return walk.barrier(call, given)
    parts = [walk.along(part, tensor, axis, call) for part, tensor in zip(given, call.inputs, strict=True)]
    if call.operation.axis % len(call.outputs[0].shape) == axis:
        return Channels(
            axis, np.concatenate([part.sets for part in parts]), np.concatenate([part.constants for part in parts])
        )
    first = parts[0]
    for part in parts[1:]:
        walk.ties.tie(first.sets, part.sets)
    same = np.all([part.constants == first.constants for part in parts], axis=0)
    lost = ~same & np.any([~np.isnan(part.constants) for part in parts], axis=0)
    walk.ties.vary(first.sets[lost], f"{call.operation.name} puts them beside others that aren't the same constant")
    return first.holding(np.where(same, first.constants, np.nan))


def _product(one: Any, other: Any) -> Any:
    """Nothing times anything is nothing."""
    return np.where((one == 0) | (other == 0), 0.0, one * other)


def _quotient(one: Any, other: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = one / np.asarray(other)
    return np.where(np.isfinite(found), found, np.nan)
