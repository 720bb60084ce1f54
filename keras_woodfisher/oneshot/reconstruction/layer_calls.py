"""Calls of single layers: hooks that leave no trace, and the layer's output before bias and activation."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops

_SMALLEST_FACTOR = 1e-3
"""Channels whose factor is smaller than this part of the largest one make up for nothing."""


@contextmanager
def hooked(layers: Iterable[Any], call: Callable[[Any, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """Has `call(layer, own, args, kwargs)` answer for the layers' own calls, which it gets as `own`.

    The input comes first among `args`, even if the model gives it by its name.
    """
    # Past Keras's __setattr__, which would track them. Users may have given a layer a `call` of its own.
    before = [(layer, vars(layer).get("call"), layer.call) for layer in layers]
    try:
        for layer, _, own in before:
            vars(layer)["call"] = _hook(layer, own, call)
        yield
    finally:
        for layer, given, _ in before:
            vars(layer).pop("call", None)
            if given is not None:
                vars(layer)["call"] = given


def _hook(layer: Any, own: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    first = next(iter(inspect.signature(own).parameters.values()), None)
    name = first.name if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else ""

    def called(*args: Any, **kwargs: Any) -> Any:
        if not args and name in kwargs:
            args = (kwargs.pop(name),)
        return call(layer, own, args, kwargs)

    return called


@contextmanager
def listening(layer: Any) -> Iterator[list[Any]]:
    """Gathers what a layer's activation gets; nothing where it has none."""
    activation: Any = getattr(layer, "activation", None)
    heard: list[Any] = []

    def listen(z: Any) -> Any:
        heard.append(z)
        return activation(z)

    if activation is None or getattr(layer, "cell", None) is not None:
        yield heard
        return
    # On torch, an activation that is a layer isn't in the dictionary.
    given = vars(layer).get("activation")
    vars(layer)["activation"] = listen
    try:
        yield heard
    finally:
        vars(layer).pop("activation", None)
        if given is not None:
            vars(layer)["activation"] = given


@contextmanager
def replaced(layer: Any, kernels: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Gives a layer (or the cell of a recurrent one) other kernels meanwhile."""
    owner = getattr(layer, "cell", layer)
    variables = [(getattr(owner, name), kernel) for name, kernel in kernels.items()]
    # Not `convert_to_tensor`, which gives TensorFlow's variable itself.
    before = [ops.stop_gradient(variable) for variable, _ in variables]
    try:
        for variable, kernel in variables:
            variable.assign(kernel)
        yield
    finally:
        for (variable, _), value in zip(variables, before, strict=True):
            variable.assign(value)


def channel_axis(layer: Any, output: Any) -> int:
    """The axis of a layer's output that its bias goes along."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else len(output.shape) - 1


def after_bias(layer: Any, output: Any) -> Any:
    """A layer's output without its bias."""
    bias = getattr(layer, "bias", None)
    if bias is None or getattr(layer, "cell", None) is not None:
        return output
    if channel_axis(layer, output) == 1:
        bias = ops.reshape(bias, (-1, *(1 for _ in output.shape[2:])))
    return output - ops.cast(bias, output.dtype)


def is_linear(layer: Any) -> bool:
    """Whether nothing but a bias is done to a layer's product."""
    return getattr(layer, "activation", None) in (None, keras.activations.linear)


def inverse_factors(scaling: Any) -> np.ndarray:
    """One over what a BatchNorm layer multiplies each channel by; zero for channels of which it leaves nothing."""
    factors = 1.0 / np.sqrt(ops.convert_to_numpy(scaling.moving_variance) + scaling.epsilon)
    if scaling.scale:
        factors = factors * ops.convert_to_numpy(scaling.gamma)
    usable = np.abs(factors) > _SMALLEST_FACTOR * np.abs(factors).max()
    return np.where(usable, 1.0 / np.where(usable, factors, 1.0), 0.0).astype(np.float32)


def steps_of(layer: Any, x: Any) -> Any:
    """The input of a recurrent layer in the order in which it reads it."""
    return ops.flip(x, axis=1) if x is not None and getattr(layer, "go_backwards", False) else x


def states_of(
    layer: Any,
    own: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    kernels: Mapping[str, np.ndarray],
) -> Any:
    """What a recurrent layer remembers before each step of its input, (N, T, units), if it has other kernels.

    Args:
        layer: The layer.
        own: Its own call.
        args: Arguments of that.
        kwargs: The same.
        kernels: Of its cell.
    """
    settings = {"return_sequences": True, "return_state": False, "zero_output_for_mask": False}
    before = {name: vars(layer)[name] for name in settings if name in vars(layer)}
    try:
        vars(layer).update({name: value for name, value in settings.items() if name in before})
        with replaced(layer, kernels):
            states = own(*args, **kwargs)
    finally:
        vars(layer).update(before)
    initial = kwargs.get("initial_state", args[1] if len(args) > 1 else None)
    if isinstance(initial, (list, tuple)):
        initial = initial[0] if len(initial) else None
    first = ops.zeros_like(states[:, :1]) if initial is None else ops.expand_dims(initial, 1)
    return ops.concatenate([first, states[:, :-1]], axis=1)
