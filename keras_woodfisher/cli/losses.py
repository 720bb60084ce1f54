"""The notation of `--loss`: a Keras loss by name, `NAME:from_logits` where the model's outputs are logits."""

import difflib
import inspect
from typing import Any

import keras
import numpy as np
from keras import ops

_USUAL = (
    "sparse_categorical_crossentropy (classes as numbers), categorical_crossentropy (one-hot), binary_crossentropy, "
    "mean_squared_error"
)
_LOGITS = ":from_logits"
_NOTE = f"Write NAME{_LOGITS} where the model's outputs are logits."


def read_loss(text: str) -> Any:
    """The Keras loss that `--loss` names.

    Raises:
        ValueError: If there is no such loss, or it doesn't take logits.
    """
    name, logits, rest = text.partition(_LOGITS)
    if rest or (":" in name):
        raise ValueError(f"--loss {text}: only {_LOGITS} may follow a name.")
    try:
        loss = keras.losses.get(name)
    except ValueError:
        near = difflib.get_close_matches(name, dir(keras.losses), n=1)
        hint = f" The nearest is {near[0]}." if near else ""
        raise ValueError(f"--loss {name} isn't a loss of Keras.{hint} The usual ones: {_USUAL}. {_NOTE}") from None
    made = _with_logits(name)
    if logits and made is None:
        raise ValueError(f"--loss {text}: {name} doesn't take logits. Leave out {_LOGITS}.")
    return made if logits else loss


def needed_loss(model: keras.Model, text: str | None, why: str) -> Any:
    """The loss of `--loss`, or None for the compiled one.

    Args:
        model: The model.
        text: What `--loss` says.
        why: What needs a loss.

    Raises:
        ValueError: If there is neither.
    """
    if text is not None:
        return read_loss(text)
    if not model.compiled:
        raise ValueError(f"The model isn't compiled, so {why} needs --loss. The usual ones: {_USUAL}. {_NOTE}")
    return None


def check_outputs(model: keras.Model, text: str, x: Any, y: np.ndarray) -> None:
    """Refuses logits where the loss takes probabilities, and classes where it takes one label an output.

    Keras would compute with either, and the result would be wrong without a word.

    Args:
        model: The model.
        text: What `--loss` says.
        x: Examples; a few of them are run.
        y: Their labels.

    Raises:
        ValueError: If outputs lie outside [0, 1], or labels have another shape than outputs.
    """
    outputs = model(keras.tree.map_structure(lambda array: array[:16], x), training=False)
    for output in keras.tree.flatten(outputs):
        values = ops.convert_to_numpy(output)
        if not text.startswith(("sparse", "ctc")) and y[0].size != values[0].size:
            raise ValueError(
                f"--loss {text} wants one label an output, got labels of shape {y[:1].shape[1:]} for outputs of shape "
                f"{values.shape[1:]}. Where labels are classes as numbers, use sparse_categorical_crossentropy."
            )
        of_probabilities = not text.endswith(_LOGITS) and _with_logits(text) is not None
        if of_probabilities and (np.nanmin(values) < -1e-3 or np.nanmax(values) > 1 + 1e-3):
            raise ValueError(
                f"--loss {text} takes probabilities, but the model's outputs go from {np.nanmin(values):.3g} to "
                f"{np.nanmax(values):.3g}: they are logits. Write --loss {text}{_LOGITS}."
            )


def is_classification(loss: Any) -> bool:
    """Whether accuracy means something beside this loss."""
    return "crossentropy" in _letters(_name(loss))


def is_binary_from_logits(loss: Any) -> bool:
    """Whether outputs above 0 (rather than above 0.5) mean yes."""
    config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    return bool(config.get("from_logits")) and "binary" in _name(loss)


def _with_logits(name: str) -> Any:
    """The loss of a name, made for logits; None if it doesn't know them."""
    for made in vars(keras.losses).values():
        if inspect.isclass(made) and _letters(made.__name__) == _letters(name):
            make: Any = made
            return make(from_logits=True) if "from_logits" in inspect.signature(make).parameters else None
    return None


def _name(loss: Any) -> str:
    return loss if isinstance(loss, str) else str(getattr(loss, "name", getattr(loss, "__name__", "")))


def _letters(name: str) -> str:
    return name.replace("_", "").lower()
