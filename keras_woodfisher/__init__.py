"""Second-order (WoodFisher / M-FAC) pruning for Keras 3, on torch, TensorFlow and JAX."""

from keras_woodfisher._requirements import check_keras

check_keras()

from keras_woodfisher.callbacks import (  # noqa: E402
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
)
from keras_woodfisher.callbacks.keep_zeros import KeepZeros  # noqa: E402
from keras_woodfisher.callbacks.woodfisher_pruning import WoodFisherPruning  # noqa: E402
from keras_woodfisher.oneshot.batchnorm import reestimate_batchnorm  # noqa: E402
from keras_woodfisher.oneshot.prune import prune  # noqa: E402
from keras_woodfisher.oneshot.sensitivity import sensitivity  # noqa: E402
from keras_woodfisher.recipe import Recipe, RecipeCheck, RecipeError, check_recipe, load_recipe, recipe_schema  # noqa: E402
from keras_woodfisher.reports.batchnorm_report import BatchNormReport  # noqa: E402
from keras_woodfisher.reports.pruning_report import PhaseReport, PruningReport, StageReport, VariableReport  # noqa: E402
from keras_woodfisher.reports.sensitivity_report import Sensitivity, SensitivityReport  # noqa: E402
from keras_woodfisher.reports.zeros import sparsity_report  # noqa: E402

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
