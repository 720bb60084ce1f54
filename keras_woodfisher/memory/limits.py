"""What the system lets this process take of memory: control groups (containers, SLURM, systemd) and `ulimit`."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PROC = Path("/proc/self")


class Limit(NamedTuple):
    """What a limit leaves.

    Attributes:
        free: Bytes that may still be taken.
        name: What messages call it.
    """

    free: int
    name: str


class _Files(NamedTuple):
    """How a version of control groups names its files; `cache` counts what merely holds files, and gives way."""

    limits: tuple[str, ...]
    usage: str
    cache: str


_VERSIONS = {
    "cgroup2": _Files(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def limits(proc: Path = PROC) -> Iterator[Limit]:
    """Every limit that this process has.

    Args:
        proc: Where Linux tells about the process; elsewhere there is no such folder, and no limit is known.
    """
    yield from _group_limits(proc)
    yield from _resource_limits(proc)


def _group_limits(proc: Path) -> Iterator[Limit]:
    """Those of the process's own control group and of all groups around it."""
    paths = _own_paths(proc)
    for version, root, mount in _mounts(proc):
        if version not in paths:
            continue
        path, files = PurePosixPath(paths[version]), _VERSIONS[version]
        # Where a container sees its own part of the hierarchy only, the path may be the host's.
        inner = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        if ".." in inner.parts:
            inner = PurePosixPath()
        for group in (inner, *inner.parents):
            yield from _limits_of(mount / group, files, f"the control group {PurePosixPath(root) / group}")


def _own_paths(proc: Path) -> dict[str, str]:
    """The path of the process in the hierarchy that limits memory, by version."""
    found = {}
    for line in _lines(proc / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found["cgroup2"] = path
        elif "memory" in controllers.split(","):
            found["cgroup"] = path
    return found


def _mounts(proc: Path) -> Iterator[tuple[str, str, Path]]:
    """Where those hierarchies can be read: version, path of what is mounted, and the place."""
    for line in _lines(proc / "mountinfo"):
        before, _, after = line.partition(" - ")
        root, place = (_unescaped(text) for text in before.split()[3:5])
        version, _, options = after.split(" ", 2)
        if version == "cgroup2" or (version == "cgroup" and "memory" in options.split(",")):
            yield version, root, Path(place)


def _unescaped(text: str) -> str:
    r"""A path of mountinfo, which writes a blank as `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def _limits_of(folder: Path, files: _Files, name: str) -> Iterator[Limit]:
    for limit in files.limits:
        # "max", which is no number, where there is none.
        with suppress(OSError, ValueError):
            allowed, used = (int((folder / file).read_text()) for file in (limit, files.usage))
            counters = dict(line.split() for line in _lines(folder / "memory.stat"))
            yield Limit(max(0, allowed - used + int(counters.get(files.cache, 0))), name)


def _resource_limits(proc: Path) -> Iterator[Limit]:
    """Those of `ulimit`, which count addresses, whether they are used or not."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = dict(line.split(":", 1) for line in _lines(proc / "status") if ":" in line)
    for kind, field, name in ((resource.RLIMIT_AS, "VmSize", "-v"), (resource.RLIMIT_DATA, "VmData", "-d")):
        allowed = resource.getrlimit(kind)[0]
        if allowed != resource.RLIM_INFINITY and field in used:
            yield Limit(max(0, allowed - 1024 * int(used[field].split()[0])), f"`ulimit {name}`")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []
