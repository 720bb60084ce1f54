"""Files for other runtimes, each checked by its own."""

from keras_woodfisher.deployment.exporting.export import export

__all__ = ["export"]
