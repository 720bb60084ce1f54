"""What is held out of data: never sampled again, and no more than was asked for, whatever holds the examples."""

import itertools
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.model.examples import open_examples

ROWS = 23


@pytest.fixture
def arrays():
    """Row k of x and y tells that it is row k."""
    rows = np.arange(ROWS, dtype="float32")
    return rows[:, None] * np.ones(3, "float32"), np.arange(ROWS, dtype="int32")


def batches(parts, size=7):
    return [tuple(part[start : start + size] for part in parts) for start in range(0, len(parts[0]), size)]


class Batches(keras.utils.PyDataset):
    def __init__(self, parts):
        super().__init__()
        self.batches = batches(parts)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def shuffled(parts):
    """Gives the examples in another order at each reading, as `tf.data` and loaders that shuffle do."""
    rng = np.random.default_rng(3)

    def make():
        order = rng.permutation(len(parts[0]))
        return batches([part[order] for part in parts])

    return make


def endless(once):
    return lambda: itertools.chain.from_iterable(once() for _ in itertools.count())


def kinds(parts):
    """Every kind of data, with the rows in order or not, and over and over again."""
    dataset = tf.data.Dataset.from_tensor_slices(parts)
    tensors = torch.utils.data.TensorDataset(*map(torch.tensor, parts))
    return {
        "arrays": parts,
        "dataset": dataset.batch(7),
        "dataset, shuffled": dataset.shuffle(len(parts[0]), seed=1).batch(7),
        "dataset, endless": dataset.batch(7).repeat(),
        "loader": torch.utils.data.DataLoader(tensors, batch_size=7),
        "loader, shuffled": torch.utils.data.DataLoader(tensors, batch_size=7, shuffle=True),
        "pydataset": Batches(parts),
        "callable": lambda: iter(batches(parts)),
        "callable, shuffled": shuffled(parts),
        "callable, endless": endless(lambda: batches(parts)),
        "callable, endless and shuffled": endless(shuffled(parts)),
    }


KINDS = list(kinds((np.zeros((ROWS, 1), "float32"),)))
FINITE = [kind for kind in KINDS if "endless" not in kind]


def labels_of(examples, number, seed=0):
    return [int(row) for _, y, _ in examples.groups(number, 1, seed) for row in y[:, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_examples_are_left_out_wherever_they_come_up(arrays, kind):
    held, rest = open_examples(kinds(arrays)[kind]).hold_out(9, 0)
    rows = {int(row) for _, y, _ in held for row in y}
    assert len(rows) == sum(len(y) for _, y, _ in held) == 9
    for seed in range(3):
        found = labels_of(rest, ROWS if kind in FINITE else 3 * ROWS, seed)
        assert set(found) == set(range(ROWS)) - rows
        assert len(found) == (ROWS - 9 if kind in FINITE else 3 * ROWS)


@pytest.mark.parametrize("kind", FINITE)
def test_examples_are_held_out_again(arrays, kind):
    held, rest = open_examples(kinds(arrays)[kind]).hold_out(9, 0)
    again, left = rest.hold_out(4, 1)
    rows, more = ({int(row) for _, y, _ in part for row in y} for part in (held, again))
    assert len(more) == 4 and not more & rows
    assert sorted(labels_of(left, ROWS)) == sorted(set(range(ROWS)) - rows - more)


@pytest.mark.parametrize("kind", KINDS)
def test_of_rows_with_the_same_content_as_many_are_left_out_as_were_held_out(kind):
    """Content 0 comes 60 times, 1 to 5 12 times each."""
    y = np.random.default_rng(0).permutation(np.repeat([0, 0, 0, 0, 0, 1, 2, 3, 4, 5], 12)).astype("int32")
    held, rest = open_examples(kinds((y[:, None].astype("float32"), y))[kind]).hold_out(12, 0)
    aside = Counter(int(row) for _, part, _ in held for row in part)
    assert aside.total() == 12
    for seed in range(3):
        found = Counter(labels_of(rest, 108, seed))
        assert found.total() == 108
        if kind in FINITE:
            assert found + aside == Counter(y.tolist())
        assert found[0] > 30


def test_a_stream_in_order_gives_the_rows_after_those_that_are_held_out():
    y = np.arange(40, dtype="int32") % 4
    _, rest = open_examples(lambda: iter(batches((y[:, None], y), 5))).hold_out(6, 0)
    assert labels_of(rest, 100) == y[6:].tolist()


@pytest.mark.parametrize("rows", [1, 5])
def test_a_stream_that_comes_round_within_what_is_held_out(rows):
    y = np.arange(rows, dtype="int32")
    _, rest = open_examples(endless(lambda: [(y[:, None], y)])).hold_out(9, 0)
    assert len(labels_of(rest, 12)) == 12


@pytest.mark.parametrize("count", [ROWS, ROWS + 5])
@pytest.mark.parametrize("kind", FINITE)
def test_something_has_to_be_left_when_examples_are_held_out(arrays, count, kind):
    data = kinds(arrays)[kind]
    with pytest.raises(ValueError, match=f"calibration={count} sets aside {count} examples, but data holds {ROWS}"):
        open_examples(data).hold_out(count, 0)
    assert open_examples(data).hold_out(ROWS - 1, 0)[0]


def test_arrays_are_not_copied_to_hold_some_out(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(60, dtype="float32").reshape(20, 3))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    _, rest = open_examples((x, np.zeros(20, "int32"))).hold_out(5, 0)
    assert np.shares_memory(rest._batch[0], x)
    assert rest.available == 15


def test_few_contents_prune_alike_whatever_holds_them(recwarn):
    """Binary features: a few contents, each many times."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (200, 3)).astype("float32")
    parts = x, (x.sum(1) % 2).astype("int32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((3,)), layers.Dense(8, "tanh"), layers.Dense(2)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    weights, outcomes = model.get_weights(), {}
    for kind in ("arrays", "dataset", "loader", "pydataset", "callable", "callable, endless"):
        model.set_weights(weights)
        options = {"stages": 1, "num_grads": 40, "grad_batch_size": 4, "calibration": 40, "newton_steps": 0}
        report = kw.prune(model, kinds(parts)[kind], 0.5, verbose=0, **options)
        assert (report.samples, report.sparsity) == (40, 0.5)
        outcomes[kind] = model.get_weights()
    # Streams in the same order give the same examples.
    for kind in ("loader", "pydataset", "callable"):
        for one, other in zip(outcomes[kind], outcomes["dataset"], strict=True):
            np.testing.assert_array_equal(one, other)
    assert not [str(w.message) for w in recwarn if "gradient samples" in str(w.message)]
