"""The framework's own settings for float32 products."""

import keras

NAME = keras.backend.backend()


class Precision:
    """Reads and writes them; `loose` is what a user may have chosen, `strict` what this package computes with."""

    loose = {"torch": ("high", True), "tensorflow": True, "jax": "bfloat16"}[NAME]
    strict = {"torch": ("highest", False), "tensorflow": False, "jax": "highest"}[NAME]

    def read(self):
        if NAME == "torch":
            import torch

            return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        if NAME == "tensorflow":
            import tensorflow as tf

            return tf.config.experimental.tensor_float_32_execution_enabled()
        import jax

        return jax.config.jax_default_matmul_precision

    def write(self, value):
        if NAME == "torch":
            import torch

            torch.set_float32_matmul_precision(value[0])
            torch.backends.cudnn.allow_tf32 = value[1]
        elif NAME == "tensorflow":
            import tensorflow as tf

            tf.config.experimental.enable_tensor_float_32_execution(value)
        else:
            import jax

            jax.config.update("jax_default_matmul_precision", value)
