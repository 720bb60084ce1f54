"""Tokens that an Embedding doesn't have are refused on each backend, by whoever reads inputs."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.model.tokens import check_tokens, token_inputs

RULE = r"data holds the token {}, but 'table' has 10 embeddings, for the tokens 0 to 9\. Use the tokens"


def encoder():
    return keras.Sequential(
        [layers.Input((6,), dtype="int32"), layers.Embedding(10, 4, name="table"), layers.Flatten()]
    )


class TokenAndPosition(layers.Layer):
    """As KerasHub has it."""

    def __init__(self):
        super().__init__()
        self.token_embedding, self.positions = layers.Embedding(10, 4, name="table"), layers.Embedding(6, 4)

    def call(self, x):
        return self.token_embedding(x) + self.positions(np.arange(6))


def by_name():
    """Tokens beside another input, looked up within an inner model."""
    tokens, other = layers.Input((6,), dtype="int32", name="tokens"), layers.Input((2,), name="other")
    joined = layers.Concatenate()([encoder()(tokens), other])
    return keras.Model({"tokens": tokens, "other": other}, layers.Dense(3)(joined))


def in_order():
    inputs = layers.Input((6,), dtype="int32")
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(TokenAndPosition()(inputs))))


def own_code():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner, self.last = encoder(), layers.Dense(3)

        def call(self, x):
            return self.last(self.inner(x % 10))

    model = Own()
    model(np.zeros((1, 6), "int32"))
    return model


@pytest.fixture(params=[by_name, in_order])
def model(request):
    made = request.param()
    made.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return made


def data(model, token, rng):
    tokens = rng.integers(0, 10, (24, 6))
    tokens[17, 3] = token
    x = {"tokens": tokens, "other": np.zeros((24, 2), "float32")} if len(model.inputs) > 1 else tokens
    return x, rng.integers(0, 3, 24)


ENTRIES = {
    "reconstruct": lambda model, x, y: kw.prune(model, x, 0.5, verbose=0),
    "woodfisher": lambda model, x, y: kw.prune(model, (x, y), 0.5, quality="fast", num_grads=24, verbose=0),
    "sensitivity": lambda model, x, y: kw.sensitivity(model, (x, y), levels=[0.5], num_grads=24, verbose=0),
    "each alone": lambda model, x, y: kw.sensitivity(model, (x, y), levels=[0.5], method="reconstruct", verbose=0),
    "callback": lambda model, x, y: model.fit(
        keras.tree.map_structure(np.zeros_like, x),
        y,
        callbacks=[kw.WoodFisherPruning(0.5, end_epoch=1, data=(x, y), num_grads=24, damp=1e-3, verbose=0)],
        verbose=0,
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_token_without_an_embedding_is_refused(model, entry, rng):
    for token in (10, -1):
        x, y = data(model, token, rng)
        with pytest.raises(ValueError, match=RULE.format(token)):
            ENTRIES[entry](model, x, y)
    ENTRIES[entry](model, *data(model, 9, rng))


def test_what_own_code_does_to_inputs_is_not_known(rng):
    model = own_code()
    assert token_inputs(model) == []
    kw.prune(model, rng.integers(0, 50, (24, 6)), 0.5, verbose=0)


def test_what_is_no_number_is_no_token(rng):
    x = np.array([[0.0, np.nan, 1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(ValueError, match=RULE.format("nan")):
        check_tokens(token_inputs(in_order()), x)
