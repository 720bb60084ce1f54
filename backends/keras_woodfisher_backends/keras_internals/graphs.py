"""Private parts of functional models: their graph of calls, run so that tensors go after their last use."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops, tree

from keras_woodfisher_backends.keras_internals.models import layers_of, mask_of

_RUN = "_run_through_graph"
Scaling = layers.BatchNormalization
"""Layers that, in inference, multiply each channel by a number and add another."""


class Snapshot(NamedTuple):
    """What a functional model holds before one of its calls.

    Attributes:
        place: Which call, in the order in which they are made.
        known: The values of tensors, by their ids.
    """

    place: int
    known: dict[int, np.ndarray]


class Call(NamedTuple):
    """One call within a functional model, with symbolic tensors in the places of its values.

    Attributes:
        operation: A layer, an operation of `keras.ops`, or a functional model.
        args: What it is called with.
        kwargs: The same by name.
        inputs: The tensors among both, flat.
        outputs: The tensors that it gives, flat.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Any]
    outputs: list[Any]


def calls_of(model: Any) -> list[Call]:
    """The calls of a functional or sequential model in an order in which they can be made."""
    nodes = _nodes_of(graph_of(model))
    return [
        Call(node.operation, node.arguments.args, node.arguments.kwargs, node.input_tensors, node.outputs)
        for node in nodes
    ]


def input_layer_of(tensor: Any) -> Any:
    """The layer that a symbolic input of a model stands for."""
    return tensor._keras_history[0]


def is_graph(layer: Any) -> bool:
    """Whether a layer is a model that does nothing but what its graph of calls says."""
    return graph_of(layer) is not None and type(layer).call.__module__.startswith("keras.")


class Graphs:
    """The functional models within a model, while they run.

    Attributes:
        whole: The model itself, if it is one.
    """

    def __init__(self, model: keras.Model):
        self._graphs = {id(graph): Graph(graph) for graph in _functional_models(model)}
        self._running: list[Graph] = []
        self.whole = self._graphs.get(id(graph_of(model)))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Has them run node by node: what no later node uses is let go of (Keras keeps all till the end)."""
        graphs = [known.model for known in self._graphs.values()]
        try:
            for graph in graphs:
                # Past Keras's __setattr__, which would track it.
                vars(graph)[_RUN] = partial(self._run, graph)
            yield
        finally:
            for graph in graphs:
                vars(graph).pop(_RUN, None)
            self._running.clear()

    def addition_after(self, layer: Any) -> tuple[list[Any], Any] | None:
        """Where the output of the layer that is being called is added to something that is known already.

        Returns:
            The `Scaling` layers that come between, and the other summand; None where there is no such addition.
        """
        return self._running[-1].addition_after(layer) if self._running else None

    def runs(self, layer: Any) -> bool:
        """Whether a layer is a functional model."""
        return isinstance(layer, keras.Sequential) or id(layer) in self._graphs

    def known(self) -> list[Any]:
        """The tensors that the models that are running hold now."""
        return [tensor for graph in self._running for tensor in graph.known.values()]

    def _run(
        self, model: Any, inputs: Any, operation_fn: Callable = lambda operation: operation, call_fn: Any = None
    ) -> Any:
        graph = self._graphs[id(model)]
        if call_fn is not None:  # symbolic
            return getattr(type(model), _RUN)(model, inputs, operation_fn, call_fn)
        self._running.append(graph)
        try:
            return graph.run(inputs, operation_fn)
        finally:
            self._running.pop()


class Graph:
    """One functional model: its nodes in the order in which Keras runs them.

    Attributes:
        begin: Where the next run begins; None: with its inputs.
        keep_at: The place at which it keeps a snapshot.
        kept: That, once it is taken; None where tensors carry masks, which it would lose.
    """

    def __init__(self, model: Any):
        self.model = model
        self.begin: Snapshot | None = None
        self.keep_at: int | None = None
        self.kept: Snapshot | None = None
        self._nodes = _nodes_of(model)
        self._users: dict[int, list[Any]] = {}
        for node in self._nodes:
            for tensor in node.input_tensors:
                self._users.setdefault(id(tensor), []).append(node)
        self._kept = {id(tensor) for tensor in model.outputs}
        self.known: dict[int, Any] = {}
        self._now: Any = None

    def run(self, inputs: Any, operation_fn: Callable) -> Any:
        model = self.model
        before = self.known, self._now
        known = self.known = dict(zip(map(id, model.inputs), tree.flatten(inputs), strict=False))
        left = {key: len(users) for key, users in self._users.items()}
        first = 0
        if self.begin is not None:
            first = self.begin.place
            known = self.known = {key: ops.convert_to_tensor(value) for key, value in self.begin.known.items()}
            for node in self._nodes[:first]:
                for tensor in node.input_tensors:
                    left[id(tensor)] -= 1
        try:
            for place, node in enumerate(self._nodes[first:], first):
                if place == self.keep_at:
                    self.kept = self._snapshot(place)
                # As Keras does: what can't be computed isn't needed.
                if any(id(tensor) not in known for tensor in node.input_tensors):
                    continue
                self._now = node
                args, kwargs = node.arguments.fill_in(known)
                outputs = operation_fn(model._get_operation_for_node(node))(*args, **kwargs)
                del args, kwargs
                for tensor in node.input_tensors:
                    left[id(tensor)] -= 1
                    if not left[id(tensor)] and id(tensor) not in self._kept:
                        known.pop(id(tensor), None)
                known.update(zip(map(id, node.outputs), tree.flatten(outputs), strict=False))
                del outputs
            return tree.pack_sequence_as(model._outputs_struct, [known[id(tensor)] for tensor in model.outputs])
        finally:
            self.known, self._now = before

    def _snapshot(self, place: int) -> Snapshot | None:
        if any(mask_of(tensor) is not None for tensor in self.known.values()):
            return None
        return Snapshot(place, {key: ops.convert_to_numpy(tensor) for key, tensor in self.known.items()})

    def place_of(self, layer: Any) -> int | None:
        """The place of the first call of a layer, or of what holds it."""
        for place, node in enumerate(self._nodes):
            operation = node.operation
            if operation is layer or (
                isinstance(operation, layers.Layer) and any(inner is layer for inner in layers_of(operation))
            ):
                return place
        return None

    @cached_property
    def sizes(self) -> list[float]:
        """How many numbers are known before each call, of one example; infinity where shapes don't tell."""
        known, left = list(self.model.inputs), {key: len(users) for key, users in self._users.items()}
        found = []
        for node in self._nodes:
            shapes = [tensor.shape[1:] for tensor in known]
            found.append(sum(math.inf if None in shape else math.prod(shape) for shape in shapes))
            for tensor in node.input_tensors:
                left[id(tensor)] -= 1
            known = [t for t in [*known, *node.outputs] if left.get(id(t), 0) or id(t) in self._kept]
        return found

    def addition_after(self, layer: Any) -> tuple[list[Any], Any] | None:
        node = self._now
        if node is None or node.operation is not layer:
            return None
        scalings: list[Any] = []
        while True:
            tensor = node.outputs[0]
            users = self._users.get(id(tensor), [])
            if len(users) != 1 or id(tensor) in self._kept:
                return None
            node = users[0]
            if isinstance(node.operation, Scaling):
                scalings.append(node.operation)
            elif type(node.operation).__name__ == "Add" and len(node.input_tensors) == 2:
                other = next((t for t in node.input_tensors if t is not tensor), None)
                if other is None or other.shape != tensor.shape or id(other) not in self.known:
                    return None
                return scalings, self.known[id(other)]
            elif not isinstance(node.operation, (layers.Dropout, layers.Identity)):
                return None


