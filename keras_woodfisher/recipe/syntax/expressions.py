"""Arithmetic in `eval(...)`: parsed, checked to be nothing else, computed within bounds. Never Python's own eval."""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from keras_woodfisher.options.checks import number_mend
from keras_woodfisher.recipe.syntax.errors import MOST_BITS, RecipeError, short_repr, short_text

LONGEST_EXPRESSION = 1000
DEEPEST_EXPRESSION = 50
MOST_DIGITS = 300
ALLOWED = "numbers, variables, + - * / // % **, parentheses and abs, float, int, max, min, round"

OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
SIGNS: dict[type[ast.AST], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
# Name: the function, and how many arguments it takes at least and at most.
FUNCTIONS: dict[str, tuple[Callable[..., Any], int, float]] = {
    "abs": (abs, 1, 1),
    "float": (float, 1, 1),
    "int": (int, 1, 1),
    "max": (max, 2, math.inf),
    "min": (min, 2, math.inf),
    "round": (round, 1, 2),
}


@dataclass(frozen=True)
class Expression:
    """A parsed expression: its syntax tree, and the variables that it uses."""

    tree: ast.expr
    names: frozenset[str]

    @property
    def bare(self) -> str | None:
        """The variable that it is, where it is nothing else."""
        return self.tree.id if isinstance(self.tree, ast.Name) else None


_EVAL = re.compile(r"\s*eval\((.*)\)\s*", re.DOTALL)
_FOREIGN = re.compile(r"[^\w\s.,+\-*/%()]")


def expression_in(value: Any) -> str | None:
    """What stands within `eval(...)`, where a value is that as a whole.

    >>> expression_in("eval(epochs + 1)"), expression_in("1 + eval(epochs)"), expression_in(3)
    ('epochs + 1', None, None)
    """
    if not isinstance(value, str) or not value.lstrip().startswith("eval("):
        return None
    match = _EVAL.fullmatch(value)
    return match[1] if match else None


@lru_cache
def parse(text: str) -> Expression:
    """Parses an expression and checks that it is arithmetic, and not too long."""
    if len(text) > LONGEST_EXPRESSION:
        raise RecipeError(f"An expression may have up to {LONGEST_EXPRESSION} characters, got {len(text)}.")
    if foreign := _FOREIGN.search(text):
        raise _refusal(text, f"the character {foreign[0]!r}")
    try:
        tree = ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise RecipeError(f"eval({short_text(text)}) isn't an expression: {reason}. Allowed are {ALLOWED}.") from None
    except (MemoryError, RecursionError):
        raise RecipeError(f"eval({short_text(text)}) is nested too deeply. Compute a part in a variable.") from None
    return Expression(tree, frozenset(_checked_names(tree, text)))


def _refusal(text: str, found: str) -> RecipeError:
    return RecipeError(f"eval({short_text(text)}) holds {found}. Allowed are {ALLOWED}.")


def _checked_names(tree: ast.expr, text: str) -> set[str]:
    """Refuses everything but arithmetic, and gives the variables. Works level by level, since a tree may be deep."""
    names: set[str] = set()
    level: list[ast.expr] = [tree]
    for _ in range(DEEPEST_EXPRESSION):
        names |= {node.id for node in level if isinstance(node, ast.Name)}
        level = [part for node in level for part in _parts(node, text)]
        if not level:
            return names
    raise RecipeError(
        f"eval({short_text(text)}) has more than {DEEPEST_EXPRESSION} levels. Compute a part in a variable."
    )


def _parts(node: ast.expr, text: str) -> list[ast.expr]:
    """The operands of an allowed node."""
    match node:
        case ast.BinOp() if type(node.op) in OPERATORS:
            return [node.left, node.right]
        case ast.UnaryOp() if type(node.op) in SIGNS:
            return [node.operand]
        case ast.Call():
            return _arguments(node, text)
        case ast.Constant() if type(node.value) in (int, float):
            if _too_large(node.value):
                raise RecipeError(f"eval({short_text(text)}) holds a number that is too large.")
            return []
        case ast.Name():
            return []
    raise _refusal(text, _describe(node))


def _arguments(node: ast.Call, text: str) -> list[ast.expr]:
    """The arguments of a call, where it is one of an allowed function."""
    if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
        raise _refusal(text, f"a call of {_describe(node.func)}")
    name = node.func.id
    if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
        raise _refusal(text, f"a named or starred argument of {name}()")
    _, least, most = FUNCTIONS[name]
    if not least <= len(node.args) <= most:
        wanted = f"{least}" if least == most else f"{least} or more" if math.isinf(most) else f"{least} or {most}"
        raise RecipeError(f"eval({short_text(text)}): {name}() takes {wanted} argument(s), got {len(node.args)}.")
    return node.args


def _describe(node: ast.expr) -> str:
    match node:
        case ast.Name():
            return short_repr(node.id)
        case ast.Constant():
            return f"the value {short_repr(node.value)}"
        case ast.BinOp() | ast.UnaryOp():
            return f"the operator {type(node.op).__name__}"
        case ast.Attribute():
            return "an attribute (a dot between names)"
        case ast.Tuple():
            return "a tuple (a comma between values)"
    return f"a Python construct ({type(node).__name__})"


def compute(tree: ast.expr, values: Mapping[str, Any]) -> int | float:
    """The number that an expression gives, which `parse` has checked, with the values of all variables in it.

    Raises:
        RecipeError: If a variable is no number, or the result can't be computed (division by zero, too large).
    """
    try:
        return _value(tree, values)
    except ZeroDivisionError:
        problem = "it divides by zero"
    except OverflowError:
        problem = "a value is infinite or too large"
    except ArithmeticError as error:
        problem = str(error)
    raise RecipeError(f"eval({short_text(ast.unparse(tree))}) can't be computed: {problem}.")


def _value(node: ast.expr, values: Mapping[str, Any]) -> int | float:
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, values), _value(node.right, values)
        _bound(node.op, left, right)
        return finite(OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.UnaryOp):
        return finite(SIGNS[type(node.op)](_value(node.operand, values)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return finite(_call(node.func.id, [_value(argument, values) for argument in node.args]))
    if isinstance(node, ast.Name):
        return _number(node.id, values)
    assert isinstance(node, ast.Constant), f"{node!r} isn't arithmetic; it must be checked first"
    return finite(node.value)


def _number(name: str, values: Mapping[str, Any]) -> int | float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        mend = number_mend(value) or "A text or list can only be given as a whole, as in eval(name)."
        raise RecipeError(
            f"Arithmetic needs numbers, but the variable {short_repr(name)} is {short_repr(value)}. {mend}"
        )
    return finite(value)


def _bound(op: ast.operator, left: int | float, right: int | float) -> None:
    """Refuses integers that would take long to compute, before they are computed."""
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    product, power = left.bit_length() + right.bit_length(), left.bit_length() * max(right, 0)
    if (product if isinstance(op, ast.Mult) else power if isinstance(op, ast.Pow) else 0) > MOST_BITS:
        raise OverflowError


def _call(name: str, arguments: list[int | float]) -> Any:
    digits = arguments[1] if name == "round" and len(arguments) == 2 else 0
    if not isinstance(digits, int) or abs(digits) > MOST_DIGITS:
        raise RecipeError(
            f"round() takes a whole number of digits from -{MOST_DIGITS} to {MOST_DIGITS}, got {short_repr(digits)}."
        )
    return FUNCTIONS[name][0](*arguments)


def finite(value: Any) -> int | float:
    """Refuses what isn't a real number that fits, with an ArithmeticError."""
    if isinstance(value, complex):
        raise ArithmeticError("a fractional power of a negative number isn't a real number")
    if isinstance(value, float) and math.isnan(value):
        raise ArithmeticError("a value is not a number (NaN)")
    if _too_large(value):
        raise OverflowError
    return value


def _too_large(value: Any) -> bool:
    return math.isinf(value) if isinstance(value, float) else value.bit_length() > MOST_BITS
