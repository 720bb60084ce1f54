"""Which variables are pruned, and under which names a user may call them."""

import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from keras_woodfisher.weight_order import is_prunable, weight_order

ALL = "__ALL__"
ALL_PRUNABLE = "__ALL_PRUNABLE__"
_PATTERN = "re:"


@dataclass(frozen=True)
class Target:
    """One variable, with the layer that owns it.

    Attributes:
        variable: The `keras.Variable`.
        layer: The layer that owns it (the first one, for a shared variable).
        aliases: Every name that `params` and `exclude` may use for it; the first is its path.
        order: The permutation of its axes that gives the weight order.
    """

    variable: Any
    layer: Any
    aliases: tuple[str, ...]
    order: tuple[int, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return self.aliases[0]

    @property
    def size(self) -> int:
        return int(np.prod(self.variable.shape))

    def flatten(self, array: np.ndarray) -> np.ndarray:
        """An array of the variable's shape, (n, *shape) too, with its weights in weight order."""
        lead = array.ndim - len(self.order)
        axes = (*range(lead), *(lead + axis for axis in self.order))
        return array.transpose(axes).reshape(*array.shape[:lead], -1)

    def unflatten(self, flat: np.ndarray) -> np.ndarray:
        """The inverse of `flatten` for one array (size,)."""
        shape = [self.variable.shape[axis] for axis in self.order]
        return flat.reshape(shape).transpose(np.argsort(self.order))

    def read(self) -> np.ndarray:
        """The weights in weight order, (size,) float32 (float64 for a float64 variable)."""
        values = keras.ops.convert_to_numpy(self.variable)
        dtype = np.float64 if values.dtype == np.float64 else np.float32
        return self.flatten(values).astype(dtype)

    def write(self, flat: np.ndarray) -> None:
        """Assigns weights that are in weight order."""
        self.variable.assign(self.unflatten(flat))


def find_targets(model: keras.Model, params: str | Sequence[str], exclude: Sequence[str] = ()) -> list[Target]:
    """The variables to prune, in the order of the model's layers; a shared variable once.

    Args:
        model: A built Keras model.
        params: `"__ALL_PRUNABLE__"` (kernels of Dense, EinsumDense, convolutions and recurrent layers),
            `"__ALL__"` (every variable with two axes or more that isn't a bias), or a list of names and
            `re:` patterns, which are matched from the start of a name.
        exclude: Names and patterns to leave out.

    Raises:
        ValueError: If the model isn't built, nothing is left to prune, or a layer is quantised or has LoRA.
        KeyError: If a name or pattern matches nothing (the nearest names are listed).
    """
    everything = all_targets(model)
    if isinstance(params, str) and params.upper() == ALL_PRUNABLE:
        chosen = [t for t in everything if is_prunable(t.layer, t.variable.name)]
    elif isinstance(params, str) and params.upper() == ALL:
        chosen = [t for t in everything if len(t.variable.shape) >= 2 and "bias" not in t.variable.name]
    else:
        names = [params] if isinstance(params, str) else params
        chosen = _matching(everything, names, "params")
    left_out = {id(t) for t in _matching(everything, exclude, "exclude")}
    chosen = [t for t in chosen if id(t) not in left_out]
    frozen = [t.name for t in chosen if not t.variable.trainable]
    if frozen:
        warnings.warn(
            f"Frozen variables are left as they are: {', '.join(frozen)}. "
            "Set `trainable = True` on their layers to prune them.",
            stacklevel=2,
        )
    chosen = [t for t in chosen if t.variable.trainable]
    if not chosen:
        raise ValueError(
            f"Nothing to prune: params={params!r} with exclude={list(exclude)!r} leaves no trainable "
            f"variable of this model. Its prunable variables are: {_prunable_names(everything)}."
        )
    for target in chosen:
        _refuse_unsuitable(target)
    return chosen


def all_targets(model: keras.Model) -> list[Target]:
    """Every weight of the model that has one axis or more, trainable or not, each variable once.

    Raises:
        ValueError: If the model isn't built.
    """
    if not model.built or not model.variables:
        raise ValueError(
            f"The model {model.name!r} isn't built, so it has no weights yet. "
            "Call it on a batch of data, or `model.build(input_shape)`, first."
        )
    containers = {layer.name for layer in model._flatten_layers() if isinstance(layer, keras.Model)}
    found: dict[int, Target] = {}
    for layer, variable in _owned(model):
        if id(variable) not in found and len(variable.shape) > 0:
            found[id(variable)] = Target(
                variable,
                layer,
                _aliases(variable, layer, containers),
                weight_order(layer, variable.name, len(variable.shape)),
            )
    return list(found.values())


def prunable_targets(model: keras.Model) -> list[Target]:
    """The variables that `__ALL_PRUNABLE__` stands for, frozen ones included."""
    return [t for t in all_targets(model) if is_prunable(t.layer, t.variable.name)]


def _owned(model: keras.Model) -> Iterator[tuple[Any, Any]]:
    for layer in model._flatten_layers():
        for variable in layer._trainable_variables:
            yield layer, variable


def _aliases(variable: Any, layer: Any, containers: set[str]) -> tuple[str, ...]:
    paths = [variable.path]
    parts = variable.path.split("/")
    while len(parts) > 2 and parts[0] in containers:
        parts = parts[1:]
        paths.append("/".join(parts))
    paths.append(f"{layer.name}/{variable.name}")
    names = [*paths, *(path.replace("/", ".") for path in paths)]
    torch_style = [
        f"{path.removesuffix('kernel')}weight".replace("/", ".") for path in paths if path.endswith("/kernel")
    ]
    return tuple(dict.fromkeys([*names, *torch_style]))


def _matching(targets: list[Target], wanted: Sequence[str], argument: str) -> list[Target]:
    chosen: set[int] = set()
    for item in wanted:
        hits = [t for t in targets if _matches(t, item)]
        if not hits:
            raise KeyError(_no_match(targets, item, argument))
        chosen |= {id(t) for t in hits}
    return [t for t in targets if id(t) in chosen]


def _matches(target: Target, item: str) -> bool:
    if item.startswith(_PATTERN):
        return any(re.match(item[len(_PATTERN) :], alias) for alias in target.aliases)
    return item in target.aliases


def _no_match(targets: list[Target], item: str, argument: str) -> str:
    if item.startswith(_PATTERN):
        return (
            f"The pattern {item!r} in {argument} matches no variable from the start of its name. "
            f"Prunable variables: {_prunable_names(targets)}."
        )
    known = [alias for t in targets for alias in t.aliases]
    near = difflib.get_close_matches(item, known, n=3) or [_prunable_names(targets)]
    return f"{argument} names {item!r}, which no variable has. The nearest: {', '.join(near)}."


def _prunable_names(targets: list[Target]) -> str:
    names = [t.name for t in targets if is_prunable(t.layer, t.variable.name)]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "none"


def _refuse_unsuitable(target: Target) -> None:
    layer = target.layer
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"{target.name!r} belongs to a layer with LoRA: its kernel is a sum, so zeros in one part "
            "wouldn't be zeros of the layer. Merge the LoRA weights first, or put the layer in `exclude`."
        )
    if getattr(layer, "quantization_mode", None) is not None:
        raise ValueError(
            f"{target.name!r} belongs to a quantised layer ({layer.quantization_mode}), whose weights can't "
            "be corrected. Prune the model before quantising it, or put the layer in `exclude`."
        )
