"""Breaks lines of the core at random, one at a time, and runs the tests that execute them: which changes do they see?

As a command: `make mutants ARGS="--number 100 --seed 0"`. Each change is made in a copy, one copy a core; the tree
itself stays as it is. The tests of the room come first, the quickest files first, until one fails or has no end. What
no test sees is a change that makes no difference, or one that a test is missing for.
"""

import argparse
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import keras
import pytest
from executed import ROOT, Executed, measured, paths
from mutations import Mutant, mutants

CORE = {
    "keras_woodfisher/pruning": "tests/pruning",
    "keras_woodfisher/gradients": "tests/gradients",
    "keras_woodfisher/callbacks": "tests/callbacks",
    "keras_woodfisher/model": "tests/model",
    "keras_woodfisher/memory": "tests/memory",
    "keras_woodfisher/options": "tests/options",
    "keras_woodfisher/oneshot/reconstruction": "tests/oneshot",
    "backends/keras_woodfisher_backends/kernel": "tests/backends",
    "backends/keras_woodfisher_backends/least_squares": "tests/backends",
    "backends/keras_woodfisher_backends/ranks": "tests/backends",
    "backends/keras_woodfisher_backends/sampling": "tests/backends",
}
"""The rooms of the core, and where the tests of each are."""


def in_order(tests: set[str], seconds: dict[str, float]) -> list[str]:
    """File by file, for the sake of what the tests of one share; the quickest file and the quickest test first."""
    of_file: dict[str, float] = {}
    for test in tests:
        file = test.split("::")[0]
        of_file[file] = of_file.get(file, 0.0) + seconds[test]
    return sorted(tests, key=lambda test: (of_file[test.split("::")[0]], test.split("::")[0], seconds[test]))


def failing(tests: list[str], tree: Path, limit: float) -> str:
    """The first of these tests of a copy that fails, or what else went wrong; nothing where all pass."""
    said = tree / "said.txt"
    process = os.fork()
    if not process:
        _run(tests, tree, said)
    until = time.monotonic() + limit
    while not (ended := os.waitpid(process, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(0.05)
    # Tests start processes, too.
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if not ended[0]:
        os.waitpid(process, 0)
        return "no end"
    if not ended[1]:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - |$)", said.read_text("utf-8", "replace"), re.MULTILINE)
    return found[1] if found else f"status {ended[1]}"


def _run(tests: list[str], tree: Path, said: Path) -> None:
    """The rest of a process that was forked for it: frameworks are imported already."""
    code = 1
    try:
        os.setsid()
        os.chdir(tree)
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= paths(tree) | {"OMP_NUM_THREADS": "1"}
        sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
        code = int(pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def seen_by(mutant: Mutant, near: str, executed: Executed, tree: Path) -> str:
    """What sees the change, made in a copy of the project; the tests of one folder come first."""
    tests = executed.tests(mutant.path, mutant.lines)
    first = {test for test in tests if test.startswith(f"{near}/")}
    place = tree / mutant.path.relative_to(ROOT)
    before = place.read_text("utf-8")
    place.write_text(mutant.text, "utf-8")
    try:
        for part in (first, tests - first):
            limit = 60.0 + 4.0 * sum(executed.seconds[test] for test in part)
            if part and (found := failing(in_order(part, executed.seconds), tree, limit)):
                return found
        return ""
    finally:
        place.write_text(before, "utf-8")


class Worker:
    """Tries one change after the other in its process, in a copy of its own."""

    _executed: Executed
    _tree: Path

    @classmethod
    def begin(cls, folder: str) -> None:
        ignored = shutil.ignore_patterns(".*", "__pycache__", "results")
        cls._tree = Path(shutil.copytree(ROOT, Path(folder) / str(os.getpid()), ignore=ignored))
        cls._executed = measured(os.environ.get("KERAS_BACKEND", "torch"))

    @classmethod
    def answer(cls, one: tuple[Mutant, str]) -> str:
        mutant, room = one
        return seen_by(mutant, CORE[room], cls._executed, cls._tree)


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--number", type=int, default=100)
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--least", type=float, default=0.92, help="the part that must be seen, or the command fails")
    args.add_argument("--jobs", type=int, default=os.cpu_count(), help="changes that are tested at a time")
    args = args.parse_args()
    measured(os.environ.get("KERAS_BACKEND", "torch"), args.jobs)
    found = [(mutant, room) for room in CORE for path in sorted((ROOT / room).glob("*.py")) for mutant in mutants(path)]
    chosen = random.Random(args.seed).sample(found, min(args.number, len(found)))
    # What every process would import, and takes longer than most tests: setting the seed imports TensorFlow.
    for name in ("scipy.linalg", "sklearn.datasets", "hypothesis"):
        importlib.import_module(name)
    keras.utils.set_random_seed(0)
    missed = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("fork").Pool(args.jobs, Worker.begin, [folder]) as pool,
    ):
        answers = zip(chosen, pool.imap(Worker.answer, chosen), strict=True)
        for number, ((mutant, _), test) in enumerate(answers, start=1):
            missed += not test
            where = f"{mutant.path.relative_to(ROOT)}:{mutant.line}"
            print(f"{number:4} {test or 'MISSED'}\n     {where}  {mutant.before!r} -> {mutant.after!r}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} changes were seen; {len(found)} are possible")
    return int(missed > (1.0 - args.least) * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
