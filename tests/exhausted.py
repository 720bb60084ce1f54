"""Full memory, as each framework tells it."""

import keras

NAME = keras.backend.backend()


def full():
    """What the framework raises where its memory is full."""
    if NAME == "torch":
        import torch

        return torch.OutOfMemoryError("CUDA out of memory.")
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
    import jax

    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
