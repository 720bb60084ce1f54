"""Loss and metrics of a model, without compiling it: what is saved later is compiled or not as it was."""

from typing import Any

import keras

from keras_woodfisher.cli.files import Data
from keras_woodfisher.cli.losses import is_binary_from_logits, is_classification


class Evaluation:
    """Measures a model again and again.

    A compiled model's own loss and metrics are used, and accuracy where it has none but its loss is that of a
    classifier. With a loss of `--loss` it is that loss and accuracy.

    Args:
        model: The model.
        loss: A Keras loss instead of the compiled one.
        data: The examples.
        batch_size: How many at a time.
    """

    def __init__(self, model: keras.Model, loss: Any, data: Data, batch_size: int):
        self._data = data
        self._batch_size = batch_size
        self._own = model if loss is None else None
        self._judge: keras.Model | None = None
        loss = model.loss if loss is None else loss
        if self._own is None or is_classification(loss):
            self._judge = _Judge(model)
            self._judge.compile(loss=loss, metrics=_metrics(loss))

    def measure(self) -> dict[str, float]:
        """Loss and metrics now, by name."""
        result = {} if self._own is None else self._of(self._own)
        if self._judge is not None and not any("acc" in name for name in result):
            result = self._of(self._judge) | result
        # The loss comes first, whatever the order in which they were measured.
        return dict(sorted(result.items(), key=lambda item: item[0] != "loss"))

    def _of(self, model: keras.Model) -> dict[str, float]:
        x, y, weight = self._data
        return model.evaluate(x, y, sample_weight=weight, batch_size=self._batch_size, verbose=0, return_dict=True)


class _Judge(keras.Model):
    """A model around the user's, compiled in its stead."""

    def __init__(self, inner: keras.Model):
        super().__init__(name="evaluation")
        self.inner = inner

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.inner(inputs, training=training)


def _metrics(loss: Any) -> list[Any]:
    if is_binary_from_logits(loss):
        return [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)]
    return ["accuracy"] if is_classification(loss) else []
