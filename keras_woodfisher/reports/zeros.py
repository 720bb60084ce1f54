"""Counts the zeros of a model, those that a report is about and the others."""

from collections.abc import Sequence

import keras
import numpy as np

from keras_woodfisher.model.quantized import holds_integers, integers_of, mode_of
from keras_woodfisher.model.targets import ALL, ALL_PRUNABLE, Target, all_targets, matches, named_targets
from keras_woodfisher.options.checks import names
from keras_woodfisher.reports.left_out import LeftOut, LeftOutVariable, patterns_of
from keras_woodfisher.reports.pruning_report import PruningReport
from keras_woodfisher.reports.storage import StoredVariable
from keras_woodfisher.reports.variable_report import VariableReport

EMBEDDING = "embeddings, which are taken only when named"
OTHER = "of layers of another kind, which are taken only when named"
UNNAMED = "not named in params"
_NAMEABLE = (EMBEDDING, OTHER, UNNAMED)
EXCLUDED = "named in exclude"
FROZEN = "frozen: set `trainable = True` on their layers"
LORA = "of layers with LoRA: merge it first"
QUANTIZED = "quantised: prune before quantising"
UNREADABLE = "quantised in a way that can't be read"


def sparsity_report(model: keras.Model, params: str | Sequence[str] = ALL_PRUNABLE) -> PruningReport:
    """Counts the zeros of a model's prunable variables, and says which others there are.

        >>> model.get_layer("out").set_weights([np.eye(16, 3), np.zeros(3)])
        >>> [(variable.weights, variable.pruned) for variable in kw.sparsity_report(model).variables]
        [(32, 0), (48, 45)]

    Args:
        model: Any built Keras model, pruned by whatever means.
        params: Names and patterns as in `WoodFisherPruning`; frozen and quantised variables (int8, int4, GPTQ, AWQ) are
            counted too.

    Raises:
        ValueError: If the model isn't built.
        KeyError: If a name matches nothing.
    """
    everything, wanted = all_targets(model), _listed(names("params", params))
    variables = {id(t.variable): found for t in named_targets(everything, wanted) if (found := _count(t)) is not None}
    others = [(t, _reason_unmeant(t, wanted)) for t in everything if id(t.variable) not in variables]
    counted = tuple(variables.values())
    return PruningReport(counted, left_out=_left_out(others, sum(v.weights for v in counted), wanted))


def left_out_of(
    model: keras.Model, chosen: Sequence[Target], params: str | Sequence[str], exclude: Sequence[str]
) -> LeftOut:
    """What pruning leaves out of a model.

    Args:
        model: A built model.
        chosen: What is pruned.
        params: The names and patterns that were asked for.
        exclude: Those that were to be left out.
    """
    wanted, known = _listed(params), {id(target.variable) for target in chosen}
    others = [(t, _reason_unpruned(t, wanted, exclude)) for t in all_targets(model) if id(t.variable) not in known]
    return _left_out(others, sum(target.size for target in chosen), wanted)


def count_zeros(targets: Sequence[Target]) -> tuple[VariableReport, ...]:
    """A report of each variable as it is now; of quantised ones those that can be read."""
    return tuple(found for target in targets if (found := _count(target)) is not None)


def _count(target: Target) -> VariableReport | None:
    """None where the integers of a quantised layer can't be read."""
    if not holds_integers(target.layer, target.variable):
        # Not `read`, which copies: a model may have much more than what is pruned.
        values = keras.ops.convert_to_numpy(target.variable)
        zeros = _zeros(values)
        stored = StoredVariable(target, zeros)
        return VariableReport(target.name, tuple(target.variable.shape), target.size, zeros, stored)
    integers = integers_of(target.layer, target.variable)
    if integers is None:
        return None
    # That of the weights, though they may be packed.
    shape = tuple(getattr(target.layer, "original_kernel_shape", None) or integers.shape)
    zeros = _zeros(integers)
    return VariableReport(target.name, shape, integers.size, zeros, StoredVariable(target, zeros))


def _zeros(values: np.ndarray) -> int:
    return values.size - int(np.count_nonzero(values))


def _left_out(others: Sequence[tuple[Target, str]], considered: int, wanted: tuple[str, ...]) -> LeftOut:
    """Those of some variables that aren't vectors, given with the reason why each of them isn't considered."""
    found = tuple(_left_out_variable(target, reason) for target, reason in others if matches(target, ALL))
    nameable = [v.name for v in found if v.reason in _NAMEABLE]
    patterns = patterns_of(nameable, {target.name for target, _ in others} - set(nameable))
    return LeftOut(found, considered, (*wanted, *patterns) if patterns else ())


def _left_out_variable(target: Target, reason: str) -> LeftOutVariable:
    found = _count(target)
    if found is None:
        return LeftOutVariable(target.name, tuple(target.variable.shape), target.size, None, reason)
    return LeftOutVariable(found.name, found.shape, found.weights, found.pruned, reason)


def _reason_unpruned(target: Target, wanted: Sequence[str], exclude: Sequence[str]) -> str:
    if any(matches(target, item) for item in wanted):
        return EXCLUDED if any(matches(target, item) for item in exclude) else FROZEN
    if getattr(target.layer, "lora_enabled", False):
        return LORA
    return _reason_unmeant(target, wanted) if mode_of(target.layer) is None else QUANTIZED


def _reason_unmeant(target: Target, wanted: Sequence[str]) -> str:
    if any(matches(target, item) for item in wanted):
        return UNREADABLE
    if target.variable.name.startswith("lora_"):
        return LORA
    if matches(target, ALL_PRUNABLE):
        return UNNAMED
    return EMBEDDING if isinstance(target.layer, keras.layers.Embedding) else OTHER


def _listed(params: str | Sequence[str]) -> tuple[str, ...]:
    return (params,) if isinstance(params, str) else tuple(params)
