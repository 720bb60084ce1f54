"""Wherever gradients are kept, what comes back is what was put in."""

import tempfile
import threading
import time
import weakref

import keras
import numpy as np
import pytest
from gathering import add_rows
from keras import ops
from keras_woodfisher_backends.kernel.numpy_operators import host_kernel

from keras_woodfisher.memory.device import DeviceStore
from keras_woodfisher.memory.disk import DiskStore, Spool, disk_room
from keras_woodfisher.memory.recomputed import RecomputedStore
from keras_woodfisher.memory.staged import HalfStore, scales_of
from keras_woodfisher.memory.store import MemoryStore
from keras_woodfisher.pruning.fisher import BlockFisher, block_slices

KEPT = (70, 0, 131, 1)
WIDTH = sum(KEPT)


def samples(m=13, seed=3):
    rng = np.random.default_rng(seed)
    # Rows of very different size, as those of a trained net.
    return (rng.normal(size=(m, WIDTH)) * 10.0 ** rng.integers(-9, 3, (m, 1))).astype(np.float32)


def device():
    return "cpu:0" if keras.backend.backend() == "torch" else "cpu:1"


def filled(kind, rows, size, chunk=4, dtype="float32", page=None, good=None):
    """A store of rows (n, d), of which those that are good are kept."""
    good = np.ones(len(rows), bool) if good is None else good
    blocks = block_slices(KEPT, size)
    page = page or (max(b.stop - b.start for b in blocks))
    shape = len(rows), WIDTH

    def fill(store):
        add_rows(store, rows, good)

    if kind == "memory":
        store = MemoryStore(shape, chunk) if dtype == "float32" else HalfStore(shape, chunk, page)
    elif kind == "disk":
        store = DiskStore(shape, chunk, dtype, page, blocks)
    elif kind == "device":
        store = DeviceStore(shape, chunk, dtype, page, device())
    else:
        store = RecomputedStore(shape, chunk, dtype, page, blocks, fill)
    fill(store)
    store.finish()
    return store, blocks


def read_all(store, blocks):
    """All blocks side by side."""
    parts = {b.start: np.array(store.block(b)[:, :]) for group in store.groups(blocks) for b in group}
    return np.concatenate([parts[b.start] for b in blocks], axis=1)


KINDS = ("memory", "disk", "device", "recomputed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, page", [(1, None), (7, None), (50, 20), (1000, 33), (None, 16), (None, None)])
def test_blocks_come_back_bit_for_bit(kind, size, page):
    rows = samples()
    store, blocks = filled(kind, rows, size, page=page)
    assert store.shape == rows.shape and len(store) == 13
    for _ in range(2):
        np.testing.assert_array_equal(read_all(store, blocks), rows)
    # Only some of the blocks, as in the update.
    some = blocks[1::2] or blocks
    np.testing.assert_array_equal(read_all(store, some), np.concatenate([rows[:, b] for b in some], axis=1))
    store.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 4, 13])
def test_rows_that_are_dropped_leave_no_gap(kind, chunk):
    rows = samples()
    good = np.array([0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1], bool)
    store, blocks = filled(kind, rows, 50, chunk, good=good)
    assert store.shape == (6, WIDTH)
    np.testing.assert_array_equal(read_all(store, blocks), rows[good])
    store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_float16_is_within_its_error(kind):
    rows = samples()
    rows[2, 5] = 0.0
    rows[3] *= 1e-30  # the smallest numbers that float32 has
    store, blocks = filled(kind, rows, 50, dtype="float16")
    read = read_all(store, blocks)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    assert read.dtype == np.float32
    assert (np.abs(read - rows) <= np.maximum(2.0**-11 * np.abs(rows), 2.0**-40 * largest)).all()
    assert (read != rows).any()
    store.close()


