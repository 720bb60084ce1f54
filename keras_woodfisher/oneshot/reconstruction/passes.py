"""Passes through a model whose layers' calls are watched, and what those tell before anything is solved."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.keras_internals.graphs import Graphs
from keras_woodfisher_backends.keras_internals.models import float32_computation, infer, layers_of
from keras_woodfisher_backends.nest import arrays, map_arrays

from keras_woodfisher.gradients.loss import forward_only
from keras_woodfisher.oneshot.reconstruction.footprint import LiveOutputs
from keras_woodfisher.oneshot.reconstruction.layer_calls import hooked
from keras_woodfisher.oneshot.reconstruction.problem import Problem


class Stopped(BaseException):
    """Carries an error out of a layer's call: Keras would put words of its own around it."""

    def __init__(self, error: FloatingPointError):
        super().__init__(str(error))
        self.error = error


class Passes:
    """A model's inference with its layers hooked; whatever it would update stays as it is.

    Attributes:
        graphs: The functional models within it, while they run.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self.graphs = Graphs(model)
        self._scope = keras.StatelessScope()

    def run(self, x: Any, call: Callable[..., Any], scope: keras.StatelessScope | None = None) -> None:
        """One pass.

        Args:
            x: Inputs of the model.
            call: Answers for the layers' calls, see `hooked`.
            scope: Holds what is updated.
        """
        inputs = map_arrays(ops.convert_to_tensor, x)
        self._scope = scope or keras.StatelessScope()
        with (
            forward_only(),
            float32_computation(self._model),
            self._scope,
            self.graphs.watched(),
            hooked(layers_of(self._model), call),
        ):
            try:
                infer(self._model, inputs)
            except Stopped as stopped:
                raise stopped.error from None

    def has_updated(self) -> bool:
        """Whether the latest pass would have updated anything that isn't trained, such as the state of a layer."""
        found = [(v, self._scope.get_current_value(v)) for v in self._model.non_trainable_variables]
        pairs = [(variable, new) for variable, new in found if new is not None]
        return any(not np.array_equal(*map(ops.convert_to_numpy, pair)) for pair in pairs)


class Reads(keras.StatelessScope):
    """Follows which variables are read outside of the calls of their layer.

    Args:
        layers: The layer of each variable, both by id.

    Attributes:
        outside: Those variables.
    """

    def __init__(self, layers: Mapping[int, int]):
        super().__init__()
        self._layers = layers
        self._open: list[int] = []
        self.outside: set[int] = set()

    @contextmanager
    def within(self, layer: Any) -> Iterator[None]:
        """A layer's call."""
        self._open.append(id(layer))
        try:
            yield
        finally:
            self._open.pop()

    def get_current_value(self, variable: Any) -> Any:
        """What Keras asks wherever it reads a variable."""
        layer = self._layers.get(id(variable))
        if layer is not None and layer not in self._open:
            self.outside.add(id(variable))
        return super().get_current_value(variable)


class Surveyed(NamedTuple):
    """What a pass tells of a model.

    Attributes:
        called: The problems of layers that are called, in their order.
        live: How many bytes of outputs are alive at a time.
        shared: Keys of the problems with a variable that another layer reads.
    """

    called: list[Problem]
    live: int
    shared: set[tuple[int, ...]]


class Survey:
    """Looks at the calls of the layers of some problems.

    Args:
        model: A built model, which isn't changed.
        problems: Which.
    """

    def __init__(self, model: keras.Model, problems: Sequence[Problem]):
        self._passes = Passes(model)
        self._of_layer: dict[int, list[Problem]] = {}
        for problem in problems:
            self._of_layer.setdefault(id(problem.layer), []).append(problem)

    def order(self, x: Any) -> Surveyed:
        """The order in which the model calls layers; each problem learns how often that is.

        Args:
            x: Inputs of the model, one example.
        """
        calls: dict[int, list[int]] = {}
        live = LiveOutputs(self._passes.graphs)
        problems = [problem for same in self._of_layer.values() for problem in same]
        reads = Reads({key: id(problem.layer) for problem in problems for key in problem.key})

        def count(layer: Any, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            with reads.within(layer):
                output = live.call(layer, own, args, kwargs)
            if id(layer) in self._of_layer:
                calls.setdefault(id(layer), []).append(math.prod(arrays(output)[0].shape))
            return output

        self._passes.run(x, count, reads)
        found = []
        for key, sizes in calls.items():
            for problem in self._of_layer[key]:
                problem.calls = len(sizes)
                branches, _, outputs = problem.part.shape
                problem.positions = max(1, sum(sizes) // (branches * outputs))
                found.append(problem)
        return Surveyed(found, live.peak, {p.key for p in problems if not reads.outside.isdisjoint(p.key)})

    def inputs(self, x: Any, look: Callable[[Any], Any]) -> dict[int, list[Any]]:
        """What `look` makes of the input of each call of the problems' layers, by the layer's id.

        Args:
            x: Inputs of the model.
            look: Gets a tensor, the first one that the call takes.
        """
        found: dict[int, list[Any]] = {}

        def listen(layer: Any, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if id(layer) in self._of_layer:
                found.setdefault(id(layer), []).append(look(arrays(args[0])[0]))
            return own(*args, **kwargs)

        self._passes.run(x, listen)
        return found
