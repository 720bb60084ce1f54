"""The loss that commands use and measure: the compiled one, or that of `--loss`.

`--loss` names a Keras loss, `NAME:from_logits` where the model's outputs are logits; of several outputs it is the loss
of each, or `OUTPUT=NAME,OUTPUT=NAME` gives each its own.
"""

import difflib
import inspect
import re
from contextlib import suppress
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.nest import map_arrays

from keras_woodfisher.cli.arrays import Data
from keras_woodfisher.gradients.classes import takes_classes
from keras_woodfisher.gradients.loss import ModelLoss

_USUAL = (
    "sparse_categorical_crossentropy (classes as numbers), categorical_crossentropy (one-hot), binary_crossentropy, "
    "mean_squared_error"
)
_LOGITS = ":from_logits"
_OF_CLASSES = ("sparse", "ctc")
"""How the names of losses begin whose labels aren't one an output."""

_OF_PROBABILITIES = ("kl_divergence", "dice", "tversky", "categorical_generalized_cross_entropy")
"""Functions that take probabilities and can't be told of logits."""

_NOTE = f"Write NAME{_LOGITS} where the model's outputs are logits."


def read_loss(text: str) -> Any:
    """The Keras loss that `--loss` names, or a dictionary of them by output.

    Raises:
        ValueError: If there is no such loss, or it doesn't take logits.
    """
    if not _by_output(text):
        return _read_one(text)
    return {output: _read_one(name) for output, name in _by_output(text).items()}


def _by_output(text: str) -> dict[str, str]:
    """The text of each output's loss; empty where it is one for all."""
    if not re.match(r"[^:=]+=", text):
        return {}
    pairs = (part.strip().partition("=") for part in text.split(","))
    return {output: name for output, _, name in pairs}


def _read_one(text: str) -> Any:
    name, logits, rest = text.partition(_LOGITS)
    if rest or (":" in name):
        raise ValueError(f"--loss {text}: only {_LOGITS} may follow a name.")
    try:
        loss = keras.losses.get(name or "(nothing)")
    except (ValueError, TypeError):
        near = difflib.get_close_matches(name, dir(keras.losses), n=1)
        hint = f" The nearest is {near[0]}." if near else ""
        raise ValueError(f"--loss {name} isn't a loss of Keras.{hint} The usual ones: {_USUAL}. {_NOTE}") from None
    made = _with_logits(loss)
    if logits and made is None:
        raise ValueError(f"--loss {text}: {name} doesn't take logits. Leave out {_LOGITS}.")
    return made if logits else loss


def needed_loss(model: keras.Model, text: str | None, why: str, examples: Data) -> Any:
    """The loss of `--loss`, which has to fit the examples, or None for the compiled one.

    Raises:
        ValueError: If there is neither, or `--loss` names none or one that doesn't fit; `why` says what needs it.
    """
    if text is not None:
        loss = read_loss(text)
        _check_outputs(model, text, examples)
        return loss
    if not model.compiled:
        raise ValueError(f"The model isn't compiled, so {why} needs --loss. The usual ones: {_USUAL}. {_NOTE}")
    return None


def check_labels(path: str | None, model: keras.Model, loss: Any, examples: Data | None) -> None:
    """Refuses labels that are no class of the model where the loss takes classes; the message names the file."""
    losses = keras.tree.flatten(loss if loss is not None else model.loss if model.compiled else None)
    if examples is None or examples.y is None or not any(takes_classes(found) for found in losses if found is not None):
        return
    judge = ModelLoss(model, (), loss)
    try:
        judge.probe(map_arrays(lambda array: array[None, :1], tuple(examples)))
        judge.check_classes(examples.y)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_outputs(model: keras.Model, text: str, examples: Data) -> None:
    """Refuses logits where the loss takes probabilities, and classes where it takes one label an output.

    Keras would compute with either, and the result would be wrong without a word. A few examples are run.
    """
    x, y, _ = examples
    outputs = model(keras.tree.map_structure(lambda array: array[:16], x), training=False)
    flat, labels = keras.tree.flatten(outputs), keras.tree.flatten(y)
    names = list(getattr(model, "output_names", None) or [""])
    if isinstance(outputs, dict):
        names = keras.tree.flatten({name: name for name in outputs})
    texts = _by_output(text)
    if texts and {*texts} != {*names}:
        raise ValueError(f"--loss {text} names {', '.join(texts)}; the model's outputs are {', '.join(names)}.")
    if len(flat) != len(labels):
        raise ValueError(f"--loss {text} needs labels of each output: the model has {len(flat)}, got {len(labels)}.")
    for name, output, label in zip(names, flat, labels, strict=True):
        _check_output(texts.get(name, text), ops.convert_to_numpy(output), label)


