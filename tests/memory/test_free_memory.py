import psutil
import pytest

from keras_woodfisher.memory.free_memory import check_device_memory, free_memory
from keras_woodfisher.options.sizes import parse_bytes

GIB = 2**30


@pytest.mark.parametrize(
    "written, size",
    [
        (1, 1),
        ("1", 1),
        ("4GiB", 4 * GIB),
        ("4 gib", 4 * GIB),
        ("1.5 KB", 1500),
        (" 2 MiB ", 2**21),
        ("3TB", 3 * 10**12),
    ],
)
def test_sizes_as_people_write_them(written, size):
    assert parse_bytes("memory_limit", written) == size


@pytest.mark.parametrize("wrong", ["", "GiB", "4 Gigs", "-1", "1e9", 0, "0 MB", -5])
def test_what_is_no_size(wrong):
    with pytest.raises(ValueError, match=r"memory_limit must be .*, got .*Give bytes, or a text such as \"4GiB\""):
        parse_bytes("memory_limit", wrong)
    for kind in (1.5, True, None, [1]):
        with pytest.raises(TypeError, match="memory_limit must be a size"):
            parse_bytes("memory_limit", kind)


def test_a_quarter_of_what_a_device_has_is_enough_and_one_row_more_is_not():
    # 1024 rows of 256 Ki float32 weights are 1 GiB.
    check_device_memory(1024, 256 * 1024, "cuda:0", 4 * GIB)
    check_device_memory(10**9, 256 * 1024, "cuda:0", None)
    message = r"num_grads=1025 takes 1\.00 GiB .* on cuda:0, .*1\.00 GiB of 4\.00 GiB\. num_grads=1024 would fit"
    with pytest.raises(MemoryError, match=message):
        check_device_memory(1025, 256 * 1024, "cuda:0", 4 * GIB)
    with pytest.raises(MemoryError, match="choose fewer weights") as error:
        check_device_memory(1, 1000, "cuda:0", 1000)
    assert "would fit" not in str(error.value)


def lay(folder, limit, usage, stat):
    files = {"max": limit, "current": usage, "stat": stat}
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


def test_the_limit_of_a_container_counts(tmp_path):
    lay(tmp_path, 50_000_000, 30_000_000, "anon 20000000\ninactive_file 4000000")
    assert free_memory(tmp_path) == 24_000_000


def test_an_exceeded_limit_leaves_nothing(tmp_path):
    lay(tmp_path, 50_000_000, 60_000_000, "inactive_file 0")
    assert free_memory(tmp_path) == 0


@pytest.mark.parametrize("limit", ["max", str(2**62)])
def test_a_container_without_a_limit(tmp_path, limit):
    lay(tmp_path, limit, 30_000_000, "inactive_file 0")
    assert free_memory(tmp_path) > 50_000_000


def test_older_control_groups(tmp_path):
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("50000000\n")
    (folder / "memory.usage_in_bytes").write_text("30000000\n")
    (folder / "memory.stat").write_text("cache 9\ntotal_inactive_file 1000\n")
    assert free_memory(tmp_path) == 20_001_000


def test_without_control_groups(tmp_path):
    assert 0 < free_memory(tmp_path) <= psutil.virtual_memory().total


def test_half_as_large_numbers_take_half_as_much():
    check_device_memory(2048, 256 * 1024, "cuda:0", 4 * GIB, itemsize=2)
    with pytest.raises(MemoryError, match="num_grads=2048 would fit"):
        check_device_memory(2049, 256 * 1024, "cuda:0", 4 * GIB, itemsize=2)
