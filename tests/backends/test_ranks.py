"""Processes that work together, here threads: what they exchange, and what happens where they differ or fail."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.ranks.digests import digest_of
from keras_woodfisher_backends.ranks.joint import current_ranks, jointly
from keras_woodfisher_backends.ranks.ranks import LostProcessError, Ranks
from keras_woodfisher_backends.ranks.shares import column_edges, row_share


class Hall:
    """Where threads meet; one that has left breaks the barrier for the others."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size)
        self.places = [None] * size

    def exchange(self, rank, thing):
        self.places[rank] = thing
        self.barrier.wait(10)
        found = list(self.places)
        self.barrier.wait(10)
        return found


class ThreadTransport:
    name = "threads"

    def __init__(self, hall, rank):
        self.hall, self.rank, self.size = hall, rank, hall.size

    def all_gather(self, data):
        found = self.hall.exchange(self.rank, data.copy())
        assert len({part.size for part in found}) == 1
        return found

    def all_to_all(self, parts, lengths, most):
        assert max(part.size for part in parts) <= most
        found = [every[self.rank] for every in self.hall.exchange(self.rank, list(parts))]
        assert [part.size for part in found] == list(lengths)
        return found

    def broadcast(self, data):
        return self.hall.exchange(self.rank, data.copy())[0]


class OwnError(ValueError):
    pass


class MuteError(Exception):
    def __str__(self):
        return self.text


def each(work, size=3, name="work"):
    """What `work(ranks)` gives, or raises, in each of some threads."""
    hall = Hall(size)

    def run(rank):
        ranks = Ranks(ThreadTransport(hall, rank))
        try:
            with ranks.together(name if isinstance(name, str) else name[rank]):
                return work(ranks)
        except BaseException as error:  # noqa: BLE001 - it is looked at
            hall.barrier.abort() if isinstance(error, LostProcessError) else None
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def test_arrays_of_any_length_and_shape_are_gathered():
    found = each(lambda ranks: ranks.all_gather(np.arange(6.0 * ranks.rank).reshape(-1, 3)))
    for parts in found:
        assert [part.shape for part in parts] == [(0, 3), (2, 3), (4, 3)] and parts[2][3, 2] == 11.0
    joined = each(lambda ranks: ranks.joined(np.full((2, ranks.rank + 1), ranks.rank, np.float32), axis=1))
    for array in joined:
        np.testing.assert_array_equal(array, [[0, 1, 1, 2, 2, 2]] * 2)


def test_long_arrays_are_joined_a_piece_at_a_time(monkeypatch):
    monkeypatch.setattr("keras_woodfisher_backends.ranks.ranks._PIECE", 3 * 5)
    parts = [np.arange(number, dtype=np.int16) + 100 * number for number in (7, 0, 4)]
    for found in each(lambda ranks: ranks.joined(parts[ranks.rank])):
        np.testing.assert_array_equal(found, np.concatenate(parts))


def test_each_gets_what_the_others_have_for_it():
    def work(ranks):
        return ranks.all_to_all([np.full(ranks.rank + to, 10 * ranks.rank + to, np.int32) for to in range(3)])

    for rank, parts in enumerate(each(work)):
        for other, part in enumerate(parts):
            np.testing.assert_array_equal(part, np.full(other + rank, 10 * other + rank))


def test_sums_are_equal_to_the_bit_and_those_of_one_after_the_other():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(5, 3)) * 10.0**k for k in range(3)]
    expected = parts[0] + parts[1] + parts[2]
    for found in each(lambda ranks: ranks.sum(parts[ranks.rank])):
        np.testing.assert_array_equal(found, expected)
    assert each(lambda ranks: ranks.mean(float(ranks.rank))) == [1.0] * 3
    assert each(lambda ranks: ranks.least(5 - ranks.rank)) == [3] * 3
    assert each(lambda ranks: ranks.any(ranks.rank == 1)) == [True] * 3
    assert each(lambda ranks: ranks.same({"of": ranks.rank})) == [{"of": 0}] * 3
    assert each(lambda ranks: ranks.beside()) == [3] * 3
    for (found,) in each(lambda ranks: ranks.from_first([np.full((2, 2), ranks.rank)])):
        np.testing.assert_array_equal(found, np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("no such thing"), ValueError, "Process 1 of 3 failed: no such thing"),
        (KeyboardInterrupt(), KeyboardInterrupt, "Process 1 of 3 failed: KeyboardInterrupt"),
        (IndexError("no such row"), IndexError, "Process 1 of 3 failed: no such row"),
        (FileNotFoundError(2, "gone", "a.npz"), FileNotFoundError, "Process 1 of 3 failed: [Errno 2] gone: 'a.npz'"),
        (OwnError("of its own"), ValueError, "Process 1 of 3 failed: OwnError: of its own"),
        (SystemExit(3), RuntimeError, "Process 1 of 3 failed: SystemExit: 3"),
        (StopIteration("over"), RuntimeError, "Process 1 of 3 failed: StopIteration: over"),
        (ValueError("half a \ud800 character"), ValueError, r"Process 1 of 3 failed: half a \ud800 character"),
        (MuteError(), RuntimeError, "Process 1 of 3 failed: MuteError: its message can't be told (AttributeError)"),
    ],
)
def test_what_fails_on_one_is_raised_on_all_at_their_next_exchange(error, kind, text):
    def work(ranks):
        ranks.sum(np.ones(2))
        if ranks.rank == 1:
            raise error
        ranks.all_gather(np.ones(3))

    found = each(work)
    assert found[1] is error
    for other in (found[0], found[2]):
        assert type(other) is kind and str(other) == text


