"""A recipe's variables: in which order they are computed, and what values then say."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from typing import Any

from keras_woodfisher.recipe.syntax.errors import RecipeError, short_repr, suggest_names
from keras_woodfisher.recipe.syntax.expressions import Expression, compute, expression_in, parse
from keras_woodfisher.recipe.syntax.tree import Items, Node, Pairs, Scalar, describe, parts_of, refuse_tags

LONGEST_TOGETHER = 50_000


class Scope:
    """The variables that a part of a recipe sees.

    Args:
        own: The part's own variables, which may refer to each other in any order.
        outer: The scope around it. A variable of the same name is shadowed here, and stays what it is there.

    Raises:
        RecipeError: If a variable can't be computed (a cycle, an unknown name, no arithmetic).
    """

    def __init__(self, own: Mapping[str, Node], outer: "Scope | None" = None) -> None:
        self.expressions: _Expressions = outer.expressions if outer else _Expressions()
        self._results: dict[str, Node] = {}
        # A chain, not a copy: there may be thousands of stages.
        self.nodes: ChainMap[str, Node] = ChainMap({}, outer.nodes if outer else {})
        for name in self._order(own):
            self.nodes[name] = self.evaluate(own[name], name)

    def evaluate(self, node: Node, field: str | None) -> Node:
        """The node with each `eval(...)` in it computed; tags are refused, and messages say `field`."""
        refuse_tags(node, field)
        return self._evaluate(node, field)

    def _evaluate(self, node: Node, field: str | None) -> Node:
        if isinstance(node, Scalar):
            return self._scalar(node, field)
        if isinstance(node, Items):
            return Items(tuple(self._evaluate(item, field) for item in node.items), node.line)
        return Pairs(tuple(self._pair(key, value, field) for key, value in node.pairs), node.line)

    def _pair(self, key: Scalar, value: Node, field: str | None) -> tuple[Scalar, Node]:
        name = self._evaluate(key, field)
        if not isinstance(name, Scalar):
            raise RecipeError(
                f"A key must be a name or a number, but {short_repr(key.value)} gives {describe(name)}.",
                line=key.line,
                field=field,
            )
        path = str(name.value)[:100]
        return name, self._evaluate(value, f"{field}.{path}" if field else path)

    def _scalar(self, node: Scalar, field: str | None) -> Node:
        text = expression_in(node.value)
        if text is None:
            return node
        with _placed(node, field):
            if text not in self._results:
                self._results[text] = self._compute(self.expressions.take(text))
        result = self._results[text]
        return Scalar(result.value, node.line) if isinstance(result, Scalar) else result

    def _compute(self, expression: Expression) -> Node:
        for name in sorted(expression.names - self.nodes.keys()):
            raise RecipeError(_unknown_name(name, self.nodes))
        if expression.bare is None:
            return Scalar(compute(expression.tree, {name: _value(self.nodes[name]) for name in expression.names}))
        return self.nodes[expression.bare]

    def _order(self, own: Mapping[str, Node]) -> list[str]:
        """The own variables, each after those that it uses."""
        uses: dict[str, set[str]] = {}
        for name, node in own.items():
            names = self._names(node, name)
            uses[name] = names & own.keys()
            for other in sorted(names - uses[name]):
                if other not in self.nodes:
                    raise RecipeError(_unknown_name(other, {**own, **self.nodes}), line=node.line, field=name)
        try:
            return list(TopologicalSorter(uses).static_order())
        except CycleError as error:
            cycle = " -> ".join(short_repr(name) for name in reversed(error.args[1][:20]))
            first = error.args[1][0]
            raise RecipeError(
                f"Variables are computed from each other in a circle: {cycle}. Give one of them a number.",
                line=own[first].line,
                field=first,
            ) from None

    def _names(self, node: Node, field: str) -> set[str]:
        """The variables that a value uses."""
        if isinstance(node, Scalar) and (text := expression_in(node.value)) is not None:
            with _placed(node, field):
                return set(self.expressions.take(text).names)
        return {name for part in parts_of(node) for name in self._names(part, field)}


class _Expressions:
    """The expressions of one recipe: the work on all of them together is bounded."""

    def __init__(self) -> None:
        self._length = 0

    def take(self, text: str) -> Expression:
        """A parsed expression, to be looked at or computed once."""
        self._length += len(text)
        if self._length > LONGEST_TOGETHER:
            raise RecipeError(
                f"The expressions of a recipe may have up to {LONGEST_TOGETHER} characters together, counted each time "
                "that they are computed. Compute what they share in a variable."
            )
        return parse(text)


@contextmanager
def _placed(node: Node, field: str | None) -> Iterator[None]:
    """Says in an error where it is."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(error.message, line=node.line, field=field) from None


def _unknown_name(name: str, known: Mapping[str, Node]) -> str:
    return f"The variable {short_repr(name)} is unknown. {suggest_names(name, known)}"


def _value(node: Node) -> Any:
    """What arithmetic sees of a variable: of a list or mapping, that it is one."""
    if isinstance(node, Scalar):
        return node.value
    return [] if isinstance(node, Items) else {}
