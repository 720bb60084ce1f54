"""A callback that sets the weight decay."""

import keras
from keras_woodfisher_backends.keras_internals.training import model_of

from keras_woodfisher.callbacks.epoch_callback import TOLERANCE, ScheduledCallback, known_parts, start_of
from keras_woodfisher.options.checks import finite_float32


class SetWeightDecay(ScheduledCallback):
    """Sets the optimizer's weight decay at a position in training. It stays so afterwards.

    Keras subtracts `weight_decay * learning_rate * w` from each weight `w` in each step, except where
    `exclude_from_weight_decay` says otherwise. The value is part of the compiled train step, so that one is made anew.

        >>> model.compile(keras.optimizers.AdamW(weight_decay=0.01), model.loss)
        >>> history = model.fit(x, y, callbacks=[kw.SetWeightDecay(0.0, start_epoch=0.5)], verbose=0)
        >>> model.optimizer.weight_decay
        0.0

    Args:
        weight_decay: The weight decay, for all variables (of Muon, for those that it leaves to Adam too).
        start_epoch: Position in epochs, fractions allowed; 0 or -1 means at once.

    Raises:
        ValueError, TypeError: If an argument is out of range.
    """

    def __init__(self, weight_decay: float, start_epoch: float = 0.0):
        self._start = start_of(start_epoch)
        self._value = finite_float32("weight_decay", weight_decay, least=0.0)
        super().__init__({"weight_decay": self._value, "start_epoch": float(start_epoch)})
        self._done = False

    def _prepare(self) -> None:
        self._done = False

    def _apply(self, position: float) -> None:
        if self._done or position < self._start - TOLERANCE:
            return
        self._done = True
        changed = False
        for part in known_parts(model_of(self)):
            is_muon = isinstance(part, keras.optimizers.Muon)
            for name in ("weight_decay", "adam_weight_decay") if is_muon else ("weight_decay",):
                changed = changed or getattr(part, name) != self._value
                setattr(part, name, self._value)
        if changed:
            model_of(self).make_train_function(force=True)
