"""Which tests execute which line: measured once by `coverage`, and kept until a source changes.

As a plugin of pytest (`-p executed`) it names the test that runs now, to `coverage` and to the processes that the test
starts. What fixtures execute may be of use to any test of the file: it is noted for all of them.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = """
[run]
core = ctrace
parallel = true
patch = _exit
data_file = {folder}/lines
include = {root}/keras_woodfisher/*,{root}/backends/*
context = ${{EXECUTED_BY-}}
"""


class Executed:
    """The tests of each line, and how long each takes."""

    def __init__(self, folder: Path) -> None:
        self._data = coverage.CoverageData(str(folder / "lines"))
        self._data.read()
        self.seconds: dict[str, float] = json.loads((folder / "seconds.json").read_text("utf-8"))
        self._of_file = defaultdict(set)
        for test in self.seconds:
            self._of_file[test.split("::")[0]].add(test)

    def tests(self, path: Path, lines: range) -> set[str]:
        """Those that execute one of the lines; where these run at the import, those that execute any of the file."""
        by_line = self._contexts(path)
        names = {name for line in lines for name in by_line.get(line, ())}
        if not lines or names == {""}:
            names = {name for every in by_line.values() for name in every}
        return {test for name in names for test in ({name} if "::" in name else self._of_file[name])}

    @cache  # noqa: B019 - one record lives as long as the command
    def _contexts(self, path: Path) -> dict[int, list[str]]:
        return self._data.contexts_by_lineno(str(path))


def measured(backend: str, jobs: int = 1) -> Executed:
    """The record of these sources; where there is none, the suite runs first, and must pass."""
    folder = ROOT / ".pytest_cache" / "executed" / backend
    folder.mkdir(parents=True, exist_ok=True)
    digest = _digest()
    if not (folder / "digest").exists() or (folder / "digest").read_text("utf-8") != digest:
        for file in folder.iterdir():
            file.unlink()
        _measure(folder, jobs)
        (folder / "digest").write_text(digest, "utf-8")
    return Executed(folder)


def paths(tree: Path) -> dict[str, str]:
    """What makes the tests of a copy import the package of the copy."""
    return {"PYTHONPATH": os.pathsep.join(str(tree / name) for name in (".", "backends", "tests"))}


def _measure(folder: Path, jobs: int) -> None:
    settings = folder / "settings"
    settings.write_text(SETTINGS.format(folder=folder, root=ROOT), "utf-8")
    environment = {"COVERAGE_PROCESS_START": str(settings), "EXECUTED_SECONDS": str(folder / "seconds.json")}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "executed", "-n", str(jobs), "--dist", "worksteal", "tests"]
    subprocess.run(command, cwd=ROOT, env=os.environ | paths(ROOT) | environment, check=True)
    parts = coverage.Coverage(config_file=str(settings))
    parts.combine()
    parts.save()


def _digest() -> str:
    found = hashlib.sha256(f"{ROOT} {sys.version}".encode())
    for folder in ("keras_woodfisher", "backends", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return found.hexdigest()


_seconds: dict[str, float] = defaultdict(float)


def _function(test: str) -> str:
    """Without parameters: some are named after layers, which are counted as modules are imported."""
    return test.split("[", maxsplit=1)[0]


def _within(name: str) -> None:
    os.environ["EXECUTED_BY"] = name
    coverage.Coverage.current().switch_context(name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _within(item.nodeid.split("::")[0])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _within(_function(item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    _within(item.nodeid.split("::")[0])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[_function(report.nodeid)] += report.duration


def pytest_sessionfinish() -> None:
    coverage.Coverage.current().save()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        Path(os.environ["EXECUTED_SECONDS"]).write_text(json.dumps(_seconds), "utf-8")
