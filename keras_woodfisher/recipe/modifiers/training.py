"""The modifiers that stand beside pruning in recipes: rates, weight decay, what is trained, and for how long."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from keras_woodfisher import callbacks as companions
from keras_woodfisher.recipe.modifiers.fields import LogTypes, Off, Params, Position, Settings
from keras_woodfisher.recipe.modifiers.pruning import Modifier


class TrainingModifier(Modifier):
    """A modifier that one callback carries out; the callback checks its values.

    Attributes:
        makes: The class of the callback, whose arguments are fields; None where there is nothing to do.
    """

    makes: ClassVar[Callable[..., Any] | None] = None
    log_types: LogTypes = Field(None, description="Accepted where it says __ALL__.")
    constant_logging: Off = Field(None, description="Accepted where false.")

    @model_validator(mode="after")
    def _check(self) -> "TrainingModifier":
        self.callback()
        return self

    def callback(self) -> Any:
        """The callback that does it, or None where there is nothing to do."""
        if self.makes is None:
            return None
        return self.makes(**{name: getattr(self, name) for name in inspect.signature(self.makes).parameters})


class LastingModifier(TrainingModifier):
    """A modifier that works from one epoch to another, or to the end."""

    start_epoch: Position = 0.0
    end_epoch: Position = -1.0

    def ended(self, epochs: float) -> "Modifier":
        lasts = self.end_epoch == -1 and epochs > max(self.start_epoch, 0.0)
        return self.model_copy(update={"end_epoch": epochs}) if lasts else self


class EpochRangeModifier(TrainingModifier):
    """How long training lasts."""

    tag = "EpochRangeModifier"

    start_epoch: Position = 0.0
    end_epoch: Position

    @model_validator(mode="after")
    def _check_range(self) -> "EpochRangeModifier":
        if not 0 <= max(self.start_epoch, 0.0) <= self.end_epoch:
            raise ValueError(
                f"end_epoch must be at least start_epoch and not negative, got {self.start_epoch:g} to "
                f"{self.end_epoch:g}."
            )
        return self


class SetLearningRateModifier(TrainingModifier):
    """Sets the learning rate once."""

    tag = "SetLearningRateModifier"
    makes = companions.SetLearningRate

    learning_rate: float
    start_epoch: Position = 0.0
    end_epoch: Literal[-1] = Field(-1, description="Accepted where it says -1.")


class LearningRateFunctionModifier(TrainingModifier):
    """A learning rate that follows a function of the epoch."""

    tag = "LearningRateFunctionModifier"
    makes = companions.LearningRateFunction

    lr_func: Literal["linear", "cosine", "cyclic_linear"]
    init_lr: float
    final_lr: float
    start_epoch: Position
    end_epoch: Position
    cycle_epochs: float = 1.0


class LearningRateModifier(LastingModifier):
    """A learning rate that follows one of PyTorch's schedulers."""

    tag = "LearningRateModifier"
    makes = companions.LearningRateSchedule

    lr_class: Literal["StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingWarmRestarts"]
    lr_kwargs: Settings
    init_lr: float


class SetWeightDecayModifier(TrainingModifier):
    """Sets the weight decay once."""

    tag = "SetWeightDecayModifier"
    makes = companions.SetWeightDecay

    weight_decay: float
    start_epoch: Position = 0.0
    end_epoch: Literal[-1] = Field(-1, description="Accepted where it says -1.")


class TrainableParamsModifier(LastingModifier):
    """Freezes variables, or lets them train."""

    tag = "TrainableParamsModifier"
    makes = companions.TrainableParams

    params: Params = "__ALL__"
    trainable: bool = True
