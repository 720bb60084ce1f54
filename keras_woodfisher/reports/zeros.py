"""Counts the zeros of a model."""

from collections.abc import Sequence

import keras
import numpy as np

from keras_woodfisher.model.targets import ALL_PRUNABLE, Target, all_targets, named_targets
from keras_woodfisher.options.checks import names
from keras_woodfisher.reports.pruning_report import PruningReport, VariableReport

_PACKED = ("int4", "gptq", "awq")


def sparsity_report(model: keras.Model, params: str | Sequence[str] = ALL_PRUNABLE) -> PruningReport:
    """Counts the zeros of a model's prunable variables.

        >>> model.get_layer("out").set_weights([np.eye(16, 3), np.zeros(3)])
        >>> [(variable.weights, variable.pruned) for variable in kw.sparsity_report(model).variables]
        [(32, 0), (48, 45)]

    Args:
        model: Any built Keras model, pruned by whatever means.
        params: Names and patterns as in `WoodFisherPruning`; frozen and int8 variables are counted too.

    Raises:
        ValueError: If the model isn't built.
        KeyError: If a name matches nothing.
    """
    targets = named_targets(all_targets(model), names("params", params))
    packed = [t for t in targets if getattr(t.layer, "quantization_mode", None) in _PACKED]
    notes = [f"Not counted, since {t.layer.quantization_mode} packs several weights in one: {t.name}" for t in packed]
    return PruningReport(count_zeros([t for t in targets if t not in packed]), notes=tuple(notes))


def count_zeros(targets: Sequence[Target]) -> tuple[VariableReport, ...]:
    """A report of each variable as it is now."""
    return tuple(
        VariableReport(t.name, tuple(t.variable.shape), t.size, int(np.count_nonzero(t.read() == 0))) for t in targets
    )
