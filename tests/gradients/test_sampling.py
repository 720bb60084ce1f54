"""Gradient samples: chunks and streams, what is left as it was, rows that can't be used, new weights."""

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
    cross_entropy,
    mean_square,
    rows_of,
    sample,
    source_of,
    truth_of,
)

from keras_woodfisher.gradients.loss import ModelLoss
from keras_woodfisher.gradients.sampling import HalvingSampler, check_samples, sample_gradients, usable_rows
from keras_woodfisher.memory.store import MemoryStore
from keras_woodfisher.model.targets import find_targets


@pytest.mark.parametrize("b, count", [(1, 70), (3, 20)])
def test_rows_are_means_over_b_examples_whatever_the_chunks(backend, blobs, make_mlp, b, count):
    x, y = blobs
    model = make_mlp()
    grads, targets, trusted = sample(backend, model, blobs, count, b=b)
    assert_rows(grads, truth_of(model, targets, cross_entropy, (x, y), count, b), targets)
    assert trusted == (True if CAPTURES else None)


def test_streams_give_the_same_rows_in_their_order(backend, blobs, make_mlp):
    x, y = blobs
    model = make_mlp()
    for batch in (1, 7, 50):  # smaller and larger than a chunk

        def batches(batch=batch):
            return ((x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch))

        grads, targets, _ = sample(backend, model, batches, 40)
        truth = rows_of(model, targets, cross_entropy, [(x[[i]], y[[i]]) for i in range(40)])
        assert_rows(grads, truth, targets)


def test_small_batches_of_a_stream_share_a_chunk(backend, blobs, make_mlp):
    x, y = blobs
    source, targets = source_of(backend, make_mlp(), lambda: ((x[[i]], y[[i]]) for i in range(40)), 40)
    calls, original = [], backend.sampler

    class Counting:
        slow_layers = None
        chunk_groups = backend.chunk_groups
        outlined = backend.outlined

        def sampler(self, *args):
            self.sample = original(*args)
            return self

        def __call__(self, values, others, batch):
            calls.append(len(batch[0]))
            return self.sample(values, others, batch)

    source._backend = Counting()
    collect(source, targets, 40, backend)
    size = min(40, backend.chunk_groups(1))  # no more than the store takes at a time
    assert calls == [size] * -(-40 // size)


def test_sequences_of_different_lengths_are_never_mixed(backend, rng):
    inputs = layers.Input((None, 3))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(layers.Dense(2, "tanh")(inputs)))
    model.compile(loss="mse")
    batches = [rng.normal(size=(2, length, 3)).astype("float32") for length in (4, 4, 2, 5)]
    y = rng.normal(size=(2, 2)).astype("float32")
    grads, targets, _ = sample(backend, model, lambda: ((x, y) for x in batches), 8)
    truth = rows_of(model, targets, mean_square, [(x[[i]], y[[i]]) for x in batches for i in range(2)])
    assert_rows(grads, truth, targets)


class OwnConv(layers.Conv2D):
    """A subclass, whose call might do anything."""


