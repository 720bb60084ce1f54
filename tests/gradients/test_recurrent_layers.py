"""Gradient samples of recurrent layers against plain autodiff, one group of examples at a time."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops
from sampling import CAPTURES, NAME, assert_rows, chain, mean_square, sample, truth_of


def branched(shape, parts):
    """Each part looks at the same input."""
    inputs = layers.Input(shape)
    return keras.Model(inputs, layers.Concatenate()([layers.Flatten()(part(inputs)) for part in parts]))


class FromAState(layers.Layer):
    """Runs layers from a state that differs between examples, and gives their last states too."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    def build(self, shape):
        for part in self.parts:
            part.build(shape)

    def call(self, x, mask=None):
        found = []
        for part in self.parts:
            first = [0.5 * x[:, 0, :2]] * (2 if isinstance(part, layers.LSTM) else 1)
            found += part(x, initial_state=first, mask=mask)
        times = [tensor[:, time] for tensor in found if tensor.ndim == 3 for time in range(x.shape[1])]
        return ops.concatenate([*times, *(tensor for tensor in found if tensor.ndim == 2)], -1)


class ByHand(layers.Layer):
    """Calls cells in a loop of its own."""

    def __init__(self, *cells):
        super().__init__()
        self.cells = cells

    def build(self, shape):
        for cell in self.cells:
            cell.build((shape[0], shape[-1]))

    def call(self, x):
        outputs = []
        for cell in self.cells:
            states = [0.5 * x[:, 0, :2]] * (2 if isinstance(cell, layers.LSTMCell) else 1)
            for time in range(x.shape[1]):
                output, states = cell(x[:, time], states)
            outputs.append(output)
        return ops.concatenate(outputs, -1)


ALL = (layers.LSTM, layers.GRU, layers.SimpleRNN)
PARTS = {
    "plain": lambda: [*(kind(3, return_sequences=True) for kind in ALL), layers.GRU(2, reset_after=False)],
    "backwards, without biases, unrolled": lambda: [
        *(kind(2, go_backwards=True, return_sequences=True) for kind in ALL),
        *(kind(2, unroll=True, use_bias=False) for kind in ALL),
        layers.GRU(2, unroll=True, reset_after=False, use_bias=False),
        layers.LSTM(2, implementation=1, activation="softsign", recurrent_activation="hard_sigmoid"),
    ],
    "wrappers": lambda: [
        layers.Bidirectional(layers.LSTM(2, return_sequences=True)),
        layers.Bidirectional(layers.GRU(2), merge_mode="mul"),
        layers.TimeDistributed(layers.Dense(3, "tanh")),
        layers.RNN(layers.LSTMCell(2), return_sequences=True),
        layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)], return_sequences=True, go_backwards=True),
    ],
    "states": lambda: [FromAState(*(kind(2, return_sequences=True, return_state=True) for kind in ALL))],
    "cells by hand": lambda: [ByHand(layers.LSTMCell(2), layers.GRUCell(2), layers.SimpleRNNCell(2))],
}


@pytest.mark.parametrize(("name", "b"), zip(PARTS, itertools.cycle([1, 2])))
def test_rows_are_those_of_one_group_at_a_time(backend, rng, name, b):
    exact(backend, rng, branched((4, 3), PARTS[name]()), b)


def exact(backend, rng, model, b, x=None):
    count = 3
    x = rng.normal(size=(count * b + 1, *model.input_shape[1:])).astype("float32") if x is None else x
    y = rng.normal(size=(len(x), *model.output_shape[1:])).astype("float32")
    for layer in model.layers:
        for variable in layer.trainable_variables:
            if "bias" in variable.path:
                variable.assign(rng.normal(size=variable.shape))
    model.compile(loss="mse")
    grads, targets, trusted = sample(backend, model, (x, y), count, b=b)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), count, b), targets)
    assert trusted == (True if CAPTURES else None)


@pytest.mark.parametrize(("kind", "zeros"), [(layers.LSTM, False), (layers.GRU, True), (layers.SimpleRNN, False)])
def test_masked_times(backend, rng, kind, zeros):
    """At the beginning, amid and at the end."""
    inputs = layers.Input((5, 3))
    masked = layers.Masking()(inputs)
    options = {"return_sequences": True, "zero_output_for_mask": zeros}
    if kind is layers.SimpleRNN and NAME == "jax" and not zeros:
        options.pop("zero_output_for_mask")
    outputs = kind(2, return_state=True, **options)(masked)
    again = kind(2, go_backwards=True)(outputs[0])
    state = FromAState(kind(2, return_sequences=True, return_state=True))(inputs, mask=masked._keras_mask)
    model = keras.Model(inputs, layers.Concatenate()([*map(layers.Flatten(), outputs), again, state]))
    x = rng.normal(size=(7, 5, 3)).astype("float32")
    x[0, :2] = x[1, 2] = x[2, 3:] = x[3, :1] = x[4, 1:3] = x[5, 4:] = 0.0
    exact(backend, rng, model, 2, x)


def test_convolutional_recurrence(backend, rng):
    parts = [
        layers.ConvLSTM1D(2, 3, padding="same", return_sequences=True),
        layers.ConvLSTM1D(2, 2, strides=2),
        layers.ConvLSTM1D(2, 3, dilation_rate=2, go_backwards=True, use_bias=False),
    ]
    exact(backend, rng, branched((3, 7, 2), parts), 2)
    exact(backend, rng, branched((3, 5, 4, 2), [layers.ConvLSTM2D(2, (3, 2), padding="same")]), 1)
    if NAME != "tensorflow":  # It has channels_first convolutions on GPUs only.
        exact(backend, rng, branched((3, 2, 5), [layers.ConvLSTM1D(2, 3, data_format="channels_first")]), 1)


def test_layers_that_remember_begin_anew(backend):
    """With batches of any size, here 3 and 9, though theirs is fixed, and what they remember stays."""
    x, y = (np.random.default_rng(0).normal(size=(9, *shape)).astype("float32") for shape in ((4, 3), (2,)))
    found = []
    for stateful in (True, False):
        keras.utils.set_random_seed(0)
        parts = [layers.LSTM(3, return_sequences=True, stateful=stateful), layers.GRU(2, stateful=stateful)]
        model = keras.Sequential([layers.Input(batch_shape=(6 if stateful else None, 4, 3)), *parts])
        model.compile("sgd", "mse")
        if stateful:
            model(x[:6])
            states = [ops.convert_to_numpy(state) for part in parts for state in part.states]
            assert all(state.any() for state in states)
        found.append(sample(backend, model, (x, y), 3, b=3))
        if stateful:
            assert all(part.stateful for part in parts)
            for state, before in zip((state for part in parts for state in part.states), states, strict=True):
                np.testing.assert_array_equal(ops.convert_to_numpy(state), before)
    assert_rows(found[0][0], found[1][0], found[0][1])
    assert found[0][2] == found[1][2]


def test_what_runs_through_time_is_run_once_for_all_groups(backend, rng):
    """Not once a group, beside the two groups that are compared."""
    calls = []

    class Counted(layers.Layer):
        def call(self, x):
            calls.append(x.shape[0])
            return x + 0.0

    model = chain((4, 3), Counted(), layers.LSTM(3, return_sequences=True), layers.GRU(2))
    model.compile(loss="mse")
    x, y = rng.normal(size=(20, 4, 3)).astype("float32"), rng.normal(size=(20, 2)).astype("float32")
    calls.clear()
    sample(backend, model, (x, y), 20)
    assert len(calls) <= 4
    assert np.max(calls) >= (20 if CAPTURES else 1)
