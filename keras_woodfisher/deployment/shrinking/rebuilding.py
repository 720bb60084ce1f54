"""The smaller model: layers with other sizes, called as before, with what is left of the weights."""

import warnings
from itertools import takewhile
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras_woodfisher_backends.keras_internals.graphs import calls_of, input_layer_of, is_graph
from keras_woodfisher_backends.keras_internals.models import layers_of

from keras_woodfisher.deployment.shrinking.kernels import array_of
from keras_woodfisher.deployment.shrinking.liveness import Liveness
from keras_woodfisher.deployment.shrinking.walk import Walk


def rebuilt(model: keras.Model, walk: Walk, alive: Liveness) -> keras.Model:
    """A new model with the channels that stay, compiled as the given one is."""
    copies = _Copies(walk, alive)
    new = copies.of(model)
    copies.fill()
    _compile(model, new)
    return new


def own_constructor(model: Any) -> bool:
    """Whether a model is of a class of somebody's own that isn't made from inputs and outputs alone."""
    own = takewhile(lambda kind: not kind.__module__.startswith("keras."), type(model).__mro__)
    return any("__init__" in vars(kind) for kind in own)


class _Copies:
    """New layers in place of old ones, each made once, so that what is shared stays shared."""

    def __init__(self, walk: Walk, alive: Liveness):
        self._walk, self._alive = walk, alive
        self._made: dict[int, tuple[Any, Any]] = {}

    def of(self, operation: Any) -> Any:
        """The copy of a layer, an operation or a model."""
        if id(operation) not in self._made:
            self._made[id(operation)] = operation, self._make(operation)
        return self._made[id(operation)][1]

    def fill(self) -> None:
        """Gives the new layers the weights and the flags of the old ones."""
        for old, new in self._made.values():
            if isinstance(old, keras.Layer) and not is_graph(old):
                self._fill(old, new)
        # From the outside in: a model's flag sets those of its layers.
        for old, new in reversed(self._made.values()):
            if isinstance(old, keras.Layer):
                for one, other in zip(layers_of(old), layers_of(new), strict=True):
                    if one.trainable != other.trainable:
                        other.trainable = one.trainable

    def _make(self, operation: Any) -> Any:
        if not is_graph(operation):
            return self._leaf(operation)
        return self._sequence(operation) if isinstance(operation, keras.Sequential) else self._graph(operation)

    def _leaf(self, operation: Any) -> Any:
        try:
            config = operation.get_config()
            sizes = self._walk.sizes.get(id(operation))
            if sizes is not None:
                config |= sizes.config(self._alive.count)
            linear = self._walk.linears.get(id(operation))
            if linear is not None and self._alive.gets_bias(linear):
                config["use_bias"] = True
            return type(operation).from_config(config)
        except Exception as error:
            raise ValueError(
                f"The layer {operation.name} ({type(operation).__name__}) can't be copied: {error} A layer of one's "
                "own needs `get_config`, and `from_config` must accept what that returns."
            ) from error

    def _sequence(self, model: Any) -> Any:
        inputs = self._input(model, model.inputs[0], 0)
        return keras.Sequential([inputs, *map(self.of, model.layers)], name=model.name)

    def _graph(self, model: Any) -> Any:
        known = {id(tensor): self._input(model, tensor, place) for place, tensor in enumerate(model.inputs)}
        for call in calls_of(model):
            args, kwargs = _filled((call.args, call.kwargs), known)
            outputs = self.of(call.operation)(*args, **kwargs)
            known |= zip(map(id, call.outputs), tree.flatten(outputs), strict=True)
        make = keras.Model if own_constructor(model) else type(model)
        return make(_filled(model.input, known), _filled(model.output, known), name=model.name)

    def _input(self, model: Any, tensor: Any, place: int) -> Any:
        """A symbolic input; those of inner models are as narrow as what they get."""
        shape = list(tensor.shape)
        given = self._walk.entrances.get(id(model))
        axis = None if given is None else given[place].axis
        if given is not None and axis is not None:
            shape[axis] = self._alive.count(given[place].sets)
        entry = input_layer_of(tensor)
        return type(entry).from_config(entry.get_config() | {"batch_shape": tuple(shape)}).output

    def _fill(self, old: Any, new: Any) -> None:
        sizes = self._walk.sizes.get(id(old))
        if sizes is None or not sizes.cuts:
            for one, other in zip(old.variables, new.variables, strict=True):
                other.assign(one)
            return
        given = {variable.name: variable for variable in old.variables}
        changed = self._changed(old)
        for variable in new.variables:
            values = changed.get(variable.name)
            if values is None:
                values = array_of(given[variable.name])
            for axis, sets in sizes.cuts.get(variable.name, ()):
                values = np.take(values, np.flatnonzero(self._alive.stays(sets)), axis)
            variable.assign(ops.convert_to_tensor(values, dtype=variable.dtype))

    def _changed(self, layer: Any) -> dict[str, np.ndarray]:
        """The variables of a layer, still uncut, that got the part of inputs that go."""
        linear = self._walk.linears.get(id(layer))
        if linear is None:
            return {}
        found: dict[str, np.ndarray] = {}
        bias = self._alive.folded_bias(linear)
        if bias is not None:
            found["bias"] = bias
        joined = self._alive.joined(linear)
        if joined:
            values = array_of(layer.kernel).astype(np.float64)
            rows = np.moveaxis(values, linear.kernel_axes[0], 0)
            for gone, kept, ratio in joined:
                rows[kept] += ratio * rows[gone]
            found["kernel"] = values
        return found


def _filled(structure: Any, known: dict[int, Any]) -> Any:
    """The same with the tensors that are known by those in it."""
    return tree.map_structure(lambda leaf: known.get(id(leaf), leaf), structure)


def _compile(old: keras.Model, new: keras.Model) -> None:
    if not old.compiled:
        return
    try:
        new.compile_from_config(old.get_compile_config())
    except Exception as error:  # noqa: BLE001 - losses and metrics of one's own fail in ways of their own
        warnings.warn(
            f"The smaller model isn't compiled, since the loss, the metrics or the optimizer of {old.name!r} can't be "
            f"copied ({error}). Compile it before training.",
            stacklevel=4,
        )
