"""Which variables are pruned, and under which names a user may call them."""

import difflib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.engines import assign_whole, whole_value
from keras_woodfisher_backends.keras_internals.models import layers_of, own_state, own_weights, sublayers_of

from keras_woodfisher.model.axes import is_prunable, weight_order
from keras_woodfisher.model.constraints import own_constraint
from keras_woodfisher.model.quantized import holds_weights, mode_of
from keras_woodfisher.options.patterns import PATTERN, matches_pattern
from keras_woodfisher.options.sparsity_levels import Levels

FROZEN = "Frozen variables"
"""How the warning of them begins."""

ALL = "__ALL__"
ALL_PRUNABLE = "__ALL_PRUNABLE__"
KEYWORDS = (ALL, ALL_PRUNABLE)
"""What stands for many variables, alone or in a list, in either case."""


@dataclass(frozen=True, eq=False)  # comparing variables would compare their values
class Target:
    """One variable, with the layer that owns it.

    Attributes:
        variable: The `keras.Variable`.
        layer: The layer that owns it (for a shared variable, the first one whose kernel it is).
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
        values = whole_value(self.variable)
        dtype = np.float64 if values.dtype == np.float64 else np.float32
        return self.flatten(values).astype(dtype)

    @property
    def constraint(self) -> Any:
        """The variable's own constraint, whatever masks are around it, or None."""
        return own_constraint(self.variable)

    def constrained(self, values: Any, pruned: np.ndarray) -> np.ndarray:
        """Values under the variable's own constraint, which corrections may have broken; zeros stay.

        Args:
            values: In the variable's shape.
            pruned: What is pruned, bool, in the same shape.
        """
        held = keras.ops.convert_to_numpy(self.constraint(values))
        return np.where(pruned, np.zeros((), held.dtype), held)

    def write(self, flat: np.ndarray) -> None:
        """Assigns weights that are in weight order."""
        assign_whole(self.variable, self.unflatten(flat))


def tensors_of(targets: Sequence[Target], weights: np.ndarray) -> list[Any]:
    """Tensors for variables, of all their weights (N,) in weight order."""
    parts = np.split(weights, np.cumsum([target.size for target in targets])[:-1])
    pairs = zip(targets, parts, strict=True)
    return [keras.ops.convert_to_tensor(t.unflatten(part), dtype=t.variable.dtype) for t, part in pairs]


def find_targets(
    model: keras.Model,
    params: str | Sequence[str],
    exclude: Sequence[str] = (),
    argument: str = "params",
    frozen_too: bool = False,
) -> list[Target]:
    """The variables to prune, in the order of the model's layers; a shared variable once.

    Args:
        model: A built Keras model.
        params: `"__ALL_PRUNABLE__"` (kernels of Dense, EinsumDense, convolutions and recurrent layers),
            `"__ALL__"` (every variable with two axes or more that isn't a bias), or a list of these, of names
            and of `re:` patterns, which are matched from the start of a name.
        exclude: Names and patterns to leave out.
        argument: What messages call `params`.
        frozen_too: Whether those that aren't trained now are among them. Else they are left out, with a warning.

    Raises:
        ValueError: If the model isn't built, nothing is left to prune, or a layer is quantised or has LoRA.
        KeyError: If a name or pattern matches nothing (the nearest names are listed).
    """
    everything = all_targets(model)
    left_out = {id(t) for t in _matching(everything, exclude, "exclude")}
    chosen = [t for t in named_targets(everything, params, argument) if id(t) not in left_out]
    # First of all, since quantising a layer and LoRA freeze its kernel.
    for target in chosen:
        _refuse_unsuitable(target)
    frozen = [] if frozen_too else [t.name for t in chosen if not t.variable.trainable]
    if frozen:
        warnings.warn(
            f"{FROZEN} are left as they are: {_listed(frozen)}. Set `trainable = True` on their layers to prune them.",
            stacklevel=2,
        )
    chosen = [t for t in chosen if frozen_too or t.variable.trainable]
    if not chosen:
        raise ValueError(
            f"Nothing to prune: params={params!r} with exclude={list(exclude)!r} leaves no trainable "
            f"variable of this model. Its prunable variables are: {_prunable_names(everything)}"
        )
    return chosen


def named_targets(everything: list[Target], params: str | Sequence[str], argument: str = "params") -> list[Target]:
    """Those that `params` stands for, frozen ones included.

    Raises:
        KeyError: If a name or pattern matches nothing.
    """
    return _matching(everything, [params] if isinstance(params, str) else params, argument)


def holds_keyword(params: str | Sequence[str], keyword: str) -> bool:
    """Whether one of `KEYWORDS` stands in `params`, alone or in a list."""
    return keyword in [item.upper() for item in ([params] if isinstance(params, str) else params)]


def check_model(model: Any) -> None:
    """Refuses what isn't a Keras model (a TypeError)."""
    if not isinstance(model, keras.Model):
        is_path = isinstance(model, (str, PathLike))
        mend = "Load it first: keras.models.load_model(...)." if is_path else "It comes first, before data."
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}. {mend}")


def all_targets(model: keras.Model) -> list[Target]:
    """Every weight of the model that has one axis or more, frozen or quantised ones too, each variable once.

    Raises:
        TypeError: If it is no Keras model.
        ValueError: If it isn't built.
    """
    check_model(model)
    if model.built and not model.variables:
        raise ValueError(f"The model {model.name!r} has no weights. Call it on a batch of data first if it makes any.")
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} isn't built, so it has no weights yet. Call it on a batch of data first."
        )
    containers = {layer.name for layer in layers_of(model) if isinstance(layer, keras.Model)}
    owners: dict[int, tuple[Any, list[Any]]] = {}
    for layer, variable in _owned(model):
        if len(variable.shape) > 0:
            owners.setdefault(id(variable), (variable, []))[1].append(layer)
    return [_target(variable, layers, containers) for variable, layers in owners.values()]


