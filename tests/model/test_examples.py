import itertools
import random

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import tree

import keras_woodfisher as kw
from keras_woodfisher.model.batches import cut_evenly
from keras_woodfisher.model.examples import open_examples, read_batches

ROWS = 23


@pytest.fixture
def arrays():
    """Row k of x, y and the weights tells that it is row k."""
    rows = np.arange(ROWS, dtype="float32")
    return rows[:, None] * np.ones(3, "float32"), np.arange(ROWS, dtype="int32"), rows / 10


def read(data, count, size, seed=0):
    """All groups as one batch: leaves (count, size, ...)."""
    chunks = list(open_examples(data).groups(count, size, seed))
    return tree.map_structure(lambda *leaves: None if leaves[0] is None else np.concatenate(leaves), *chunks)


def batches(parts, sizes):
    """Cuts arrays into batches of given sizes."""
    edges = np.cumsum([0, *sizes])
    return [tuple(part[a:b] for part in parts) for a, b in itertools.pairwise(edges)]


class Batches(keras.utils.PyDataset):
    """Reads batches of given sizes, and draws random numbers as an augmenting dataset does."""

    def __init__(self, parts, sizes):
        super().__init__()
        self.batches = batches(parts, sizes)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        random.random()
        np.random.rand()
        torch.rand(1)
        return self.batches[index]


class ReIterable:
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def kinds(parts):
    """Every kind of data that `fit` takes, with the rows in order."""
    sizes = (5, 5, 5, 5, 3)
    tensors = torch.utils.data.TensorDataset(*(torch.tensor(part) for part in parts))
    return {
        "dataset": tf.data.Dataset.from_tensor_slices(parts).batch(5),
        "loader": torch.utils.data.DataLoader(tensors, batch_size=5),
        "pydataset": Batches(parts, sizes),
        "callable": lambda: iter(batches(parts, sizes)),
        "callable with a generator": lambda: (batch for batch in batches(parts, sizes)),
        "callable with a list": lambda: batches(parts, sizes),
        "callable with a dataset": lambda: Batches(parts, sizes),
        "iterable": ReIterable(batches(parts, sizes)),
        "iterable of lists": ReIterable([list(batch) for batch in batches(parts, sizes)]),
        "iterable of tensors": ReIterable(
            [tuple(keras.ops.convert_to_tensor(p) for p in batch) for batch in batches(parts, sizes)]
        ),
    }