def test_what_fails_after_the_last_exchange_is_raised_on_all_too():
    def work(ranks):
        if ranks.rank == 2:
            raise OSError("disk is full")

    first, second, third = each(work)
    assert str(first) == str(second) == "Process 2 of 3 failed: disk is full" and str(third) == "disk is full"


def test_processes_that_do_different_things_are_told():
    def work(ranks):
        return ranks.sum(np.ones(2)) if ranks.rank else ranks.same(1)

    for error in each(work):
        assert isinstance(error, RuntimeError) and "do different things (process 0: 'all_gather'" in str(error)
    for error in each(lambda ranks: None, name=["prune", "prune", "reconstruct"]):
        assert isinstance(error, RuntimeError) and "process 2: 'reconstruct'" in str(error)


def test_differences_are_told_with_the_process():
    for error in each(lambda ranks: ranks.check_same(weights=digest_of(np.full(3, ranks.rank // 2)))):
        assert isinstance(error, ValueError) and "process 2 has other weights than process 0" in str(error)
    for error in each(lambda ranks: ranks.check_same_words({"damp": str(min(ranks.rank, 1)), "seed": "0"})):
        assert isinstance(error, ValueError) and "processes 1, 2 have damp=1, and process 0 0" in str(error)
    assert each(lambda ranks: ranks.check_same(data=digest_of("a", np.zeros(2)))) == [None] * 3
    assert digest_of(np.zeros(2, np.float32)) != digest_of(np.zeros(2, np.float64)) != digest_of(np.zeros((2, 1)))


def test_a_process_that_is_lost_is_told_of():
    def work(ranks):
        if ranks.rank == 0:
            ranks.transport.hall.barrier.abort()
        return ranks.sum(np.ones(1))

    for rank, error in enumerate(each(work)):
        assert isinstance(error, LostProcessError)
        assert f"Process {rank} of 3 has lost the others (threads: " in str(error)


def test_only_the_first_one_warns():
    def work(ranks):
        if not ranks.first:
            with warnings.catch_warnings(record=True) as caught:
                warnings.warn("of this process", stacklevel=1)
            return len(caught)
        return None

    assert each(work, size=2) == [None, 0]


def test_one_process_sends_nothing():
    ranks = Ranks()
    array = np.arange(3.0)
    with ranks.together("alone"):
        assert ranks.sum(array) is array and ranks.joined(array) is array and ranks.all_gather(array) == [array]
        assert ranks.all_to_all([array])[0] is array and ranks.same(array) is array
        ranks.check_same(weights=b"")
        ranks.settle()
    assert current_ranks().size == 1 and get_backend(keras.backend.backend()).transport() is None
    assert jointly(lambda x: x + 1)(2) == 3


def test_collectives_belong_into_work_that_is_done_together():
    with pytest.raises(RuntimeError, match=r"outside of `together`"):
        Ranks(ThreadTransport(Hall(2), 0)).all_gather(np.ones(1))


@pytest.mark.parametrize(("rows", "size"), [(64, 2), (64, 3), (20, 3), (16, 4), (1000, 7), (0, 2)])
def test_rows_are_dealt_out_evenly_by_sixteen_where_there_are_so_many(rows, size):
    shares = [row_share(rows, rank, size) for rank in range(size)]
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
    unit = next(unit for unit in (16, 8, 4, 2, 1) if unit <= max(1, rows // size))
    assert all(share.start % unit == 0 or share.start == share.stop for share in shares)
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 2 * unit and max(lengths) <= rows / size + unit


def test_columns_are_dealt_out_by_whole_blocks():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 8):
        stops = np.cumsum(rng.integers(1, 9, 6)).tolist()
        edges = column_edges(stops, size)
        assert len(edges) == size + 1 and edges == sorted(edges) and edges[-1] == stops[-1]
        assert set(edges) <= {0, *stops}
        assert max(np.diff(edges)) <= stops[-1] / size + 8
