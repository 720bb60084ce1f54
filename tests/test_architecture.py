"""The rooms of docs/architecture.md: imports run down from floor to floor, without circles at any level."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE, BACKENDS = "keras_woodfisher", "keras_woodfisher_backends"
FLOORS = (
    ("backends", "options"),
    ("model", "memory"),
    ("gradients", "reports"),
    ("pruning",),
    ("callbacks", "oneshot", "deployment"),
    ("recipe",),
    ("face",),
    ("cli",),
)
"""From the ground up; `face` is the package's `__init__`."""


def modules():
    """Every module of both packages, by its dotted name."""
    found = {}
    for folder in (ROOT, ROOT / "backends"):
        for path in [*(folder / CORE).rglob("*.py"), *(folder / BACKENDS).rglob("*.py")]:
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FOUND = modules()


def imports_of(path):
    """The modules of both packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FOUND)
        if isinstance(node, ast.ImportFrom) and node.module in FOUND:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FOUND else node.module


GRAPH = {name: sorted({other for other in imports_of(path) if other != name}) for name, path in FOUND.items()}


def room(name):
    if name.split(".")[0] == BACKENDS:
        return "backends"
    return "face" if name == CORE else name.split(".")[1]


def test_every_room_has_its_floor():
    assert {room(name) for name in FOUND} == {name for floor in FLOORS for name in floor}
    entries = [path for path in (ROOT / CORE).iterdir() if path.name not in ("py.typed", "__pycache__")]
    assert len(entries) <= 12
    assert len(FLOORS) <= 8


def test_imports_run_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{name} -> {other}"
        for name, others in GRAPH.items()
        for other in others
        if room(name) != room(other) and floor[room(other)] >= floor[room(name)]
    ]
    assert not wrong


def test_there_are_no_circles():
    list(TopologicalSorter({name: others for name, others in GRAPH.items() if name != CORE}).static_order())


def test_adapters_and_the_core_know_no_framework_of_others():
    frameworks = {"torch", "tensorflow", "jax"}
    for name, path in FOUND.items():
        parts = name.split(".")
        allowed = {parts[1]} if parts[0] == BACKENDS and len(parts) > 1 else set()
        found = {
            (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert found & frameworks <= allowed, name


def test_tests_mirror_the_rooms():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders == {name for floor in FLOORS for name in floor} - {"face"}
