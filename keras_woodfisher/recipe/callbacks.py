"""From modifiers to the callbacks that carry them out."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_woodfisher.callbacks.keep_zeros import KeepZeros
from keras_woodfisher.callbacks.woodfisher_pruning import WoodFisherPruning
from keras_woodfisher.options.option import INVERSE, RAMP, UPDATE
from keras_woodfisher.options.table import in_group
from keras_woodfisher.recipe.modifiers.pruning import (
    ConstantPruningModifier,
    MagnitudePruningModifier,
    Modifier,
    PruningModifier,
    WoodFisherPruningModifier,
)
from keras_woodfisher.recipe.modifiers.reconstruction import ReconstructionModifier
from keras_woodfisher.recipe.modifiers.training import TrainingModifier
from keras_woodfisher.recipe.one_shot_callback import OneShotPruning


def callbacks_of(
    modifiers: Sequence[Modifier],
    data: Any,
    verbose: int,
    total_epochs: int | None = None,
    log_variables: bool = False,
) -> list[keras.callbacks.Callback]:
    """The callbacks that carry modifiers out, those that prune first, in the order in which they begin."""
    ordered = sorted(modifiers, key=lambda m: (isinstance(m, TrainingModifier), m.first_epoch))
    built = (callback_of(modifier, data, verbose, total_epochs, log_variables) for modifier in ordered)
    return [callback for callback in built if callback is not None]


def callback_of(
    modifier: Modifier, data: Any, verbose: int, total_epochs: int | None = None, log_variables: bool = False
) -> Any:
    """The callback that carries one modifier out, or None where it is only information; a ValueError without data."""
    if isinstance(modifier, TrainingModifier):
        return modifier.callback()
    if isinstance(modifier, ConstantPruningModifier):
        window = (modifier.start_epoch, modifier.end_epoch)
        return KeepZeros(modifier.params, modifier.exclude, *window, total_epochs, log_variables)
    if isinstance(modifier, ReconstructionModifier):
        if data is None:
            raise ValueError(f"{modifier.tag} needs examples to reconstruct layers by: pass data=x.")
        return OneShotPruning(data, verbose, modifier.arguments())
    assert isinstance(modifier, PruningModifier)
    return WoodFisherPruning(
        **{row.name: getattr(modifier, row.name) for row in in_group(RAMP)} | pruning_arguments(modifier),
        verbose=verbose,
        total_epochs=total_epochs,
        log_variables=log_variables,
        **_source_of(modifier, data),
    )


def pruning_arguments(modifier: PruningModifier) -> dict[str, Any]:
    """The arguments of its updates, in one shot as well as on a schedule."""
    arguments: dict[str, Any] = {
        "params": None if modifier.levels else modifier.params,
        "exclude": modifier.exclude,
        "global_sparsity": modifier.global_sparsity,
        "mask_type": modifier.mask_type,
    }
    if isinstance(modifier, MagnitudePruningModifier):
        return arguments | {"method": "magnitude"}
    assert isinstance(modifier, WoodFisherPruningModifier)
    passed_on = {row.name: getattr(modifier, row.name) for row in (*in_group(INVERSE), *in_group(UPDATE))}
    # How many examples make a sample depends on where they come from.
    del passed_on["grad_batch_size"]
    return arguments | passed_on


def buffers(modifier: Modifier, data: Any) -> bool:
    """Whether a modifier takes its gradients from the training run itself."""
    if not isinstance(modifier, WoodFisherPruningModifier):
        return False
    return bool(modifier.use_gradient_buffering) or (modifier.use_gradient_buffering is None and data is None)


def samples(modifier: Modifier, data: Any) -> bool:
    """Whether a modifier takes its gradients from labelled `data` while training."""
    return isinstance(modifier, WoodFisherPruningModifier) and not buffers(modifier, data)


def _source_of(modifier: PruningModifier, data: Any) -> dict[str, Any]:
    if not isinstance(modifier, WoodFisherPruningModifier):
        # What the pruned model gives is looked at.
        return {"data": data}
    if buffers(modifier, data):
        # A gradient that is buffered is the mean over a training batch, whatever a sampler would take.
        return {"data": None}
    if data is None:
        raise ValueError(f"{modifier.tag}.use_gradient_buffering is false, so data is required: pass data=(x, y).")
    return {"data": data, "grad_batch_size": modifier.grad_batch_size}
