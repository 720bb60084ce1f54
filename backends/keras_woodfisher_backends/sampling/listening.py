"""What a layer multiplies by its weights during one pass: hooks on its calls, which leave no trace."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

Attributes = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """One use of a layer's weights.

    Attributes:
        role: Which of a rule's formulas tells the gradient.
        tensors: What the formula needs beside the gradient of `output`, each (n b, ...).
        output: The tensor whose gradient is asked for, (n b, ...).
    """

    role: Any
    tensors: tuple[Any, ...]
    output: Any


class Record:
    """What was seen of one layer during one pass.

    Args:
        watch: See `Differentiation`.

    Attributes:
        uses: In order.
        out_of_reach: Whether something was seen within a loop of the framework's, of which nothing gets out.
    """

    def __init__(self, watch: Callable[[Any], Any]):
        self._watch = watch
        self.uses: list[Use] = []
        self.out_of_reach = False

    def watch(self, tensor: Any) -> Any:
        """The same tensor, whose gradient will be asked for, to be used from here on."""
        watched = self._watch(tensor)
        self.out_of_reach |= watched is None
        return tensor if watched is None else watched

    def add(self, role: Any, tensors: tuple[Any, ...], output: Any) -> None:
        """Notes a use."""
        self.uses.append(Use(role, tensors, output))


Listen = Callable[[Any, Record], Attributes]
"""What is to stand in place of a layer's attributes, given the layer and where to tell what it did."""


@contextmanager
def replaced(layer: Any, attributes: Attributes) -> Iterator[None]:
    """Gives a layer other attributes meanwhile."""
    # Past Keras's __setattr__, which would track them. Users may have given a layer a `call` of its own, and on torch
    # an activation that is a layer isn't in the dictionary.
    own = vars(layer)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


@contextmanager
def listening(listeners: Sequence[tuple[Any, Listen, Record]]) -> Iterator[None]:
    """Hears of layers meanwhile; a later listener to a layer stands around an earlier one."""
    with ExitStack() as stack:
        for layer, listen, record in listeners:
            stack.enter_context(replaced(layer, listen(layer, record)))
        yield


def first_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the arguments of a call that gives the first one, by place or by name."""
    name = next(iter(inspect.signature(function).parameters), "")
    return lambda *args, **kwargs: args[0] if args else kwargs[name]


def listen_to_call(layer: Any, record: Record) -> Attributes:
    """Hears the input of each call, and the output before the activation."""
    original, activation = layer.call, getattr(layer, "activation", None)
    first = first_argument(original)
    waiting: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        waiting.append(first(*args, **kwargs))
        output = original(*args, **kwargs)
        if waiting:  # no activation was called
            output = record.watch(output)
            record.add("", (waiting.pop(),), output)
        return output

    def activate(z: Any) -> Any:
        assert activation is not None
        if waiting:
            z = record.watch(z)
            record.add("", (waiting.pop(),), z)
        return activation(z)

    return {"call": call} if activation is None else {"call": call, "activation": activate}


def listen_to_reversible(layer: Any, record: Record) -> Attributes:
    """Hears an embedding that is used both ways: "" looks tokens up, "reverse" gives the logits of tokens."""
    original = layer.call
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        output = record.watch(original(*args, **kwargs))
        x = next(iter(given.values()))
        if given.get("reverse", False):
            record.add("reverse", (x, output), output)
        else:
            record.add("", (x,), output)
        return output

    return {"call": call}
