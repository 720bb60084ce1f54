"""From a pruned model to one that is smaller and faster anywhere."""

from keras_woodfisher.deployment.shrinking.shrink import shrink, shrink_report

__all__ = ["shrink", "shrink_report"]
