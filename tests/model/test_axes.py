"""The weight order, held against PyTorch: a layer's output is that of PyTorch's operator with the flat weights."""

import keras
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keras import layers, ops

from keras_woodfisher.model.targets import all_targets, find_targets


def first(x):
    """Channels last to channels first."""
    return torch.tensor(np.moveaxis(x, -1, 1))


def last(y):
    return np.moveaxis(y.numpy(), 1, -1)


def conv(rank, *shape, **kwargs):
    operator = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    return lambda x, w: last(operator(first(x), w["kernel"].reshape(shape), **kwargs))


def transposed(rank, out, into, *kernel):
    # PyTorch alone puts the input axis of a transposed convolution first.
    operator = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
    return lambda x, w: last(operator(first(x), w["kernel"].reshape(out, into, *kernel).transpose(0, 1)))


def separable(rank, into, multiplier, out, *kernel):
    operator = {1: F.conv1d, 2: F.conv2d}[rank]

    def expected(x, w):
        between = operator(first(x), w["depthwise_kernel"].reshape(into * multiplier, 1, *kernel), groups=into)
        return last(operator(between, w["pointwise_kernel"].reshape(out, into * multiplier, *[1] * rank)))

    return expected


def linear(out, into):
    return lambda x, w: F.linear(torch.tensor(x), w["kernel"].reshape(out, into)).numpy()


def einsum(equation, *shape):
    """`shape` are the output axes, then the input axes."""
    return lambda x, w: torch.einsum(equation, torch.tensor(x), w["kernel"].reshape(shape)).numpy()


CASES = [
    (layers.Dense(3), (4,), linear(3, 4)),
    (layers.Dense(3), (5, 4), linear(3, 4)),
    (layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (5, 4), einsum("btc,hkc->bthk", 2, 3, 4)),
    (layers.EinsumDense("abcd,cde->abe", (None, 4)), (5, 2, 3), einsum("bthk,ehk->bte", 4, 2, 3)),
    (layers.EinsumDense("...x,xy->...y", 3), (5, 4), linear(3, 4)),
    (layers.EinsumDense("ab,cb->ac", 3), (4,), linear(3, 4)),
    # One kernel a position: the position is an output axis too, though it is in the input.
    (layers.EinsumDense("abt,btc->atc", (5, 3)), (4, 5), einsum("abt,tcb->atc", 5, 3, 4)),
    (layers.Conv1D(3, 2), (6, 4), conv(1, 3, 4, 2)),
    (layers.Conv2D(3, (2, 3)), (5, 6, 4), conv(2, 3, 4, 2, 3)),
    (layers.Conv2D(6, (2, 3), groups=2), (5, 6, 4), conv(2, 6, 2, 2, 3, groups=2)),
    (layers.Conv3D(2, (1, 2, 3)), (3, 4, 5, 3), conv(3, 2, 3, 1, 2, 3)),
    (layers.Conv1DTranspose(3, 2), (4, 5), transposed(1, 3, 5, 2)),
    (layers.Conv2DTranspose(3, (2, 3)), (4, 5, 2), transposed(2, 3, 2, 2, 3)),
    (layers.Conv3DTranspose(2, (1, 2, 3)), (2, 3, 3, 3), transposed(3, 2, 3, 1, 2, 3)),
    (layers.DepthwiseConv1D(3), (6, 4), conv(1, 4, 1, 3, groups=4)),
    (layers.DepthwiseConv2D((2, 3), depth_multiplier=2), (5, 6, 3), conv(2, 6, 1, 2, 3, groups=3)),
    (layers.SeparableConv1D(5, 3, depth_multiplier=2), (6, 3), separable(1, 3, 2, 5, 3)),
    (layers.SeparableConv2D(5, (2, 3), depth_multiplier=2), (5, 6, 3), separable(2, 3, 2, 5, 2, 3)),
]


def fresh(layer):
    """A copy without a bias; zeros to begin with, since random initialisers take long to compile on JAX."""
    config = layer.get_config()
    zeros = {key: "zeros" for key in config if key.endswith("_initializer")}
    return type(layer).from_config(config | zeros | ({"use_bias": False} if "use_bias" in config else {}))


