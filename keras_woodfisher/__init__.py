"""Second-order (WoodFisher / M-FAC) pruning for Keras 3, on torch, TensorFlow and JAX."""

from keras_woodfisher.callbacks import (
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
)
from keras_woodfisher.callbacks.keep_zeros import KeepZeros
from keras_woodfisher.callbacks.woodfisher_pruning import WoodFisherPruning
from keras_woodfisher.oneshot.batchnorm import reestimate_batchnorm
from keras_woodfisher.oneshot.prune import prune
from keras_woodfisher.oneshot.sensitivity import sensitivity
from keras_woodfisher.recipe import Recipe, RecipeCheck, RecipeError, check_recipe, load_recipe, recipe_schema
from keras_woodfisher.reports.batchnorm_report import BatchNormReport
from keras_woodfisher.reports.pruning_report import PhaseReport, PruningReport, StageReport, VariableReport
from keras_woodfisher.reports.sensitivity_report import Sensitivity, SensitivityReport
from keras_woodfisher.reports.zeros import sparsity_report

__version__ = "0.1.0"

__all__ = [
    "BatchNormReport",
    "KeepZeros",
    "LearningRateFunction",
    "LearningRateSchedule",
    "PhaseReport",
    "PruningReport",
    "Recipe",
    "RecipeCheck",
    "RecipeError",
    "Sensitivity",
    "SensitivityReport",
    "SetLearningRate",
    "SetWeightDecay",
    "StageReport",
    "TrainableParams",
    "VariableReport",
    "WoodFisherPruning",
    "check_recipe",
    "load_recipe",
    "prune",
    "recipe_schema",
    "reestimate_batchnorm",
    "sensitivity",
    "sparsity_report",
]
