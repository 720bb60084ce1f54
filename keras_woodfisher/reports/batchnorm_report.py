"""What became of the moving statistics, as data and as text."""

from dataclasses import dataclass

from keras_woodfisher.reports.html.elements import Section, bullets
from keras_woodfisher.reports.report import Report

_WORSE = 1.25
"""A dense model whose loss grows by more than this factor wasn't trained on such data.

Measured with a ResNet-20 on 512 images: 4.1 on plain ones, 1.05 on images with the training's augmentation.
"""

_SLACK = 1e-3
"""So much it may grow in any case: the loss of a model that fits its data is close to zero."""


@dataclass(frozen=True)
class BatchNormReport(Report):
    """The outcome of `reestimate_batchnorm`; `print`, show or `save` it.

        >>> print(kw.reestimate_batchnorm(model, x, verbose=0))
        BatchNorm: statistics of 1 layers measured on 240 examples

    Attributes:
        layers: The layers whose statistics were measured, in the order in which the model calls them.
        left_alone: BatchNorm layers that are frozen or that the model doesn't call.
        examples: How many examples they were measured on.
        dense_loss: The dense model's loss on those with its own statistics, and with measured ones; None where it
            wasn't checked.
    """

    layers: tuple[str, ...]
    left_alone: tuple[str, ...]
    examples: int
    dense_loss: tuple[float, float] | None = None

    title = "BatchNorm report"

    def sections(self, whole: bool = False) -> list[Section]:
        measured = [f"measured: {', '.join(self.layers)}"] if self.layers else []
        return [Section("BatchNorm", bullets([*str(self).splitlines(), *measured]))]

    @property
    def dense_keeps_accuracy(self) -> bool | None:
        """Whether the dense model is as good with measured statistics as with its own; None: not checked."""
        if self.dense_loss is None:
            return None
        own, measured = self.dense_loss
        # A loss of nan isn't kept.
        return measured <= max(_WORSE * own, own + _SLACK)

    def __str__(self) -> str:
        lines = [f"BatchNorm: statistics of {len(self.layers)} layers measured on {self.examples:,} examples"]
        if self.left_alone:
            lines.append(f"left alone (frozen or not called): {', '.join(self.left_alone)}")
        if self.dense_loss is not None:
            own, measured = self.dense_loss
            verdict = "" if self.dense_keeps_accuracy else ": this data doesn't suit the model"
            lines.append(f"the dense model's loss on them: {own:.4f}, with measured statistics {measured:.4f}{verdict}")
        return "\n".join(lines)