@pytest.mark.parametrize("kind", ["disk", "device", "recomputed"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_columns_of_several_pages_come_at_once(kind, dtype):
    rows = samples()
    store, blocks = filled(kind, rows, None, page=25, dtype=dtype)
    whole = read_all(store, blocks)
    for columns in (slice(0, 25), slice(25, 100), slice(50, 51), slice(0, WIDTH), slice(75, WIDTH)):
        np.testing.assert_array_equal(store.columns(columns), whole[:, columns])
    store.close()


@pytest.mark.parametrize("kind", ["disk", "device", "recomputed"])
def test_a_wide_block_is_read_page_by_page(kind):
    rows = samples()
    store, (block,) = filled(kind, rows, None, page=25)
    view = store.block(block)
    assert not isinstance(view, np.ndarray) and view.shape == rows.shape
    rng = np.random.default_rng(0)
    for low, high in ((0, 25), (25, 50), (10, 130), (0, WIDTH), (WIDTH - 1, WIDTH), (7, 7)):
        np.testing.assert_array_equal(view[:, low:high], rows[:, low:high])
        np.testing.assert_array_equal(view[2:9, low:high], rows[2:9, low:high])
    mask = rng.random(WIDTH) < 0.3
    np.testing.assert_array_equal(view[:, mask], rows[:, mask])
    np.testing.assert_array_equal(view[:, np.array([3, 170, 40, 41])], rows[:, [3, 170, 40, 41]])
    part = view[:, 0:25]
    view[:, 50:75]
    np.testing.assert_array_equal(part, rows[:, :25])
    store.close()


@pytest.mark.parametrize("kind", ["disk", "device", "recomputed"])
@pytest.mark.parametrize("size, page", [(10, None), (60, 30), (None, 30)])
def test_the_fisher_is_the_same_bit_for_bit(kind, size, page):
    rows = samples()
    blocks = block_slices(KEPT, size)
    rng = np.random.default_rng(1)
    weights, prune = rng.normal(size=WIDTH), rng.random(WIDTH) < 0.5
    results = []
    for where in ("memory", kind):
        store, _ = filled(where, rows, size, page=page)
        fisher = BlockFisher(store, blocks, 1e-3, [host_kernel()])
        diagonal = fisher.inverse_diagonal()
        results.append([diagonal, *(fisher.update(weights, prune, diagonal, joint) for joint in (True, False))])
        store.close()
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_threads_slice_on_a_device_in_turn(monkeypatch):
    rows = samples()
    store, blocks = filled("device", rows, 10)
    real, together, most, wrong = ops.slice, [], [], []

    def slicing(*args):
        together.append(1)
        most.append(len(together))
        time.sleep(1e-3)
        together.pop()
        return real(*args)

    monkeypatch.setattr("keras_woodfisher.memory.device.ops.slice", slicing)

    def read(chosen):
        wrong.extend(b for b in chosen if not (store.block(b) == rows[:, b]).all())

    threads = [threading.Thread(target=read, args=(blocks[start::3],)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) >= len(blocks)
    # TensorFlow mixes them up.
    assert (max(most) == 1) == (keras.backend.backend() == "tensorflow")
    assert not wrong


def test_pages_are_taken_again_no_more_often_than_needed():
    rows, calls = samples(), []
    blocks = block_slices(KEPT, 10)

    def fill(store):
        calls.append(1)
        add_rows(store, rows, np.ones(13, bool))

    store = RecomputedStore(rows.shape, 4, "float32", 55, blocks, fill)
    fill(store)
    store.finish()
    pages = [len(group) for group in store.groups(blocks)]
    assert pages == [5, 5, 5, 7]
    assert len(calls) == len(pages)
    # An update begins where the scores ended.
    assert [len(group) for group in store.groups(blocks)] == pages[::-1]
    assert len(calls) == 2 * len(pages) - 1
    list(store.groups(blocks[-7:]))
    assert len(calls) == 2 * len(pages)


def test_other_samples_in_another_pass_are_an_error():
    rows, blocks = [samples(), samples(), samples(seed=4)], block_slices(KEPT, 10)

    def fill(store):
        add_rows(store, rows.pop(0), np.ones(13, bool))

    store = RecomputedStore((13, WIDTH), 4, "float32", 100, blocks, fill)
    fill(store)
    store.finish()
    with pytest.raises(ValueError, match=r"gave other gradients this time.*no shuffling.*TMPDIR"):
        list(store.groups(blocks))
    rows[:] = [samples(), samples(12)]
    store = RecomputedStore(
        (13, WIDTH), 4, "float32", 110, blocks, lambda s: add_rows(s, rows[0][:12], np.ones(12, bool))
    )
    add_rows(store, rows[0], np.ones(13, bool))
    store.finish()
    with pytest.raises(ValueError, match="12 usable samples instead of 13 this time"):
        list(store.groups(blocks))


def test_files_are_gone_when_they_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store, _ = filled("disk", samples(), 10)
    store.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed file"):
        store.block(slice(0, 10))


def test_no_room_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"of 1048576\.00 GiB .* cannot be created in .*are free there.*num_grads"):
        Spool(2**50)
    spool = Spool(100)

    class Full:
        def seek(self, place):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

    file, spool._file = spool._file, Full()
    with pytest.raises(OSError, match=r"cannot be created in .*No space left on device\. Set .* TMPDIR"):
        spool.write(0, np.zeros(4, np.float32))
    file.close()
    assert disk_room(str(tmp_path)) > 0


def test_a_folder_in_memory_is_no_disk(monkeypatch):
    class Partition:
        def __init__(self, mountpoint, fstype):
            self.mountpoint, self.fstype = mountpoint, fstype

    listed = [Partition("/", "ext4"), Partition(tempfile.gettempdir(), "tmpfs")]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: listed)
    assert disk_room(tempfile.gettempdir()) == 0
    listed.pop()
    assert disk_room(tempfile.gettempdir()) > 0


def test_a_block_is_cut_out_where_the_gradients_are(monkeypatch):
    rows, places, cut = samples(), [], keras.ops.slice

    def watched(tensor, *args):
        found = cut(tensor, *args)
        places.append([str(part.device).lower() for part in (tensor, found)])
        return found

    monkeypatch.setattr(keras.ops, "slice", watched)
    store, blocks = filled("device", rows, 50)
    np.testing.assert_array_equal(read_all(store, blocks), rows)
    store.close()
    assert places and all(before == after for before, after in places)
    number = device().partition(":")[2]
    # torch has one processor only.
    assert keras.backend.backend() == "torch" or all(number in before for before, _ in places)


def test_memory_is_free_when_a_store_is_closed():
    store = MemoryStore((4, 3), 2)
    alive = weakref.ref(store._array)
    store.close()
    assert alive() is None and store._array.size == 0
    assert store.shape == (0, 3) and store.block(slice(0, 2)).shape == (0, 2)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("memory", "float16"), ("recomputed", "float16"), ("recomputed", "float32")]
)
def test_memory_of_what_is_staged_is_free_when_a_store_is_closed(kind, dtype):
    store, _ = filled(kind, samples(), 50, dtype=dtype)
    alive = [weakref.ref(store._array), weakref.ref(store._buffer)]
    store.close()
    assert all(array() is None for array in alive)
    assert store._array.size == store._buffer.size == 0


def test_the_largest_entry_decides_about_a_rows_scale_whatever_its_sign():
    rows = np.array([[1000.0, -1.0], [-1000.0, 1.0], [0.001, 0.0], [0.0, -0.001]], np.float32)
    scales = scales_of(rows, "float16")
    largest = np.abs(rows).max(1) / scales
    assert ((largest >= 2.0**14) & (largest < 2.0**15)).all()
    assert scales[0] == scales[1] and scales[2] == scales[3]
    np.testing.assert_array_equal(scales_of(rows, "float32"), 1.0)
