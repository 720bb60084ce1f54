"""Changes of one expression each: `<` to `<=`, `+` to `-`, `min` to `max`, a number to the next one."""

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
    """One change of one expression; `lines` are those of its statement up to it, none where it runs at the import."""

    path: Path
    line: int
    lines: range
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
    for node, first in _expressions(tree):
        if id(node) in left_out or (new := changed(node)) is None:
            continue
        assert node.end_lineno is not None and node.end_col_offset is not None
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        after = f"({ast.unparse(new)})"
        lines = range(first, node.end_lineno + 1) if first else range(0)
        yield Mutant(path, node.lineno, lines, source[start:end], after, source[:start] + after + source[end:])


def _expressions(node: ast.AST, first: int = 0, within: bool = False) -> Iterator[tuple[ast.expr, int]]:
    """Each with the first line of its statement; 0 outside of functions, and for their defaults."""
    for child in ast.iter_child_nodes(node):
        inner = within or (isinstance(node, ast.FunctionDef) and child in node.body)
        line = child.lineno if isinstance(child, ast.stmt) else first
        if isinstance(child, ast.expr):
            yield child, line if inner else 0
        yield from _expressions(child, line, inner)


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