class Noisy(layers.Layer):
    """Draws random numbers in inference mode too, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, x):
        self.calls.assign(self.calls + 1.0)
        return x + 0.0 * keras.random.normal(ops.shape(x), seed=self.seeds)


@pytest.mark.parametrize("kind", ["captured", "direct"])
def test_nothing_of_the_model_is_changed(backend, rng, kind):
    extra = [] if kind == "captured" else [OwnConv(2, 2)]
    model = keras.Sequential(
        [
            layers.Input((5, 5, 2)),
            layers.Conv2D(3, 2, activation=layers.ReLU()),
            layers.BatchNormalization(),
            Noisy(),
            *extra,
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = rng.normal(size=(8, 5, 5, 2)).astype("float32"), rng.integers(0, 3, 8)
    model.train_on_batch(x, y)
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    values = [np.copy(ops.convert_to_numpy(v)) for v in variables]
    attributes = [dict(vars(layer)) for layer in model._flatten_layers()]
    held = [layer.activation for layer in model.layers if hasattr(layer, "activation")]
    modes = [module.training for module in model.modules()] if NAME == "torch" else []
    grads_of_training = [v.value.grad for v in model.variables] if NAME == "torch" else []
    random_state = np.random.get_state()[1].copy()
    sample(backend, model, (x, y), 6)
    for variable, before in zip(variables, values, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), before, err_msg=variable.path)
    for layer, before in zip(model._flatten_layers(), attributes, strict=True):
        after = vars(layer)
        assert after.keys() == before.keys(), layer.name
        changed = [key for key in after if after[key] is not before[key] and not key.startswith("_losses")]
        assert not [key for key in changed if key in ("call", "activation", "_dtype_policy")], changed
    assert [layer.activation for layer in model.layers if hasattr(layer, "activation")] == held
    if NAME == "torch":
        assert [module.training for module in model.modules()] == modes
        assert all(v.value.grad is grad for v, grad in zip(model.variables, grads_of_training, strict=True))
    np.testing.assert_array_equal(np.random.get_state()[1], random_state)


def test_inference_mode_is_used(backend, rng):
    # In training mode dropout would zero and scale, so the rows would differ.
    model = chain((6,), layers.Dense(8, "tanh"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(2))
    model.layers[2].moving_mean.assign(rng.normal(size=8))
    model.compile(loss="mse")
    x, y = rng.normal(size=(5, 6)).astype("float32"), rng.normal(size=(5, 2)).astype("float32")
    grads, targets, _ = sample(backend, model, (x, y), 5)
    assert_rows(grads, truth_of(model, targets, mean_square, (x, y), 5), targets)


def test_zero_and_non_finite_rows_are_dropped_and_counted(backend, rng):
    model = chain((3,), layers.Dense(2, use_bias=False))
    model.compile(loss="mse")
    x, y = rng.normal(size=(8, 3)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")
    x[1] = 0.0
    x[4] = np.nan
    x[6] = np.inf
    source, targets = source_of(backend, model, (x, y), 8)
    with pytest.warns(UserWarning, match="3 of 8 gradient samples are zero or not finite and were dropped"):
        grads = collect(source, targets, 8, backend)
    order = [i for i in np.random.default_rng(SEED).permutation(8) if i not in (1, 4, 6)]
    assert_rows(grads, rows_of(model, targets, mean_square, [(x[[i]], y[[i]]) for i in order]), targets)


def test_no_usable_row_is_an_error(backend):
    model = chain((3,), layers.Dense(2))
    model.compile(loss="mse")
    source, targets = source_of(backend, model, (np.zeros((8, 3)), np.zeros((8, 2))), 8)
    with pytest.raises(ValueError, match="No usable gradient sample: 8 of 8 are zero or not finite"):
        collect(source, targets, 8, backend)


def test_data_that_run_out_are_reported(backend, blobs, make_mlp):
    x, y = blobs
    source, targets = source_of(backend, make_mlp(), lambda: iter([(x[:5], y[:5])]), 8)
    with pytest.warns(UserWarning, match="Only 5 of 8 gradient samples could be taken: the data ran out"):
        assert len(collect(source, targets, 8, backend)) == 5


def test_a_callable_that_gives_its_data_only_once(backend, blobs, make_mlp):
    once = iter([blobs])
    source, targets = source_of(backend, make_mlp(), lambda: once, 8)
    with pytest.raises(ValueError, match=r"data gave no example.*fresh iterator"):
        collect(source, targets, 8, backend)


def test_usable_rows_and_their_messages():
    rows = np.array([[0, 0], [1, np.nan], [np.inf, 1], [0, -1e-30], [-np.inf, np.nan]], np.float32)
    assert usable_rows(rows)[0].tolist() == [False, False, False, True, False]
    extremes = np.array([[1e30, -1e30], [1e-40, 0], [3e38, np.nan]], np.float32)
    good, squares = usable_rows(extremes)
    assert good.tolist() == [True, True, False]
    np.testing.assert_allclose(squares[good], [2e60, 1e-80], rtol=1e-4)
    for width in (0, 2):
        good, squares = usable_rows(np.empty((0, width), np.float32))
        assert good.shape == squares.shape == (0,)
    assert not usable_rows(np.empty((2, 0), np.float32))[0].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_samples(1, 0, 1)


def test_more_samples_than_data_says_what_fits(backend, blobs, make_mlp):
    source, _ = source_of(backend, make_mlp(), blobs, 50, b=2)
    with pytest.raises(
        ValueError, match=r"num_grads=50 with .*=2 needs 100 examples.*num_grads=48 or grad_batch_size=1 would"
    ):
        source.check(50)
    source, _ = source_of(backend, make_mlp(), lambda: iter([blobs]), 1, b=97)
    with pytest.raises(ValueError, match="data gives no group of grad_batch_size=97 examples: it holds fewer"):
        source.check(1)


def test_each_update_draws_other_examples(backend, blobs, make_mlp):
    source, targets = source_of(backend, make_mlp(), blobs, 10)
    first, again, other = (collect(source, targets, 10, backend, draw) for draw in (0, 0, 1))
    np.testing.assert_allclose(first, again, rtol=1e-4, atol=1e-7)
    assert np.abs(first - other).max() > 1e-2


def test_without_a_seed_each_source_draws_its_own(backend, blobs, make_mlp):
    model, rows = make_mlp(), []
    for _ in range(2):
        source, targets = source_of(backend, model, blobs, 10, seed=None)
        first, again = (collect(source, targets, 10, backend) for _ in range(2))
        np.testing.assert_allclose(first, again, rtol=1e-4, atol=1e-7)
        rows.append(first)
    assert np.abs(rows[0] - rows[1]).max() > 1e-2


def test_only_unpruned_weights_are_kept(backend, blobs, make_mlp):
    model = make_mlp()
    source, targets = source_of(backend, model, blobs, 6)
    full = collect(source, targets, 6, backend)
    rng = np.random.default_rng(3)
    kept = [rng.random(targets[0].size) < 0.5, np.zeros(targets[1].size, bool)]  # the second is pruned as a whole
    some = gathered(source, kept, 6)
    np.testing.assert_allclose(some, full[:, np.concatenate(kept)], rtol=1e-4, atol=1e-7)


def test_new_weights_are_seen_at_the_next_update(backend, blobs, make_mlp):
    model = make_mlp()
    source, targets = source_of(backend, model, blobs, 6)
    collect(source, targets, 6, backend)
    for target in targets:
        target.write(0.5 * target.read())
    grads = collect(source, targets, 6, backend)
    assert_rows(grads, truth_of(model, targets, cross_entropy, blobs, 6), targets)


def test_sample_gradients_counts_rows_not_padding(backend, blobs, make_mlp):
    model = make_mlp()
    targets = find_targets(model, "__ALL_PRUNABLE__")
    loss = ModelLoss(model, targets)
    sampler = HalvingSampler(loss, backend.sampler(loss, model, [t.variable for t in targets]), backend)
    x, y = blobs
    done = []
    groups = iter([(x[:3, None], y[:3, None], None), (x[3:40, None], y[3:40, None], None)])
    kept = [(t, np.ones(t.size, bool)) for t in targets]
    store = MemoryStore((40, sum(t.size for t in targets)), 40)
    sample_gradients(sampler, groups, kept, 40, store, done.append)
    assert sum(done) == len(store) == 40
