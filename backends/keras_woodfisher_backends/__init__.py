"""Backend adapters of keras_woodfisher: how a framework gathers gradients and inverts blocks."""

from importlib import import_module

from keras_woodfisher_backends.protocol import Backend

_ADAPTERS = {
    "torch": ("torch.backend", "TorchBackend"),
    "tensorflow": ("tensorflow.backend", "TensorFlowBackend"),
    "jax": ("jax.backend", "JaxBackend"),
}


def is_known(name: str) -> bool:
    """Whether there is an adapter of a Keras backend; those without gradients can do some things, too."""
    return name in _ADAPTERS


def get_backend(name: str) -> Backend:
    """Returns the adapter of a Keras backend; its framework is imported only now.

    Args:
        name: What `keras.backend.backend()` returns.

    Raises:
        RuntimeError: If the backend can't compute gradients or isn't known.
    """
    if name not in _ADAPTERS:
        raise RuntimeError(
            f"keras_woodfisher needs a Keras backend that computes gradients: "
            f"{', '.join(sorted(_ADAPTERS))}. KERAS_BACKEND is {name!r}. "
            "Set KERAS_BACKEND=torch (or another of these) before Keras is imported."
        )
    module, adapter = _ADAPTERS[name]
    return getattr(import_module(f"keras_woodfisher_backends.{module}"), adapter)()
