import ctypes
import os
import subprocess
import sys

import psutil
import pytest

from keras_woodfisher.memory.free_memory import check_device_memory, free_memory, give_back_memory, tightest_limit
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.sizes import parse_bytes
from keras_woodfisher.pruning.workspace import budget_of

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


VERSION_2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


def lay(folder, limit, usage, cache=0, names=VERSION_2):
    """A control group with its limit, what it uses, and how much of that merely caches files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, usage, f"anon 5\n{names[3]} {cache}"), strict=False):
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def process(tmp_path):
    """Writes what Linux tells of a process: lines of `cgroup`, and (root, mount point, kind, options) of mounts."""

    def write(groups, *mounts):
        proc = tmp_path / "proc"
        proc.mkdir(exist_ok=True)
        (proc / "cgroup").write_text("".join(f"{line}\n" for line in groups))
        lines = ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda rw"]
        lines += [
            f"31 22 0:26 {root} {place} rw,nosuid shared:4 - {kind} cgroup {options}"
            for root, place, kind, options in mounts
        ]
        (proc / "mountinfo").write_text("".join(f"{line}\n" for line in lines))
        return proc

    return write


MB = 1_000_000


def test_the_group_of_the_process_and_those_around_it_count(process, tmp_path):
    mount = tmp_path / "cgroup"
    proc = process(["0::/system.slice/job.service"], ("/", mount, "cgroup2", "rw"))
    lay(mount / "system.slice/job.service", 50 * MB, 30 * MB, 4 * MB)
    assert tightest_limit(proc) == (24 * MB, "the control group /system.slice/job.service")
    # Another group's limit is none of this process's.
    lay(mount / "system.slice/other.service", 2 * MB, 1 * MB)
    assert free_memory(proc) == 24 * MB
    lay(mount / "system.slice", 90 * MB, 80 * MB)
    assert tightest_limit(proc) == (10 * MB, "the control group /system.slice")
    lay(mount / "system.slice", "max", 80 * MB)
    assert free_memory(proc) == 24 * MB
    (mount / "system.slice/job.service/memory.high").write_text(f"{40 * MB}\n")
    assert free_memory(proc) == 14 * MB


def test_the_older_version_of_control_groups(process, tmp_path):
    mount = tmp_path / "memory controller"
    place = str(mount).replace(" ", "\\040")
    groups = ["5:cpu,cpuacct:/other", "4:memory:/slurm/uid_1/job_7/step_0", "1:name=systemd:/", "0::/"]
    proc = process(groups, ("/", tmp_path / "cpu", "cgroup", "rw,cpu"), ("/", place, "cgroup", "rw,memory"))
    lay(mount / "slurm/uid_1/job_7", 50 * MB, 30 * MB, 1 * MB, VERSION_1)
    lay(mount / "slurm/uid_1/job_7/step_0", 2**63 - 4096, 20 * MB, 0, VERSION_1)
    assert tightest_limit(proc) == (21 * MB, "the control group /slurm/uid_1/job_7")


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/abc", "/docker/abc"),  # the host's namespace, and a mount of the container's own part
        ("/../../job", "/"),  # moved out of its namespace
        ("/kubepods/pod1", "/docker/abc"),  # neither knows the other
        ("/not/there", "/"),
    ],
)
def test_containers_see_their_own_part(process, tmp_path, path, root):
    lay(tmp_path / "cgroup", 50 * MB, 30 * MB)
    proc = process([f"0::{path}"], (root, tmp_path / "cgroup", "cgroup2", "rw"))
    assert free_memory(proc) == 20 * MB


def test_below_the_part_of_a_container(process, tmp_path):
    proc = process(["0::/docker/abc/inner"], ("/docker/abc", tmp_path / "cgroup", "cgroup2", "rw"))
    lay(tmp_path / "cgroup/inner", 50 * MB, 30 * MB)
    assert tightest_limit(proc) == (20 * MB, "the control group /docker/abc/inner")


def test_an_exceeded_limit_leaves_nothing(process, tmp_path):
    lay(tmp_path / "cgroup", 50 * MB, 60 * MB)
    assert free_memory(process(["0::/"], ("/", tmp_path / "cgroup", "cgroup2", "rw"))) == 0


@pytest.mark.parametrize("limit", ["max", str(2**62)])
def test_without_a_limit(process, tmp_path, limit):
    lay(tmp_path / "cgroup", limit, 30 * MB)
    assert free_memory(process(["0::/"], ("/", tmp_path / "cgroup", "cgroup2", "rw"))) > 50 * MB
    assert 0 < free_memory(tmp_path / "nowhere") <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("kind", "field", "name"), [("RLIMIT_AS", "VmSize", "`ulimit -v`"), ("RLIMIT_DATA", "VmData", "`ulimit -d`")]
)
def test_limits_of_ulimit(monkeypatch, tmp_path, kind, field, name):
    resource = pytest.importorskip("resource")
    (tmp_path / "status").write_text(f"Name:\tpython\n{field}:\t   30000 kB\n")
    number = getattr(resource, kind)
    none = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (30_000 * 1024 + 777 if asked == number else none, none))
    assert tightest_limit(tmp_path) == (777, name)
    options = PruningOptions.of(memory_limit="1 GiB")
    monkeypatch.setattr("keras_woodfisher.pruning.workspace.tightest_limit", lambda: tightest_limit(tmp_path))
    budget = budget_of(options)
    assert (budget.limit, budget.free) == (777, 777)
    assert budget.reason == f"all that is free within {name}, which is less than memory_limit"


@pytest.mark.parametrize(("kind", "name"), [("RLIMIT_AS", "`ulimit -v`"), ("RLIMIT_DATA", "`ulimit -d`")])
def test_the_system_itself_tells_what_ulimit_leaves(kind, name):
    """In a process of its own, since a limit can't be lifted again."""
    code = (
        "import resource\n"
        "from keras_woodfisher.memory.free_memory import tightest_limit\n"
        f"resource.setrlimit(resource.{kind}, (2 * 2**30, resource.RLIM_INFINITY))\n"
        "before = tightest_limit()\n"
        "taken = bytearray(2**28)\n"
        "after = tightest_limit()\n"
        "print(before.free, before.free - after.free, after.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    free, taken, said = done.stdout.strip().split(" ", 2)
    assert said == name, done.stderr
    assert 2**28 <= int(free) < 2 * 2**30 and int(taken) == pytest.approx(2**28, rel=0.1)


def test_half_as_large_numbers_take_half_as_much():
    check_device_memory(2048, 256 * 1024, "cuda:0", 4 * GIB, itemsize=2)
    with pytest.raises(MemoryError, match="num_grads=2048 would fit"):
        check_device_memory(2049, 256 * 1024, "cuda:0", 4 * GIB, itemsize=2)


@pytest.mark.once
def test_memory_goes_back_to_the_system_unless_told_otherwise(monkeypatch):
    """Where the C library can do that."""
    asked = []

    class Library:
        def __init__(self, name):
            assert name is None

        def malloc_trim(self, keep):
            asked.append(keep)

    monkeypatch.setattr(ctypes, "CDLL", Library)
    give_back_memory(to_system=False)
    assert asked == []
    give_back_memory()
    assert asked == [0]
    del Library.malloc_trim
    give_back_memory()
