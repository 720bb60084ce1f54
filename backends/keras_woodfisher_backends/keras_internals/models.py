"""Private parts of models, layers and losses."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops, tree
from keras.src.backend.common import masking

_HALF = ("float16", "bfloat16")


def layers_of(model: Any) -> list[Any]:
    """A model and all layers within it, each once, in Keras's order."""
    return list(model._flatten_layers())


def sublayers_of(layer: Any) -> list[Any]:
    """The layers that a layer holds itself, in its own order."""
    return list(layer._layers)


def own_weights(layer: Any) -> list[Any]:
    """The variables that a layer itself made to be trained, frozen now or not."""
    return list(layer._trainable_variables)


def own_state(layer: Any) -> list[Any]:
    """The variables that a layer itself made and never trains."""
    return list(layer._non_trainable_variables)


def infer(model: Any, x: Any) -> Any:
    """Calls a model as Keras's own test step does: `training=False` where it takes that.

    Recurrent layers that remember (`stateful=True`) begin at zero, and what they remember stays as it is: the examples
    needn't come in their order, nor in batches of the size of training. Layers of a `RematScope` compute once, where
    their values can be seen.
    """
    with _as_if(layers_of(model), {"stateful": False, "_remat_mode": None}):
        return model(x, training=False) if model._call_has_training_arg else model(x)


@contextmanager
def _as_if(layers: list[Any], changes: Mapping[str, Any]) -> Iterator[None]:
    """Layers with other values of those attributes that they have and that are set."""
    before = [(layer, name) for layer in layers for name in changes if vars(layer).get(name)]
    found = [vars(layer)[name] for layer, name in before]
    try:
        for layer, name in before:
            # Past Keras's __setattr__, which would track them.
            vars(layer)[name] = changes[name]
        yield
    finally:
        for (layer, name), value in zip(before, found, strict=True):
            vars(layer)[name] = value


def compiled_losses(model: Any) -> list[Any] | None:
    """The losses that a compiled model was given, each as it was given; None without one."""
    compiled = model._compile_loss
    return None if compiled is None else [loss for loss in tree.flatten(compiled._user_loss) if loss is not None]


def output_losses(model: Any) -> list[tuple[tuple[Any, ...], Any, str]]:
    """Each loss of a compiled model with the path to its output and its name; none before the first was computed."""
    compiled = model._compile_loss
    built = compiled._flat_losses if compiled is not None else None
    return [(tuple(loss.path), loss.loss, loss.name) for loss in built or ()]


def compiled_loss_weights(model: Any) -> list[float]:
    """The weights of the losses that a model is compiled with, as far as there are any."""
    weights = tree.flatten(model._compile_loss._user_loss_weights)
    return [float(weight) for weight in weights if weight is not None]


def trained_outputs(model: Any) -> list[Any] | None:
    """The symbolic outputs of a functional model that have a loss with a weight; None where that isn't known."""
    compiled = model._compile_loss
    graph = getattr(model, "_functional", None) or model
    outputs = getattr(graph, "_outputs_struct", None)
    if compiled is None or outputs is None:
        return None
    losses, weights, flat = compiled._user_loss, compiled._user_loss_weights, tree.flatten(outputs)
    if isinstance(losses, dict):
        named = outputs if isinstance(outputs, dict) else dict(zip(model.output_names, flat, strict=True))
        places = [(named.get(name), loss, (weights or {}).get(name)) for name, loss in losses.items()]
    elif isinstance(losses, (list, tuple)) and len(losses) == len(flat):
        places = list(zip(flat, losses, weights or [None] * len(flat), strict=True))
    else:
        # One loss is for every output.
        return None if tree.is_nested(losses) else flat
    found = [output for output, loss, weight in places if loss is not None and (weight is None or weight)]
    # Keras has its own words for a loss of an output that isn't there.
    return None if any(output is None for output in found) else found


def loss_outline(model: Any) -> Any:
    """All that a compiled model's loss is made of: losses, weights and names."""
    compiled = model._compile_loss
    return compiled and [compiled._user_loss, compiled._user_loss_weights, compiled.output_names]


def build_losses(model: Any, y: Any, prediction: Any) -> bool:
    """Builds the losses of a compiled model, which may make variables; whether there are any that can be built."""
    compiled = model._compile_loss
    if compiled is not None and not compiled.built and y is not None:
        compiled.build(y, prediction)
    return compiled is None or compiled.built


def compute_loss(model: Any, x: Any, y: Any, prediction: Any, weight: Any) -> Any:
    """The loss of a model in inference, its own `compute_loss` included, whatever arguments that takes."""
    return model._compute_loss(x=x, y=y, y_pred=prediction, sample_weight=weight, training=False)


def loss_settings(loss: Any) -> dict[str, Any]:
    """The arguments that a loss object passes on to its loss function; none for a function."""
    return dict(getattr(loss, "_fn_kwargs", {}))


def mask_of(tensor: Any) -> Any:
    """The mask that a layer hung on its output, or None."""
    return masking.get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Hangs a mask on a tensor, for losses to see."""
    masking.set_keras_mask(tensor, mask)


def renormalises(layer: Any) -> bool:
    """Whether a BatchNorm layer does batch renormalisation, which Keras has from 3.14 on."""
    return bool(getattr(layer, "renorm", False))


@contextmanager
def float32_computation(model: Any) -> Iterator[None]:
    """Has layers of half precision compute in float32 meanwhile."""
    # A quantised layer computes as it was quantised: its policy says how.
    layers = [layer for layer in layers_of(model) if layer.compute_dtype in _HALF and layer.quantization_mode is None]
    policies = [layer._dtype_policy for layer in layers]
    try:
        for layer in layers:
            vars(layer)["_dtype_policy"] = _float32_with(layer.variable_dtype)
        yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            vars(layer)["_dtype_policy"] = policy


def _float32_with(variable_dtype: str) -> keras.DTypePolicy:
    """Computes in float32; a layer casts its variables only where the policy says that they have another type."""
    policy = keras.DTypePolicy("float32")
    policy._variable_dtype = variable_dtype
    return policy


@contextmanager
def without_added_losses(*models: Any) -> Iterator[None]:
    """Has regularisers and `add_loss` add nothing to the losses of models meanwhile."""
    overrides = [model._losses_override for model in models]
    try:
        for model in models:
            vars(model)["_losses_override"] = [ops.zeros(())]
        yield
    finally:
        for model, override in zip(models, overrides, strict=True):
            vars(model)["_losses_override"] = override
