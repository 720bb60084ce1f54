"""When a faster way than one group of examples at a time is used, and that the user is told when it isn't."""

import warnings

import keras
import numpy as np
import pytest
from gathering import gathered
from keras import layers, ops
from sampling import (
    CAPTURES,
    NAME,
    SEED,
    assert_rows,
    chain,
    collect,
    mean_square,
    sample,
    source_of,
    truth_of,
)

import keras_woodfisher as kw


class HalfCentred(layers.Layer):
    """Looks at the other examples, though a batch of one tells nothing from it."""

    def call(self, x):
        return 2.0 * x - ops.mean(x, axis=0, keepdims=True)


def test_a_layer_that_mixes_examples_is_never_captured(backend, rng):
    model = chain((4,), layers.Dense(3, "tanh"), HalfCentred(), layers.Dense(2))
    model.compile(loss="mse")
    x, y = rng.normal(size=(40, 4)).astype("float32"), rng.normal(size=(40, 2)).astype("float32")
    grads, targets, trusted = sample(backend, model, (x, y), 40)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 40), targets)
    assert trusted == (False if CAPTURES else None)


class Folded(layers.Layer):
    """Calls a Dense on tensors whose first axis isn't that of the examples."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, "tanh")

    def build(self, shape):
        self.dense.build((None, shape[-1]))

    def call(self, x):
        y = self.dense(ops.reshape(x, (-1, x.shape[-1])))
        return ops.reshape(y, (-1, x.shape[1] * 3))


def test_examples_that_are_folded_into_rows(backend, rng):
    model = chain((2, 4), Folded())
    model.compile(loss="mse")
    x, y = rng.normal(size=(6, 2, 4)).astype("float32"), rng.normal(size=(6, 6)).astype("float32")
    grads, targets, trusted = sample(backend, model, (x, y), 6)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 6), targets)
    assert trusted == (True if CAPTURES else None)


class TimeMajor(Folded):
    """The same, with the examples in another order."""

    def call(self, x):
        y = self.dense(ops.reshape(ops.swapaxes(x, 0, 1), (-1, x.shape[-1])))
        y = ops.swapaxes(ops.reshape(y, (x.shape[1], -1, 3)), 0, 1)
        return ops.reshape(y, (-1, x.shape[1] * 3))


class Tied(layers.Layer):
    """Uses a Dense layer's kernel behind its back."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, "tanh", name="dense_of_tied")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return ops.matmul(self.dense(x), ops.transpose(self.dense.kernel))


@pytest.mark.parametrize("part", [TimeMajor, Tied])
def test_a_layer_that_capture_cant_follow_is_run_again(backend, rng, part):
    model = chain((2, 4), part())
    model.compile(loss="mse")
    x = rng.normal(size=(6, 2, 4)).astype("float32")
    y = rng.normal(size=(6, model.output_shape[1])).astype("float32")
    grads, targets, trusted = sample(backend, model, (x, y), 6)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 6), targets)
    assert trusted == (False if CAPTURES else None)


def test_confident_examples_dont_spoil_the_fast_way(backend, rng):
    # Gradients of examples that the model is sure of are rounding: they differ between any two ways.
    model = chain((4,), layers.Dense(3, "tanh", name="hidden"), layers.Dense(3, name="out"))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = rng.normal(size=(20, 4)).astype("float32")
    model.layers[-2].kernel.assign(30.0 * rng.normal(size=(3, 3)))
    logits = ops.convert_to_numpy(model(x))
    y = logits.argmax(1)
    y[5] = logits[5].argmin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows may be exactly zero
        _, _, trusted = sample(backend, model, (x, y), 20)
    assert trusted == (True if CAPTURES else None)


