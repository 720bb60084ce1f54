"""Callbacks for what recipes contain beside pruning: learning rate, weight decay, and what is trained at all."""

from keras_woodfisher.companions.learning_rate import LearningRateFunction, LearningRateSchedule, SetLearningRate
from keras_woodfisher.companions.trainable import TrainableParams
from keras_woodfisher.companions.weight_decay import SetWeightDecay

__all__ = ["LearningRateFunction", "LearningRateSchedule", "SetLearningRate", "SetWeightDecay", "TrainableParams"]
