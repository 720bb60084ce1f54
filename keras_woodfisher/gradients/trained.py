"""Which of the chosen weights the compiled optimizer trains: others have no gradient that could be buffered."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import keras
from keras_woodfisher_backends.keras_internals.models import layers_of, trained_outputs
from keras_woodfisher_backends.keras_internals.optimizers import trained_variables

from keras_woodfisher.model.optimizer_variables import inner_optimizer, parts_of
from keras_woodfisher.model.targets import Target

_MEND = (
    "They would be ranked against weights that have gradients. Put them in `exclude`, name in `params` what the "
    "compiled optimizer trains, or, if the model's compiled loss depends on them, give data= to sample from."
)


def check_trained(model: keras.Model, targets: Sequence[Target], by_name: bool) -> None:
    """Refuses weights to which the gradients of training can't come, as far as the model tells before training.

    Args:
        model: A built model; with a loss that is built, too, more can be told.
        targets: The variables to prune.
        by_name: Whether they were chosen by name: then they are trusted to be what the compiled optimizer trains, where
            a train step with several optimizers hides it.

    Raises:
        ValueError: If the compiled loss doesn't depend on some of them, or another optimizer trains them.
    """
    if trains_as_keras_does(model):
        reached = _reached(model)
        if reached is not None:
            refuse_untrained([target for target in targets if id(target.variable) not in reached])
        return
    refuse_untrained(of_other_optimizers(model, targets))
    others = _other_optimizers(model)
    if others and not by_name:
        raise ValueError(
            f"The model's own train_step has other optimizers ({', '.join(others)}) than the compiled one, and only "
            f"gradients that go to that one can be buffered. Chosen are {_listed(targets)}. Name in `params` those "
            "that it trains, put the others in `exclude`, or, where the model has a compiled loss, give data=."
        )


def of_other_optimizers(model: keras.Model, targets: Sequence[Target]) -> list[Target]:
    """The variables that another optimizer of the model trains than the compiled one, as far as they are built."""
    built = [other for other in _other_optimizers(model).values() if other.built]
    theirs = {id(variable) for other in built for variable in trained_variables(other)}
    return [target for target in targets if id(target.variable) in theirs]


def refuse_untrained(targets: Sequence[Target]) -> None:
    """Says that these have no gradient.

    Raises:
        ValueError: If there is one.
    """
    if targets:
        raise ValueError(f"The compiled optimizer gets no gradient of {_listed(targets)} from the loss. {_MEND}")


def trains_as_keras_does(model: keras.Model) -> bool:
    """Whether the train step, and the loss in it, are Keras's own."""
    kind = type(model)
    return kind.train_step is keras.Model.train_step and kind.compute_loss is keras.Model.compute_loss


def _reached(model: keras.Model) -> Collection[int] | None:
    """The variables on which the outputs with a loss depend, by id; None for all, or where the model doesn't tell."""
    outputs = trained_outputs(model)
    if not outputs or len(outputs) == len(model.outputs):
        return None
    part = keras.Model(model.inputs, outputs, name="outputs_with_a_loss")
    reached = {id(variable) for variable in part.variables}
    beside = [layer for layer in layers_of(model) if any(id(v) not in reached for v in layer.variables)]
    return None if any(_may_add_loss(layer) for layer in beside if layer is not model) else reached


def _may_add_loss(layer: Any) -> bool:
    own_code = not type(layer).__module__.startswith("keras.")
    return own_code or getattr(layer, "activity_regularizer", None) is not None


def _other_optimizers(model: keras.Model) -> dict[str, Any]:
    """The optimizers that a model holds beside the compiled one, by the names of its attributes."""
    # A dry run may be of a model that isn't compiled yet.
    optimizer = getattr(model, "optimizer", None)
    inner = inner_optimizer(optimizer)
    compiled = [optimizer, inner, *parts_of(inner)]
    found: dict[str, Any] = {}
    for name, value in vars(model).items():
        values: Iterable[Any] = value.values() if isinstance(value, dict) else value if _is_list(value) else [value]
        others = [v for v in values if isinstance(v, keras.Optimizer) and not any(v is known for known in compiled)]
        found |= {name if len(others) == 1 else f"{name}[{i}]": other for i, other in enumerate(others)}
    # Keras keeps them in lists of its own, too.
    return {name: value for name, value in found.items() if not name.startswith("_")}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _listed(targets: Sequence[Target]) -> str:
    names = [target.name for target in targets]
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