def _check_output(text: str, values: np.ndarray, labels: np.ndarray) -> None:
    loss = keras.losses.get(text.removesuffix(_LOGITS))
    if not _name(_function(loss)).startswith(_OF_CLASSES) and labels[0].size != values[0].size:
        raise ValueError(
            f"--loss {text} wants one label an output, got labels of shape {labels.shape[1:]} for outputs of shape "
            f"{values.shape[1:]}. Where labels are classes as numbers, use sparse_categorical_crossentropy."
        )
    knows_logits = _with_logits(loss) is not None
    of_probabilities = knows_logits or _name(_function(loss)) in _OF_PROBABILITIES
    if text.endswith(_LOGITS) or not of_probabilities:
        return
    if np.nanmin(values) < -1e-3 or np.nanmax(values) > 1 + 1e-3:
        mend = f"Write --loss {text}{_LOGITS}."
        if not knows_logits:
            mend = f"It can't be told so: end the model with a softmax or sigmoid, or name a loss with {_LOGITS}."
        raise ValueError(
            f"--loss {text} takes probabilities, but the model's outputs go from {np.nanmin(values):.3g} to "
            f"{np.nanmax(values):.3g}: they are logits. {mend}"
        )


class Evaluation:
    """Measures a model again and again.

    A compiled model's own loss and metrics are used, and accuracy where it has none but its loss is that of a
    classifier with one output. With a loss of `--loss` it is that loss and accuracy.
    """

    def __init__(self, model: keras.Model, loss: Any, data: Data, batch_size: int):
        self._data = data
        self._batch_size = batch_size
        self._own = model if loss is None else None
        self._judge: keras.Model | None = None
        loss = model.loss if loss is None else loss
        several = len(getattr(model, "output_names", None) or ()) > 1
        if self._own is None or (_is_classification(loss) and not several):
            self._judge = _Judge(model)
            self._judge.compile(loss=loss, metrics=[] if several else _metrics(loss))

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
        self.output_names = getattr(inner, "output_names", None)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.inner(inputs, training=training)


def _metrics(loss: Any) -> list[Any]:
    config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    if config.get("from_logits") and "binary" in _name(_function(loss)):
        # Outputs above 0 (rather than above 0.5) mean yes.
        return [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)]
    return ["accuracy"] if _is_classification(loss) else []


def _is_classification(loss: Any) -> bool:
    """Whether accuracy means something beside this loss."""
    return "crossentropy" in _name(_function(loss)).replace("_", "").lower()


def _with_logits(loss: Any) -> Any:
    """A Keras loss, made for logits; None if it doesn't know them."""
    function = _function(loss)
    for made in vars(keras.losses).values():
        # Whatever the name by which it was found: a loss has several, and functions only one of them.
        if inspect.isclass(made) and "from_logits" in inspect.signature(made).parameters:
            make: Any = made
            if make().fn is function:
                return make(from_logits=True)
    return None


def _function(loss: Any) -> Any:
    """What a loss, or one that is named, computes of an example: the function of its own, where it wraps one."""
    with suppress(ValueError):
        loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    return getattr(loss, "fn", loss)


def _name(loss: Any) -> str:
    return loss if isinstance(loss, str) else str(getattr(loss, "__name__", getattr(loss, "name", "")))