def _target(variable: Any, layers: list[Any], containers: set[str]) -> Target:
    # A layer or model may hold another layer's kernel: the layer whose kind is known says what it is.
    layer = next((layer for layer in layers if is_prunable(layer, variable.name)), layers[0])
    aliases = _aliases(variable, layers, containers)
    return Target(variable, layer, aliases, weight_order(layer, variable.name, len(variable.shape)))


def _owned(model: keras.Model) -> Iterator[tuple[Any, Any]]:
    for layer in _walk(model, set()):
        yield from ((layer, variable) for variable in own_weights(layer))
        if mode_of(layer) is not None:
            # Quantising makes the kernel a variable that is never trained: listed, so that it can be refused.
            yield from ((layer, variable) for variable in own_state(layer) if holds_weights(layer, variable))


def _walk(layer: Any, seen: set[int]) -> Iterator[Any]:
    """A layer and all layers within it in the model's order (Keras's own walk turns nested layers around)."""
    if id(layer) not in seen:
        seen.add(id(layer))
        yield layer
        for child in sublayers_of(layer):
            yield from _walk(child, seen)


def _aliases(variable: Any, layers: list[Any], containers: set[str]) -> tuple[str, ...]:
    paths = [variable.path]
    parts = variable.path.split("/")
    while len(parts) > 2 and parts[0] in containers:
        parts = parts[1:]
        paths.append("/".join(parts))
    paths += [f"{layer.name}/{variable.name}" for layer in layers]
    names = [*paths, *(path.replace("/", ".") for path in paths)]
    torch_style = [
        f"{path.removesuffix('kernel')}weight".replace("/", ".") for path in paths if path.endswith("/kernel")
    ]
    return tuple(dict.fromkeys([*names, *torch_style]))


def _matching(targets: list[Target], wanted: Sequence[str], argument: str) -> list[Target]:
    chosen: set[int] = set()
    for item in wanted:
        hits = [t for t in targets if matches(t, item)]
        if not hits and item.upper() not in KEYWORDS:
            raise KeyError(_no_match(targets, item, argument))
        chosen |= {id(t) for t in hits}
    return [t for t in targets if id(t) in chosen]


def matches(target: Target, item: str) -> bool:
    """Whether a name, a `re:` pattern, `"__ALL_PRUNABLE__"` or `"__ALL__"` means a variable.

    Raises:
        ValueError: If the pattern takes too long.
    """
    if item.upper() == ALL_PRUNABLE:
        return is_prunable(target.layer, target.variable.name)
    if item.upper() == ALL:
        return len(target.variable.shape) >= 2 and "bias" not in target.variable.name
    if item.startswith(PATTERN):
        return any(matches_pattern(item, alias) for alias in target.aliases)
    return item in target.aliases


def _no_match(targets: list[Target], item: str, argument: str) -> str:
    if item.startswith(PATTERN):
        return (
            f"The pattern {item!r} in {argument} matches no variable from the start of its name. "
            f"Prunable variables: {_prunable_names(targets)}"
        )
    matrices = [t for t in targets if matches(t, ALL)]
    if inside := [t.name for t in matrices if f"/{item.strip('/')}/" in f"/{t.name}"]:
        return f"{argument} names {item!r}, which is a layer. Name the variables in it: {_listed(inside)}."
    known = [*(alias for t in matrices for alias in t.aliases), *KEYWORDS]
    near = difflib.get_close_matches(item, known, n=3)
    nearest = f"{', '.join(near)}." if near else _prunable_names(targets)
    return f"{argument} names {item!r}, which no variable has. The nearest: {nearest}"


def _prunable_names(targets: list[Target]) -> str:
    """A list that ends with a point, and with a hint where nothing is in it."""
    if names := [t.name for t in targets if matches(t, ALL_PRUNABLE)]:
        return f"{_listed(names)}."
    others = [t.name for t in targets if matches(t, ALL)]
    hint = f" params={ALL!r} takes the weights of layers of every kind: {_listed(others)}." if others else ""
    return f"none.{hint}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "") or "none"


def _refuse_unsuitable(target: Target) -> None:
    layer = target.layer
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"{target.name!r} belongs to a layer with LoRA: its kernel is a sum, so zeros in one part "
            "wouldn't be zeros of the layer. Merge the LoRA weights first, or put the layer in `exclude`."
        )
    if mode_of(layer) is not None:
        raise ValueError(
            f"{target.name!r} belongs to a quantised layer ({mode_of(layer)}), whose weights can't "
            "be corrected. Prune the model before quantising it, or put the layer in `exclude`."
        )


def finals_of(targets: Sequence[Target], levels: Levels) -> list[float]:
    """The final sparsity of each variable: the first level with a name that matches it.

    Raises:
        ValueError: If levels before it take all that a level names.
    """
    meant = [[any(matches(target, name) for name in listed) for _, listed in levels] for target in targets]
    taken = [which.index(True) for which in meant]
    for place, (level, _) in enumerate(levels):
        named = [number for number, which in enumerate(meant) if which[place]]
        if named and place not in taken:
            first = named[0]
            raise ValueError(
                f"The sparsity {level:g} has no effect: {targets[first].name!r} belongs to "
                f"{levels[taken[first]][0]:g}, which stands before it in the dictionary. "
                f"Put {level:g} and its names first."
            )
    return [levels[place][0] for place in taken]
