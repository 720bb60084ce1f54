"""From a pruned model to something useful: small files, smaller layers, and the formats of other runtimes."""

from keras_woodfisher.deployment.shrinking.shrink import shrink, shrink_report

__all__ = ["shrink", "shrink_report"]
