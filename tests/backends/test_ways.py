"""Which way each variable's gradients are taken: only layers that no rule knows are run again, group by group."""

import keras
import pytest
from keras import layers, ops
from sampling import CAPTURES, NAME, assert_rows, chain, collect, mean_square, sample, source_of, truth_of


class SubDense(layers.Dense):
    """A subclass that adds nothing to a gradient."""

    def call(self, x):
        return super().call(x) + 1.0


class Standardised(layers.Dense):
    """A subclass whose kernel is scaled first: its rule is wrong."""

    def call(self, x):
        return ops.matmul(x, self.kernel / ops.norm(self.kernel)) + self.bias


class ByName(layers.Layer):
    """Calls a layer by keyword."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(3, "tanh")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(inputs=x)


class Experts(layers.Layer):
    """Kernels of three axes, and outputs whose first axis is that of experts."""

    def build(self, shape):
        self.up = self.add_weight(shape=(2, shape[-1], 5), name="up")

    def call(self, x):
        return ops.einsum("th,ehm->etm", x, self.up)


class Mixture(layers.Layer):
    """Examples are folded into rows within it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.router = layers.Dense(2, name="router")
        self.experts = Experts(name="experts")

    def build(self, shape):
        self.router.build(shape)
        self.experts.build(shape)

    def call(self, x):
        rows = ops.reshape(x, (-1, x.shape[-1]))
        mixed = ops.einsum("etm,te->tm", ops.tanh(self.experts(rows)), ops.softmax(self.router(rows)))
        return ops.reshape(mixed, (-1, x.shape[1], 5))


# Parts of a model, and the names of the layers that are run again.
CASES = {
    "subclass": ([SubDense(3, name="part")], ()),
    "subclass of another kernel": ([layers.Dense(4), Standardised(3, name="part")], ("part",)),
    "keyword": ([ByName(name="part"), layers.Dense(2)], ()),
    "experts": ([layers.Dense(4, "tanh"), Mixture(name="part"), layers.Dense(2)], ("part/experts",)),
}


@pytest.mark.parametrize("name", CASES)
def test_only_layers_without_a_rule_are_slow(backend, rng, name):
    parts, slow = CASES[name]
    model = chain((2, 4), *[type(part).from_config(part.get_config()) for part in parts])
    model.compile(loss="mse")
    x = rng.normal(size=(12, 2, 4)).astype("float32")
    y = rng.normal(size=(12, model.output_shape[1])).astype("float32")
    source, targets = source_of(
        backend, model, (x, y), 6, b=2, params=["re:.*kernel", "re:.*up"][: 1 + (name == "experts")]
    )
    grads = collect(source, targets, 6, backend)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 6, 2), targets)
    assert (source.slow_layers.names if source.slow_layers else ()) == (slow if CAPTURES else ())


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_used_both_ways(backend, rng, tied, cap):
    if not hasattr(layers, "ReversibleEmbedding"):
        pytest.skip("this Keras has no ReversibleEmbedding")
    inputs = layers.Input((3,), dtype="int32")
    words = layers.ReversibleEmbedding(7, 4, tie_weights=tied, logit_soft_cap=cap, name="words")
    hidden = layers.Dense(4, "tanh")(words(inputs))
    model = keras.Model(inputs, layers.Flatten()(words(hidden, reverse=True)))
    model.compile(loss="mse")
    x = rng.integers(0, 7, (9, 3)).astype("int32")
    y = rng.normal(size=(9, 21)).astype("float32")
    grads, targets, trusted = sample(backend, model, (x, y), 4, b=2, params=["re:.*embeddings", "re:.*kernel"])
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 4, 2), targets)
    assert trusted == (True if CAPTURES else None)


class Switched(layers.Layer):
    """A ReLU whose units sit where rounding decides, other ones by how many examples there are."""

    def call(self, x):
        return ops.relu(x - ops.stop_gradient(x) + (1e-9 if (x.shape[0] or 1) > 2 else -1e-9))


class Hidden(layers.Layer):
    """The same of outputs that differ: no switch, a layer that looks at the number of examples."""

    def call(self, x):
        return x * (1.01 if (x.shape[0] or 1) > 2 else 1.0)


@pytest.mark.skipif(NAME == "jax", reason="one way only")
@pytest.mark.parametrize(("part", "right"), [(Switched, True), (Hidden, False)])
def test_a_switched_relu_isnt_a_wrong_gradient(backend, rng, part, right):
    inputs = layers.Input((4,))
    hidden = layers.Dense(3, name="first")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="last")(layers.Concatenate()([hidden, part()(hidden)])))
    model.compile(loss="mse")
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")
    _, _, trusted = sample(backend, model, (x, y), 8)
    assert trusted == right
