"""What only some of the tested releases of Keras have: tests that use it are skipped elsewhere."""

from functools import partial

import keras
import pytest
from keras_woodfisher_backends.keras_internals import RELEASE


def _of_later_releases(name):
    return getattr(keras.optimizers, name, partial(_skip, name))


def _skip(name, *args, **kwargs):
    pytest.skip(f"Keras {keras.__version__} has no {name} here")


MultiOptimizer, OptimizerMap, ScheduleFreeAdamW = map(
    _of_later_releases, ("MultiOptimizer", "OptimizerMap", "ScheduleFreeAdamW")
)
# It can't train a model on TensorFlow before 3.13.
Muon = (
    partial(_skip, "Muon") if keras.backend.backend() == "tensorflow" and RELEASE < (3, 13) else keras.optimizers.Muon
)
