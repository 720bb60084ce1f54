"""Stock `.keras` files, compressed."""

from keras_woodfisher.deployment.saving.save import save

__all__ = ["save"]
