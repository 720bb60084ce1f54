import psutil
import pytest

from keras_woodfisher.memory import check_memory, free_memory

GIB = 2**30


def test_a_quarter_of_the_free_memory_is_enough_and_one_row_more_is_not():
    # 1024 rows of 256 Ki float32 weights are 1 GiB.
    check_memory(1024, 256 * 1024, free=4 * GIB)
    with pytest.raises(MemoryError, match=r"num_grads=1025 .* 262,144 weights .*num_grads=1024 would fit"):
        check_memory(1025, 256 * 1024, free=4 * GIB)


def test_copies_count():
    check_memory(512, 256 * 1024, copies=2, free=4 * GIB)
    with pytest.raises(MemoryError, match=r"twice.*num_grads=512 would fit"):
        check_memory(513, 256 * 1024, copies=2, free=4 * GIB)


def test_sizes_are_told():
    with pytest.raises(MemoryError, match=r"takes 2\.00 GiB .* a quarter .*: 512\.0 MiB of 2\.00 GiB"):
        check_memory(2048, 256 * 1024, free=2 * GIB)


def test_where_not_one_row_fits_none_is_proposed():
    with pytest.raises(MemoryError, match="free memory: ") as error:
        check_memory(1, 1000, free=1000)
    assert "would fit" not in str(error.value)
    assert "choose fewer weights" in str(error.value)


def test_the_default_is_what_is_free_now():
    with pytest.raises(MemoryError, match="would fit"):
        check_memory(psutil.virtual_memory().total // 1000, 4000)


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