def looked_up(model: keras.Model) -> list[tuple[int, Any]]:
    """The inputs that a functional model gives to an Embedding as they are: their places, and the Embedding."""
    found: list[tuple[int, Any]] = []

    def follow(graph: Any, places: dict[int, int]) -> None:
        nodes = [node for nodes in graph._nodes_by_depth.values() for node in nodes if node.operation]
        for node in nodes:
            layer = node.operation
            inner = graph_of(layer)
            # KerasHub's layers for tokens and positions hold one for the tokens.
            table = next((t for t in (layer, getattr(layer, "token_embedding", None)) if _is_table(t)), None)
            for given, tensor in enumerate(() if node.is_input else node.input_tensors):
                if id(tensor) not in places:
                    continue
                if table is not None:
                    found.append((places[id(tensor)], table))
                elif inner is not None and given < len(inner.inputs):
                    follow(inner, {id(inner.inputs[given]): places[id(tensor)]})

    graph = graph_of(model)
    if graph is not None:
        follow(graph, {id(tensor): place for place, tensor in enumerate(graph.inputs)})
    return found


def sigmoid_outputs(model: keras.Model) -> list[bool]:
    """Of each output of a functional model whether it comes out of a sigmoid; none where that isn't known."""
    graph = graph_of(model)
    return [] if graph is None else [_is_sigmoid(tensor) for tensor in graph.outputs]


def _is_sigmoid(tensor: Any) -> bool:
    layer, _, place = tensor._keras_history
    inner = graph_of(layer)
    if inner is not None:
        return _is_sigmoid(inner.outputs[place])
    return getattr(layer, "activation", None) is keras.activations.sigmoid


def _is_table(layer: Any) -> bool:
    return isinstance(layer, layers.Embedding)


def _nodes_of(graph: Any) -> list[Any]:
    by_depth = graph._nodes_by_depth
    return [
        node
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if node.operation and not node.is_input
    ]


def graph_of(layer: Any) -> Any:
    """The functional model that a layer is, or that a Sequential holds; None for any other."""
    graph = getattr(layer, "_functional", None) if isinstance(layer, keras.Sequential) else layer
    return graph if hasattr(graph, _RUN) else None


def _functional_models(model: keras.Model) -> Sequence[Any]:
    found = []
    for layer in layers_of(model):
        inner = graph_of(layer)
        if inner is not None:
            found.append(inner)
    return list({id(graph): graph for graph in found}.values())