class Holder(keras.Model):
    """A built model around one layer that has been called."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer
        self.built = True


def prunable_names(layer):
    return [t.variable.name for t in find_targets(Holder(layer), "__ALL_PRUNABLE__")]


def flat_weights(layer):
    """Random weights in the layer; returns them as `Target` lays them out."""
    rng = np.random.default_rng(0)
    flat = {}
    for target in all_targets(Holder(layer)):
        values = rng.normal(size=target.size).astype("float32")
        target.write(values)
        flat[target.variable.name] = torch.tensor(values)
    return flat


@pytest.mark.parametrize(("layer", "shape", "expected"), CASES, ids=lambda c: getattr(c, "name", ""))
def test_kernels(layer, shape, expected, rng):
    layer = fresh(layer)
    x = rng.normal(size=(2, *shape)).astype("float32")
    layer(x)
    weights = flat_weights(layer)
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected(x, weights), rtol=1e-4, atol=1e-5)
    assert set(prunable_names(layer)) == set(weights)


def test_embedding(rng):
    layer = layers.Embedding(5, 3)
    tokens = rng.integers(0, 5, (2, 4))
    layer(tokens)
    weights = flat_weights(layer)["embeddings"].reshape(5, 3)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(tokens)), F.embedding(torch.tensor(tokens), weights).numpy(), rtol=1e-6
    )


def test_the_output_half_of_a_reversible_embedding(rng):
    layer = layers.ReversibleEmbedding(5, 3, tie_weights=False)
    layer(rng.integers(0, 5, (2, 4)))
    weights = flat_weights(layer)
    hidden = rng.normal(size=(2, 3)).astype("float32")
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(hidden, reverse=True)),
        F.linear(torch.tensor(hidden), weights["reverse_embeddings"].reshape(5, 3)).numpy(),
        rtol=1e-4,
        atol=1e-5,
    )


def recurrent(kind, weights, gates):
    """A PyTorch layer of 3 units with Keras's flat weights, its gates in PyTorch's order."""
    layer = kind(4, 3, batch_first=True)
    rows = np.concatenate([np.arange(3) + 3 * gate for gate in gates])
    with torch.no_grad():
        layer.weight_ih_l0.copy_(weights["kernel"].reshape(-1, 4)[rows])
        layer.weight_hh_l0.copy_(weights["recurrent_kernel"].reshape(-1, 3)[rows])
        layer.bias_ih_l0.zero_()
        layer.bias_hh_l0.zero_()
    return layer


@pytest.mark.parametrize(
    ("kind", "twin", "gates"),
    [
        (layers.SimpleRNN, torch.nn.RNN, (0,)),
        (layers.LSTM, torch.nn.LSTM, (0, 1, 2, 3)),
        # Keras has the update gate first, PyTorch the reset gate.
        (layers.GRU, torch.nn.GRU, (1, 0, 2)),
    ],
)
def test_recurrent_layers(kind, twin, gates, rng):
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    layer = fresh(kind(3))
    layer(x)
    with torch.no_grad():
        expected = recurrent(twin, flat_weights(layer), gates)(torch.tensor(x))[0][:, -1].numpy()
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, rtol=1e-4, atol=1e-5)
    assert prunable_names(layer) == ["kernel", "recurrent_kernel"]


def test_conv_lstm(rng):
    x = rng.normal(size=(2, 3, 5, 6, 2)).astype("float32")
    layer = fresh(layers.ConvLSTM2D(3, (1, 3), padding="same", recurrent_activation="sigmoid"))
    layer(x)
    weights = flat_weights(layer)
    kernel = weights["kernel"].reshape(12, 2, 1, 3)
    recurrent_kernel = weights["recurrent_kernel"].reshape(12, 3, 1, 3)
    hidden = cell = torch.zeros(2, 3, 5, 6)
    for step in range(3):
        z = F.conv2d(first(x[:, step]), kernel, padding="same") + F.conv2d(hidden, recurrent_kernel, padding="same")
        i, f, c, o = z.chunk(4, dim=1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(c)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), last(hidden), rtol=1e-4, atol=1e-5)
    assert prunable_names(layer) == ["kernel", "recurrent_kernel"]


def test_attention_units_are_contiguous(rng):
    """One head's one dimension is one run of the query kernel; the output projection's unit is a run of its own."""
    attention = layers.MultiHeadAttention(num_heads=2, key_dim=3, kernel_initializer="zeros")
    x = rng.normal(size=(1, 4, 5)).astype("float32")
    attention(x, x)
    targets = {t.layer.name: t for t in all_targets(Holder(attention)) if t.variable.name == "kernel"}
    assert set(targets) == {"query", "key", "value", "attention_output"}
    for name, runs, length in (("query", 6, 5), ("attention_output", 5, 6)):
        target = targets[name]
        probe = rng.normal(size=(1, 4, 5) if name == "query" else (1, 4, 2, 3)).astype("float32")
        target.write(np.ones(target.size, "float32"))
        before = ops.convert_to_numpy(target.layer(probe)).reshape(4, -1)
        for place in range(target.size):
            weights = np.ones(target.size, "float32")
            weights[place] = 2.0
            target.write(weights)
            changed = np.abs(ops.convert_to_numpy(target.layer(probe)).reshape(4, -1) - before).max(axis=0) > 1e-6
            assert np.flatnonzero(changed).tolist() == [place // length]
        assert target.size == runs * length


def test_bidirectional_has_both_directions(rng):
    model = keras.Sequential([keras.Input((5, 4)), layers.Bidirectional(fresh(layers.GRU(3)))])
    targets = find_targets(model, "__ALL_PRUNABLE__")
    assert [(t.variable.name, t.order) for t in targets] == [("kernel", (1, 0)), ("recurrent_kernel", (1, 0))] * 2
    assert len({id(t.variable) for t in targets}) == 4


@pytest.mark.parametrize("case", range(len(CASES)))
def test_flatten_and_unflatten(case, rng):
    layer, shape, _ = CASES[case]
    # A bias too, which has one axis only.
    bias = {"bias_axes": "c"} if isinstance(layer, layers.EinsumDense) and layer.equation.endswith("c") else {}
    config = fresh(layer).get_config() | ({"use_bias": True} if hasattr(layer, "use_bias") else bias)
    model = keras.Sequential([keras.Input(shape), type(layer).from_config(config)])
    for target in all_targets(model):
        shape = tuple(target.variable.shape)
        array = rng.normal(size=(3, *shape)).astype("float32")
        flat = target.flatten(array)
        assert flat.shape == (3, target.size)
        for one, row in zip(array, flat, strict=True):
            np.testing.assert_array_equal(target.flatten(one), row)
            np.testing.assert_array_equal(target.unflatten(row), one)
        target.write(flat[1])
        np.testing.assert_array_equal(ops.convert_to_numpy(target.variable), array[1])
        np.testing.assert_array_equal(target.read(), flat[1])