def test_layers_that_make_it_slow_are_named(backend, rng):
    inputs = layers.Input((4, 3))
    x = layers.RNN(OwnCell(3), name="memory", return_sequences=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(Own(4, name="own")(x))))
    model.compile(loss="mse")
    x, y = rng.normal(size=(6, 4, 3)).astype("float32"), rng.normal(size=(6, 2)).astype("float32")
    source, targets = source_of(backend, model, (x, y), 4, params="__ALL__", exclude=["re:.*bias"])
    grads = collect(source, targets, 4, backend)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 4), targets)
    if CAPTURES:
        assert source.slow_layers.names == ("memory/own_cell", "own")
        assert "no faster way is known for layers of this kind" in str(source.slow_layers)
    else:
        assert source.slow_layers is None  # on JAX there is one way for all


class Own(layers.Layer):
    """A layer with a kernel of its own."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, x):
        return ops.tanh(ops.matmul(x, self.kernel))


class OwnCell(layers.SimpleRNNCell):
    """A subclass, whose call does otherwise."""

    def call(self, x, states, training=False):
        output = ops.tanh(ops.matmul(x, self.kernel) - 0.5 * ops.matmul(states[0], self.recurrent_kernel))
        return output, [output]


def test_layers_whose_gradients_come_out_differently_are_named(backend, rng):
    model = chain((2, 4), layers.Dense(4, name="fine"), Tied(name="tied"))
    model.compile(loss="mse")
    x = rng.normal(size=(6, 2, 4)).astype("float32")
    y = rng.normal(size=(6, model.output_shape[1])).astype("float32")
    source, targets = source_of(backend, model, (x, y), 6)
    collect(source, targets, 6, backend)
    if CAPTURES:
        assert source.slow_layers.names == ("tied/dense_of_tied",)
        assert "gradients come out differently" in source.slow_layers.reason


class Fails(layers.Layer):
    """Does only what one example at a time can do."""

    def call(self, x):
        if x.shape[0] != 1:
            raise NotImplementedError("one at a time")
        return x + 0.0


def test_a_model_that_takes_one_example_only(backend, rng):
    model = OneAtATime()
    x, y = rng.normal(size=(6, 4)).astype("float32"), rng.normal(size=(6, 3)).astype("float32")
    model(x[:1])
    model.compile(loss="mse")
    source, targets = source_of(backend, model, (x, y), 5)
    grads = collect(source, targets, 5, backend)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 5), targets)
    if CAPTURES:
        assert source.slow_layers.names == (f"{model.name}/only",)
        assert source.slow_layers.reason == "the faster way failed with NotImplementedError"


class OneAtATime(keras.Model):
    def __init__(self):
        super().__init__()
        self.fails = Fails()
        self.only = layers.Dense(3, name="only")

    def call(self, x):
        return self.only(self.fails(x))


def test_an_update_tells(backend, rng, capsys):
    model = chain((4,), Own(3, name="own"), layers.Dense(2))
    model.compile(loss="mse")
    x, y = rng.normal(size=(6, 4)).astype("float32"), rng.normal(size=(6, 2)).astype("float32")
    options = {"data": (x, y), "params": ["re:.*kernel"], "quality": "fast", "num_grads": 6}
    kw.prune(model, sparsity=0.5, verbose=0, **options)
    assert "one sample at a time" not in capsys.readouterr().out
    kw.prune(model, sparsity=0.6, verbose=2, **options)
    told = "WoodFisher pruning: gradients of own are taken one sample at a time: no faster way is known"
    assert (told in capsys.readouterr().out) == CAPTURES


def test_a_layer_keeps_the_call_that_a_user_gave_it(rng):
    model = chain((4,), layers.Dense(3), layers.Dense(2))
    model.compile(loss="mse")
    layer = model.layers[0]
    plain = layer.call
    layer.call = lambda inputs, training=None: 2.0 * plain(inputs)
    given = vars(layer)["call"]
    x, y = rng.normal(size=(6, 4)).astype("float32"), rng.normal(size=(6, 2)).astype("float32")
    kw.prune(model, data=(x, y), sparsity=0.5, quality="fast", num_grads=6, verbose=0)
    assert vars(layer)["call"] is given


def test_the_dry_run_tells(rng):
    model = chain((4,), Own(3, name="own"), layers.Dense(2))
    model.compile(loss="mse")
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")
    fields = {"init_sparsity": 0.1, "final_sparsity": 0.5, "end_epoch": 2.0, "update_frequency": 1.0, "num_grads": 8}
    recipe = kw.load_recipe(
        {"modifiers": [{"MFACPruningModifier": {"start_epoch": 0.0, "params": ["re:.*kernel"], **fields}}]}
    )
    found = kw.check_recipe(recipe, model, 5, data=(x, y), verbose=0)
    (entry,) = found.modifiers
    assert not found.problems
    assert ("gradients of own are taken one sample at a time: no faster way" in str(found)) == CAPTURES
    as_data = found.as_dict()["modifiers"][0]["slow_layers"]
    assert as_data == ({"names": ["own"], "reason": entry.slow_layers.reason} if CAPTURES else None)
    plain = chain((4,), layers.Dense(3), layers.Dense(2))
    plain.compile(loss="mse")
    assert kw.check_recipe(recipe, plain, 5, data=(x, y), verbose=0).modifiers[0].slow_layers is None


def counting_layer():
    """A layer that counts how often it is run by Python: on TensorFlow and JAX, how often it is traced."""

    class Counting(layers.Layer):
        runs = 0

        def call(self, x):
            type(self).runs += 1
            return x + 0.0

    return Counting


@pytest.mark.filterwarnings("ignore:.*were dropped:UserWarning")
@pytest.mark.parametrize("b", [1, 2])
def test_later_updates_compile_nothing(backend, blobs, b):
    kind = counting_layer()
    model = keras.Sequential([layers.Input((12,)), layers.Dense(8, "relu"), kind(), layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    source, targets = source_of(backend, model, blobs, 20, b=b)
    kept = [np.ones(t.size, bool) for t in targets]
    gathered(source, kept, 20, chunk=20)
    runs = kind.runs
    for draw, rows in ((1, 20), (2, 7), (3, 40)):
        for target, mask in zip(targets, kept, strict=True):
            mask[: target.size // 3] = False
            target.write(np.where(mask, target.read(), 0.0))
        # Examples that no unit answers to any more have no gradient.
        assert rows // 2 < len(gathered(source, kept, rows, draw, chunk=20)) <= rows
    assert kind.runs == runs or NAME == "torch"  # which runs eagerly: there is nothing to compile


@pytest.mark.parametrize("b", [1, 2])
def test_what_a_mask_hides_is_no_part_of_a_sample(backend, rng, b):
    """The first chunk hides nothing: a way that ignored masks would be trusted by it."""
    of = [layers.Embedding(9, 4, mask_zero=True), layers.Dense(3, "tanh"), layers.Dense(2)]
    model = keras.Sequential([layers.Input((None,), dtype="int32"), *of])
    model.compile(loss="mse")
    count, length = 100, 5
    order = np.random.default_rng(SEED).permutation(count * b)
    tokens = rng.integers(1, 9, (count * b, length)).astype("int32")
    for place in order[count * b * 4 // 5 :]:
        tokens[place, rng.integers(1, length) :] = 0
    y = rng.normal(size=(count * b, length, 2)).astype("float32") * (tokens != 0)[..., None].astype("float32")

    def masked(output, y):
        valid = ops.cast(y[..., 0] != 0, "float32")
        return ops.sum(valid * ops.mean((output - y) ** 2, -1)) / ops.sum(valid)

    grads, targets, trusted = sample(backend, model, (tokens, y), count, b=b)
    assert_rows(grads, truth_of(model, targets, masked, (tokens, y), count, b), targets, 2e-5)
    assert trusted == (True if CAPTURES else None)
