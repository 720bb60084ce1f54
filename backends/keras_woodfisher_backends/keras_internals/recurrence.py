"""Private parts of recurrent layers: the loop over time, and what a subclass does otherwise."""

from collections.abc import Callable
from typing import Any

from keras import layers
from keras.src import backend

from keras_woodfisher_backends.keras_internals.models import layers_of

_CELLS = (layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell)
_LOOPS = (layers.RNN, layers.LSTM, layers.GRU)


def is_conv_lstm_cell(layer: Any) -> bool:
    """Whether a layer is the cell of a ConvLSTM, whose class Keras doesn't export."""
    return _is_of_keras(type(layer)) and type(layer).__name__ == "ConvLSTMCell"


def is_plain_cell(layer: Any) -> bool:
    """Whether a layer is one of Keras's cells, or a subclass that computes the same."""
    return is_conv_lstm_cell(layer) or any(
        isinstance(layer, kind) and type(layer).call is kind.call and "call" not in vars(layer) for kind in _CELLS
    )


def is_plain_loop(layer: Any) -> bool:
    """Whether a recurrent layer does nothing but call its cell at each time."""
    return any(type(layer).inner_loop is kind.inner_loop for kind in _LOOPS)


def has_loops_over_time(model: Any) -> bool:
    """Whether a model has recurrent layers; None has none."""
    return model is not None and any(isinstance(layer, layers.RNN) for layer in layers_of(model))


def loop_over_time(step: Callable[[Any, Any], Any], inputs: Any, states: Any, mask: Any, unroll: bool) -> Any:
    """Runs a step at each time and gives (outputs (N, T, ...), last states); masked times keep what was before.

    Args:
        step: `step(input, states) -> (output, new states)`.
        inputs: (N, T, ...).
        states: The first ones.
        mask: (N, T), or None.
        unroll: Whether all steps stand in a compiled function, in place of a loop.
    """
    _, outputs, last = backend.rnn(step, inputs, states, mask=mask, unroll=unroll, input_length=inputs.shape[1])
    return outputs, last


def _is_of_keras(kind: type) -> bool:
    return kind.__module__.startswith("keras.")