KINDS = list(kinds((np.zeros((ROWS, 1), "float32"),)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_streams_give_their_first_examples_in_order(kind, length, arrays):
    data = kinds(arrays[:length])[kind]
    for count, size in ((4, 1), (3, 4), (2, 7), (1, 20), (ROWS, 1)):
        x, y, weight = read(data, count, size)
        order = np.arange(count * size).reshape(count, size)
        np.testing.assert_array_equal(x, order[..., None] * np.ones(3))
        assert x.dtype == np.float32
        if length > 1:
            np.testing.assert_array_equal(y, order)
        if length > 2:
            np.testing.assert_allclose(weight, order / 10)
        assert (y is None, weight is None) == (length < 2, length < 3)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_start_afresh_each_time_and_may_run_out(kind, arrays):
    examples = open_examples(kinds(arrays)[kind])
    for _ in range(2):
        chunks = list(examples.groups(100, 4, 0))
        seen = np.concatenate([y.ravel() for _, y, _ in chunks])
        np.testing.assert_array_equal(seen, np.arange(ROWS // 4 * 4))


def test_how_many_examples_there_are(arrays):
    counts = {kind: open_examples(data).available for kind, data in kinds(arrays).items()}
    assert counts.pop("loader") == counts.pop("pydataset") == ROWS
    assert set(counts.values()) == {None}, "only reading would tell"
    assert open_examples(arrays).available == ROWS


def test_how_many_examples_a_loader_has(arrays):
    tensors = torch.utils.data.TensorDataset(torch.tensor(arrays[0]))
    loader = torch.utils.data.DataLoader

    def available(*args, **kwargs):
        return open_examples(loader(*args, **kwargs)).available

    assert available(tensors, batch_size=5, drop_last=True) == 20
    assert available(tensors, batch_size=5, sampler=torch.utils.data.SubsetRandomSampler(range(9))) == 9
    assert available(ReIterable([]), batch_size=5, sampler=torch.utils.data.RandomSampler(range(4))) == 4

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(5))

    assert available(Stream(), batch_size=5) is None
    # Each item of the dataset is a batch of unknown size.
    assert available(tensors, batch_size=None) is None


class Endless(keras.utils.PyDataset):
    def __init__(self, arrays):
        super().__init__()
        self.arrays = arrays

    num_batches = None

    def __getitem__(self, index):
        return tuple(a[index % ROWS : index % ROWS + 1] for a in self.arrays)


def test_endless_data_is_read_only_as_far_as_needed(arrays):
    endless = open_examples(Endless(arrays))
    assert endless.available is None
    assert sum(len(y) for _, y, _ in endless.groups(60, 1, 0)) == 60
    repeated = tf.data.Dataset.from_tensor_slices(arrays).batch(5).repeat()
    assert read(repeated, 40, 1)[1].size == 40


def test_no_more_batches_are_read_than_needed(arrays):
    taken = []

    def make():
        for batch in batches(arrays, (5,) * 4):
            taken.append(batch)
            yield batch

    read(make, 5, 2)
    assert len(taken) == 2


@pytest.mark.parametrize("seed", [0, 7, [3, 2]])
@pytest.mark.parametrize(("count", "size"), [(5, 1), (5, 4), (1, ROWS), (3, 7), (ROWS, 1)])
def test_arrays_are_drawn_by_numpys_permutation(seed, count, size, arrays):
    """The promise that makes samples the same on every backend."""
    rows = np.random.default_rng(seed).permutation(ROWS)[: count * size].reshape(count, size)
    x, y, weight = read(arrays, count, size, seed)
    np.testing.assert_array_equal(y, rows)
    np.testing.assert_array_equal(x, rows[..., None] * np.ones(3))
    np.testing.assert_allclose(weight, rows / 10)


def test_without_a_seed_each_draw_is_another(arrays):
    draws = {tuple(read(arrays, ROWS, 1, None)[1].ravel()) for _ in range(4)}
    assert len(draws) == 4


def test_arrays_run_out_at_whole_groups(arrays):
    _, y, _ = read(arrays, 100, 4)
    assert y.shape == (ROWS // 4, 4)
    assert len(set(y.ravel())) == y.size, "no example comes twice"


def test_large_draws_come_in_chunks():
    x = np.arange(700, dtype="float32")[:, None]
    chunks = list(open_examples((x, x)).groups(600, 1, 0))
    assert len(chunks) > 1
    drawn = np.concatenate([x.ravel() for x, _, _ in chunks])
    np.testing.assert_array_equal(drawn, np.random.default_rng(0).permutation(700)[:600])


def test_nests_of_inputs_and_outputs(arrays):
    x, y, _ = arrays
    for make in (lambda v: [v, 2 * v], lambda v: {"a": v, "b": 2 * v}):
        for data in ((make(x), make(y)), lambda make=make: iter([(make(x), make(y))])):
            out_x, out_y, weight = read(data, 3, 2)
            assert type(out_x) is type(out_y) is type(make(0))
            for once, twice in (tree.flatten(out_x), tree.flatten(out_y)):
                np.testing.assert_array_equal(2 * once, twice)
            assert weight is None


def test_inputs_without_targets(arrays):
    x = arrays[0]
    for data in (x, (x,), (x, None), [x], keras.ops.convert_to_tensor(x), torch.tensor(x), tf.constant(x), {"a": x}):
        out, y, weight = read(data, 4, 1)
        np.testing.assert_array_equal(tree.flatten(out)[0][:, 0, 0], np.random.default_rng(0).permutation(ROWS)[:4])
        assert y is None
        assert weight is None


def test_doubles_become_floatx_and_other_types_stay():
    x = np.zeros((4, 2))
    assert read((x, x.astype("int64")), 1, 1)[0].dtype == np.float32
    assert read((x, x.astype("int64")), 1, 1)[1].dtype == np.int64
    assert read((x.astype("uint8"), x), 1, 1)[0].dtype == np.uint8
    keras.config.set_floatx("float64")
    try:
        assert read((x, x), 1, 1)[0].dtype == np.float64
    finally:
        keras.config.set_floatx("float32")


def test_tensors_that_require_gradients():
    x = torch.ones(4, 2, requires_grad=True)
    assert read((x, x), 2, 1)[0].shape == (2, 1, 2)


@pytest.mark.parametrize("seed", range(20))
def test_groups_from_uneven_batches(seed, arrays):
    """Cuts anywhere; the groups are always the examples in their order."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, ROWS), rng.integers(1, 8), replace=False))
    sizes = np.diff([0, *cuts, ROWS])
    size = int(rng.integers(1, 9))
    count = int(rng.integers(1, ROWS // size + 1))
    _, y, _ = read(lambda: iter(batches(arrays, sizes)), count, size)
    np.testing.assert_array_equal(y, np.arange(count * size).reshape(count, size))


def test_batches_padded_to_different_lengths_are_never_mixed():
    lengths = [(3, 4), (2, 4), (3, 6), (4, 6), (5, 2)]  # examples and padded length of each batch
    start, items = 0, []
    for rows, width in lengths:
        names = np.arange(start, start + rows)
        items.append((np.repeat(names[:, None], width, axis=1).astype("float32"), names))
        start += rows
    chunks = list(open_examples(lambda: iter(items)).groups(100, 2, 0))
    groups = [(x[k], y[k]) for x, y, _ in chunks for k in range(len(y))]
    for x, y in groups:
        np.testing.assert_array_equal(x, np.repeat(y[:, None], x.shape[1], axis=1))
    # What is left of one length is dropped when another begins: example 4 (of 0-4) and 11 (of 5-11) and 16.
    assert np.concatenate([y for _, y in groups]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15]


def states():
    return random.getstate(), tuple(np.random.get_state()[1]), tuple(torch.get_rng_state().tolist())


@pytest.mark.parametrize("kind", ["pydataset", "loader", "callable"])
def test_random_states_are_left_as_they_were(kind, arrays):
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(arrays[0])), 4, shuffle=True)
    augmenting = Batches(arrays, (5,) * 4)
    data = {"pydataset": augmenting, "loader": shuffled, "callable": lambda: (augmenting[k] for k in range(4))}[kind]
    before = states()
    examples = open_examples(data)
    assert states() == before
    list(examples.groups(10, 1, 0))
    assert states() == before
    next(examples.groups(10, 1, 0))  # given up in the middle, as a check does
    assert states() == before


def test_random_states_are_left_when_reading_fails():
    def make():
        np.random.rand()
        yield np.ones((2, 2)), np.ones(2)
        raise OSError("disk gone")

    before = states()
    with pytest.raises(OSError, match="disk gone"):
        list(open_examples(make).groups(10, 1, 0))
    assert states() == before


def test_the_callers_arrays_are_left_alone(arrays):
    copies = [a.copy() for a in arrays]
    for batch in open_examples(arrays).groups(5, 2, 0):
        for leaf in batch:
            np.add(leaf, 1, out=leaf)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("make", [lambda b: (x for x in b), iter], ids=["generator", "iterator"])
def test_what_can_be_read_once_is_refused(make, arrays):
    data = make(batches(arrays, (5, 5)))
    with pytest.raises(TypeError, match=r"can be read only once: .* Give a callable .*data=lambda: make_batches\(\)"):
        open_examples(data)
    assert len(list(data)) == 2, "nothing was taken"


REFUSED = [
    (3, TypeError, "data is a int. Give what `fit` takes"),
    ("train.npz", TypeError, "data is a str. Give what `fit` takes"),
    (lambda: 3, TypeError, "The callable in data returned a int. It must return a fresh iterator of batches"),
    ((np.ones(3), np.ones(4)), ValueError, r"The arrays in data hold \[3, 4\] examples.*the same, positive number"),
    ((np.ones((0, 2)), np.ones(0)), ValueError, r"hold \[0\] examples"),
    ((), ValueError, r"data must give \(x, y\) or \(x, y, sample_weight\), got 0 parts"),
    ((np.ones(3),) * 4, ValueError, "got 4 parts. Put several inputs into one list or dictionary x"),
    ((tf.ragged.constant([[1.0], [1.0, 2.0]]), np.ones(2)), TypeError, "sparse or ragged.*Convert them to dense"),
    ((tf.sparse.from_dense(np.eye(2)), np.ones(2)), TypeError, "sparse or ragged.*Convert them to dense"),
    ((np.array([{}, {}]), np.ones(2)), TypeError, "data holds a ndarray of object, which isn't a dense array"),
    ((np.array(["a", "b"]), np.ones(2)), TypeError, "of <U1, which isn't a dense array.*text is to be tokenised"),
    ((tf.constant(["a", "b"]), np.ones(2)), TypeError, "of object, which isn't a dense array.*text is to be tokenised"),
    (([[1.0, 2.0], [3.0, 4.0]], [0, 1]), TypeError, r"the plain number 1\.0, perhaps within lists.*numpy\.asarray"),
    (lambda: iter([(np.ones((4, 2)), np.ones(3))]), ValueError, r"a batch in data hold \[3, 4\] examples"),
    (lambda: iter([(np.ones((1, 2)), np.array(1.0))]), ValueError, r"a batch in data hold \[0, 1\] examples"),
    # A dataset of single examples: rows would be taken for examples.
    (tf.data.Dataset.from_tensor_slices((np.ones((4, 2)), np.ones(4))), ValueError, r"dataset of single .*\.batch"),
    (lambda: iter([(np.ones(2),) * 5]), ValueError, "got 5 parts"),
]


@pytest.mark.parametrize(("data", "error", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        list(open_examples(data).groups(1, 1, 0))


def test_the_same_examples_give_the_same_weights_whatever_holds_them(blobs, make_mlp):
    x, y = blobs[0][:ROWS], blobs[1][:ROWS]
    drawn = np.random.default_rng(0).permutation(ROWS)
    streams = kinds((x[drawn], y[drawn]))
    weights = {}
    for kind in ("arrays", "dataset", "loader", "pydataset", "callable"):
        keras.utils.set_random_seed(0)
        model = make_mlp()
        report = kw.prune(
            model, (x, y) if kind == "arrays" else streams[kind], 0.5, quality="fast", num_grads=10, verbose=0
        )
        assert (report.samples, report.pruned) == (10, 120)
        weights[kind] = model.get_weights()
    for kind, values in weights.items():
        for one, other in zip(values, weights["arrays"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=kind)


def test_endless_streams_are_given_up_where_groups_never_form():
    growing = lambda: ((np.ones((2, n), "float32"), np.zeros(2, "int32")) for n in itertools.cycle([3, 4]))  # noqa: E731
    assert list(open_examples(growing).groups(2, 4, 0)) == []
    assert sum(len(part[1]) for part in open_examples(growing).groups(50, 2, 0)) == 50


@pytest.mark.parametrize(("number", "read"), [(None, 10), (10, 10), (5, 5), (99, 10)])
@pytest.mark.parametrize("streamed", [False, True])
def test_so_many_examples_are_read_or_all(number, read, streamed):
    x, y = np.arange(20.0, dtype="float32").reshape(10, 2), np.arange(10)
    data = (lambda: ((x[i : i + 3], y[i : i + 3]) for i in range(0, 10, 3))) if streamed else (x, y)
    batches = read_batches(open_examples(data), number, 4, 0)
    assert sum(len(batch[0]) for batch in batches) == read and max(len(batch[0]) for batch in batches) <= 4
    found = np.concatenate([batch[1] for batch in batches])
    assert len(set(found.tolist())) == len(found)
    np.testing.assert_array_equal(np.concatenate([batch[0] for batch in batches]), x[found])


def test_even_parts_are_few_and_leave_only_the_last_examples_over():
    parts = cut_evenly(np.arange(7), 3)
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part.tolist() for part in cut_evenly(np.arange(6), 3)] == [[0, 1, 2], [3, 4, 5]]
