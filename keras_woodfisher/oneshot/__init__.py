"""One call, no training: pruning, sensitivity analysis and BatchNorm re-estimation."""

from keras_woodfisher.oneshot.batchnorm import reestimate_batchnorm
from keras_woodfisher.oneshot.prune import prune
from keras_woodfisher.oneshot.reconstruction.reconstruct import reconstruct
from keras_woodfisher.oneshot.sensitivity import sensitivity

__all__ = ["prune", "reconstruct", "reestimate_batchnorm", "sensitivity"]
