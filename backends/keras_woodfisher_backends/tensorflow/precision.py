"""TensorFlow: float32 products in full float32, on every device, for as long as a scope lasts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

from keras_woodfisher_backends.shared_setting import SharedSetting


def _without_tf32() -> Callable[[], Any]:
    # TF32 has 10 bits of mantissa: a product in it would lose the small eigenvalues, and gradient samples three digits.
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return partial(tf.config.experimental.enable_tensor_float_32_execution, before)


full_precision = SharedSetting(_without_tf32)
