"""Breaks lines of the core at random, one at a time, and runs the tests of that room: which changes do they see?

As a command: `make mutants ARGS="--number 100 --seed 0"`. It works on a copy; the tree itself stays as it is. Where the
tests of the room see nothing, all others run, too, unless told otherwise (`--room-only`). What no test sees is a change
that makes no difference, or one that a test is missing for.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

ROOMS = {
    "keras_woodfisher/pruning": ["tests/pruning", "tests/oneshot/test_prune_presets.py"],
    "keras_woodfisher/gradients": [
        "tests/gradients",
        "tests/pruning/test_workspace.py",
        "tests/callbacks/test_untrained.py",
        "tests/callbacks/test_resuming.py",
    ],
    "keras_woodfisher/callbacks": [
        "tests/callbacks",
        "tests/pruning/test_collapse.py",
        "tests/reports/test_left_out.py",
    ],
    "keras_woodfisher/model": ["tests/model", "tests/callbacks"],
    "keras_woodfisher/data": ["tests/data", "tests/oneshot/test_reading.py"],
    "keras_woodfisher/memory": ["tests/memory", "tests/pruning/test_workspace.py"],
    "keras_woodfisher/options": ["tests/options", "tests/pruning/test_structured_pruning.py"],
    "keras_woodfisher/oneshot/reconstruction": ["tests/oneshot/reconstruction"],
    "backends/keras_woodfisher_backends/kernel": ["tests/backends"],
    "backends/keras_woodfisher_backends/least_squares": ["tests/backends/test_least_squares.py", "tests/oneshot"],
    "backends/keras_woodfisher_backends/ranks": ["tests/backends/test_ranks.py"],
    "backends/keras_woodfisher_backends/sampling": ["tests/backends", "tests/gradients"],
}
"""The core, and the tests of each part of it."""

_SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "zeros": "ones", "ones": "zeros"}
_RENAMED |= {"minimum": "maximum", "maximum": "minimum", "argmin": "argmax", "argmax": "argmin", "floor": "ceil"}


class Mutant(NamedTuple):
    """One change of one expression."""

    path: Path
    line: int
    before: str
    after: str
    text: str


def changed(node: ast.AST) -> ast.AST | None:
    """The expression with one thing changed, if there is something to change."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in _SWAPPED:
        new.ops[0] = _SWAPPED[type(new.ops[0])]()
    elif isinstance(new, (ast.BinOp, ast.BoolOp)) and type(new.op) in _SWAPPED:
        new.op = _SWAPPED[type(new.op)]()
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, (ast.Not, ast.USub, ast.Invert)):
        return new.operand
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Attribute) and new.func.attr in _RENAMED:
        new.func.attr = _RENAMED[new.func.attr]
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Name) and new.func.id in _RENAMED:
        new.func.id = _RENAMED[new.func.id]
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        new.value = not new.value
    elif isinstance(new, ast.Constant) and isinstance(new.value, int):
        new.value += 1
    else:
        return None
    return new


def mutants(path: Path) -> Iterator[Mutant]:
    """All of a file; annotations and strings stay as they are."""
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    left_out = {id(part) for node in ast.walk(tree) for part in _of_types(node)}
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    if not source.isascii():
        return
    for node in ast.walk(tree):
        if id(node) in left_out or not isinstance(node, ast.expr) or (new := changed(node)) is None:
            continue
        assert node.end_lineno is not None and node.end_col_offset is not None
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        after = f"({ast.unparse(new)})"
        yield Mutant(path, node.lineno, source[start:end], after, source[:start] + after + source[end:])


def _of_types(node: ast.AST) -> list[ast.AST]:
    """What belongs to an annotation, a decorator or a text with values in it, what only guards or points, and settings.

    Private numbers of a module are settings that were found by measuring: the next number is nearly as good.
    """
    parts = (
        [inner.value for inner in getattr(node, "body", []) if _is_setting(inner)]
        if isinstance(node, ast.Module)
        else []
    )
    parts += [node.value] if isinstance(node, ast.keyword) and node.arg in ("strict", "stacklevel") else []
    parts += [getattr(node, "annotation", None), getattr(node, "returns", None), *getattr(node, "decorator_list", [])]
    parts += [node] if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Assert)) else []
    return [inner for part in parts if part is not None for inner in ast.walk(part)]


def _is_setting(node: ast.AST) -> bool:
    names = node.targets if isinstance(node, ast.Assign) else []
    return bool(names) and all(isinstance(name, ast.Name) and name.id.startswith("_") for name in names)


def seen(mutant: Mutant, tests: list[str], tree: Path, limit: float) -> bool:
    """Whether a test fails, or doesn't end, with the change made in a copy of the project."""
    place = tree / mutant.path.relative_to(ROOT)
    before = place.read_text("utf-8")
    place.write_text(mutant.text, "utf-8")
    paths = os.pathsep.join([str(tree), str(tree / "backends")])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, timeout=limit, check=False
        )
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        place.write_text(before, "utf-8")


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--number", type=int, default=100)
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--least", type=float, default=0.92, help="the part that must be seen, or the command fails")
    args.add_argument("--limit", type=float, default=600.0, help="seconds for the tests of one room")
    args.add_argument("--room-only", action="store_true", help="leave it at the tests of the room")
    args = args.parse_args()
    found = [
        (mutant, room) for room in ROOMS for path in sorted((ROOT / room).glob("*.py")) for mutant in mutants(path)
    ]
    chosen = random.Random(args.seed).sample(found, min(args.number, len(found)))
    missed, elsewhere = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".venv*", ".git", "__pycache__", "results")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for number, (mutant, room) in enumerate(chosen, start=1):
            answer = "seen" if seen(mutant, ROOMS[room], tree, args.limit) else "MISSED"
            if answer == "MISSED" and not args.room_only and seen(mutant, ["tests"], tree, 2 * args.limit):
                answer = "elsewhere"
                elsewhere += 1
            missed += [mutant] if answer == "MISSED" else []
            where = f"{mutant.path.relative_to(ROOT)}:{mutant.line}"
            print(
                f"{number:4} {answer:9} {where}  {mutant.before!r} -> {mutant.after!r}",
                flush=True,
            )
    print(
        f"{len(chosen) - len(missed)} of {len(chosen)} changes were seen, {elsewhere} of them by tests of other rooms; "
        f"{len(found)} are possible"
    )
    return int(len(missed) > (1.0 - args.least) * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
