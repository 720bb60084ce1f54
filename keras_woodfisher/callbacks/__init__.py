"""Keras callbacks: pruning while a model trains, holding zeros, and what else recipes schedule."""

from keras_woodfisher.callbacks.backup_pruning import BackupPruning
from keras_woodfisher.callbacks.keep_zeros import KeepZeros
from keras_woodfisher.callbacks.learning_rate import LearningRateFunction, LearningRateSchedule, SetLearningRate
from keras_woodfisher.callbacks.trainable_params import TrainableParams
from keras_woodfisher.callbacks.weight_decay import SetWeightDecay
from keras_woodfisher.callbacks.woodfisher_pruning import WoodFisherPruning

__all__ = [
    "BackupPruning",
    "KeepZeros",
    "LearningRateFunction",
    "LearningRateSchedule",
    "SetLearningRate",
    "SetWeightDecay",
    "TrainableParams",
    "WoodFisherPruning",
]
