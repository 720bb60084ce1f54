"""The arithmetic of `eval(...)`: what may be computed, and within which bounds."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.wording import MOST_BITS, cut, nearest, shown

MOST_DIGITS = 300
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


def compute(tree: ast.expr, values: Mapping[str, Any]) -> int | float:
    """The number that an expression gives.

    Args:
        tree: A syntax tree that `parse` has checked, so that it holds arithmetic only.
        values: The variables' values. Those that aren't numbers can't be used here.

    Raises:
        RecipeError: If a name is unknown or no number, or the result can't be had (division by zero, too large).
    """
    try:
        return _value(tree, values)
    except ZeroDivisionError:
        problem = "it divides by zero"
    except OverflowError:
        problem = "a value is infinite or too large"
    except ArithmeticError as error:
        problem = str(error)
    raise RecipeError(f"eval({cut(ast.unparse(tree))}) can't be computed: {problem}.")


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
    if isinstance(node, ast.Constant):
        return finite(node.value)
    raise TypeError(f"{node!r} isn't arithmetic; it must be checked first.")


def _number(name: str, values: Mapping[str, Any]) -> int | float:
    if name not in values:
        raise RecipeError(unknown_name(name, values))
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(
            f"Arithmetic needs numbers, but the variable {shown(name)} is {shown(value)}. "
            "A text or list can only be given as a whole, as in eval(name)."
        )
    return finite(value)


def unknown_name(name: str, known: Mapping[str, Any]) -> str:
    return f"The variable {shown(name)} is unknown. {nearest(name, known)}"


def _bound(op: ast.operator, left: int | float, right: int | float) -> None:
    """Refuses integers that would take long to compute, before they are computed."""
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    bits = {
        ast.Mult: left.bit_length() + right.bit_length(),
        ast.Pow: left.bit_length() * max(right, 0),
    }.get(type(op), 0)
    if bits > MOST_BITS:
        raise OverflowError


def _call(name: str, arguments: list[int | float]) -> Any:
    if name == "round" and len(arguments) == 2:
        digits = arguments[1]
        if not isinstance(digits, int) or abs(digits) > MOST_DIGITS:
            raise RecipeError(
                f"round() takes a whole number of digits from -{MOST_DIGITS} to {MOST_DIGITS}, got {shown(digits)}."
            )
    return FUNCTIONS[name][0](*arguments)


def finite(value: Any) -> int | float:
    """Refuses what isn't a real number that fits.

    Raises:
        ArithmeticError: If it is complex, not a number, infinite, or an integer of too many bits.
    """
    if isinstance(value, complex):
        raise ArithmeticError("a fractional power of a negative number isn't a real number")
    if isinstance(value, float) and math.isnan(value):
        raise ArithmeticError("a value is not a number (NaN)")
    if (isinstance(value, float) and math.isinf(value)) or (isinstance(value, int) and value.bit_length() > MOST_BITS):
        raise OverflowError
    return value
