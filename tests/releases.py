"""What only some of the tested releases of Keras have: tests that use it are skipped elsewhere."""

from functools import partial

import keras
import pytest


def _of_later_releases(name):
    return getattr(keras.optimizers, name, partial(_skip, name))


def _skip(name, *args, **kwargs):
    pytest.skip(f"Keras {keras.__version__} has no {name}")


MultiOptimizer, OptimizerMap, ScheduleFreeAdamW = map(
    _of_later_releases, ("MultiOptimizer", "OptimizerMap", "ScheduleFreeAdamW")
)
