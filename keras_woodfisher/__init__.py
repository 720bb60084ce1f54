"""Second-order (WoodFisher / M-FAC) pruning for Keras 3, on torch, TensorFlow and JAX.

Keras is imported when the first of these names is used, so that KERAS_BACKEND can still be chosen after this import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_woodfisher.callbacks import (
        BackupPruning,
        KeepZeros,
        LearningRateFunction,
        LearningRateSchedule,
        SetLearningRate,
        SetWeightDecay,
        TrainableParams,
        WoodFisherPruning,
    )
    from keras_woodfisher.deployment import shrink, shrink_report
    from keras_woodfisher.deployment.exporting import export
    from keras_woodfisher.deployment.saving import save
    from keras_woodfisher.oneshot import prune, reconstruct, reestimate_batchnorm, sensitivity
    from keras_woodfisher.recipe import Recipe, RecipeCheck, RecipeError, check_recipe, load_recipe, recipe_schema
    from keras_woodfisher.reports.batchnorm_report import BatchNormReport
    from keras_woodfisher.reports.epoch_report import EpochReport
    from keras_woodfisher.reports.export_report import ExportReport, FileFigures
    from keras_woodfisher.reports.layer_report import LayerReport, ReconstructionReport
    from keras_woodfisher.reports.pruning_report import PruningReport
    from keras_woodfisher.reports.sensitivity_report import Sensitivity, SensitivityReport
    from keras_woodfisher.reports.shrink_report import ShrinkReport, ShrunkLayer, StayingChannels
    from keras_woodfisher.reports.stage_report import PhaseReport, StageReport
    from keras_woodfisher.reports.variable_report import VariableReport
    from keras_woodfisher.reports.zeros import sparsity_report

__version__ = "0.1.0"

__all__ = [
    "BackupPruning",
    "BatchNormReport",
    "EpochReport",
    "ExportReport",
    "FileFigures",
    "KeepZeros",
    "LayerReport",
    "LearningRateFunction",
    "LearningRateSchedule",
    "PhaseReport",
    "PruningReport",
    "Recipe",
    "RecipeCheck",
    "RecipeError",
    "ReconstructionReport",
    "Sensitivity",
    "SensitivityReport",
    "SetLearningRate",
    "SetWeightDecay",
    "ShrinkReport",
    "ShrunkLayer",
    "StageReport",
    "StayingChannels",
    "TrainableParams",
    "VariableReport",
    "WoodFisherPruning",
    "check_recipe",
    "export",
    "load_recipe",
    "prune",
    "recipe_schema",
    "reconstruct",
    "reestimate_batchnorm",
    "save",
    "sensitivity",
    "shrink",
    "shrink_report",
    "sparsity_report",
]

_HOMES = {
    "callbacks": (
        "BackupPruning KeepZeros LearningRateFunction LearningRateSchedule SetLearningRate SetWeightDecay "
        "TrainableParams WoodFisherPruning"
    ),
    "deployment": "shrink shrink_report",
    "deployment.exporting": "export",
    "deployment.saving": "save",
    "oneshot": "prune reconstruct reestimate_batchnorm sensitivity",
    "recipe": "Recipe RecipeCheck RecipeError check_recipe load_recipe recipe_schema",
    "reports.batchnorm_report": "BatchNormReport",
    "reports.epoch_report": "EpochReport",
    "reports.export_report": "ExportReport FileFigures",
    "reports.layer_report": "LayerReport ReconstructionReport",
    "reports.pruning_report": "PruningReport",
    "reports.sensitivity_report": "Sensitivity SensitivityReport",
    "reports.shrink_report": "ShrinkReport ShrunkLayer StayingChannels",
    "reports.stage_report": "PhaseReport StageReport",
    "reports.variable_report": "VariableReport",
    "reports.zeros": "sparsity_report",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
