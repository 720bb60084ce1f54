"""Weights that a report isn't about: which, how many, why, and how to name them."""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from keras_woodfisher.options.checks import as_json

_LISTED = 3
"""Names that are printed for each reason."""

_SUGGESTED = 6
"""Of more names and patterns than that, the text says `"__ALL__"`."""

_NUMBER = re.compile(r"_?\d+")


@dataclass(frozen=True)
class LeftOutVariable:
    """One variable with two axes or more that wasn't considered.

    Attributes:
        name: Its path.
        shape: Its shape.
        weights: Its number of weights.
        pruned: How many of them are zero all the same; None where they can't be read.
        reason: Why it was left out.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    pruned: int | None
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """What wasn't considered of a model's weights, biases and other vectors aside.

        >>> left_out = kw.sparsity_report(model, ["hidden/kernel"]).left_out
        >>> left_out.weights, left_out.share, left_out.params
        (48, 0.6, ('hidden/kernel', 'sequential/out/kernel'))

    Attributes:
        variables: One entry a variable.
        considered: How many weights were considered.
        params: What to give as `params` to take them too; () where that isn't possible.
    """

    variables: tuple[LeftOutVariable, ...] = ()
    considered: int = 0
    params: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return sum(v.weights for v in self.variables)

    @property
    def pruned(self) -> int:
        return sum(v.pruned or 0 for v in self.variables)

    @property
    def share(self) -> float:
        """The part of all weights, considered or not."""
        return self.weights / (self.weights + self.considered) if self.variables else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return as_json(asdict(self)) | {"weights": self.weights, "pruned": self.pruned, "share": self.share}

    def lines(self) -> list[str]:
        """The same as text; nothing where nothing was left out."""
        if not self.variables:
            return []
        lines = [
            f"not considered: {_counted(self.variables)}, {100 * self.share:.1f} % of the model's, biases and other "
            "vectors aside"
        ]
        for reason in dict.fromkeys(v.reason for v in self.variables):
            alike = [v for v in self.variables if v.reason == reason]
            more = ", ..." if len(alike) > _LISTED else ""
            lines.append(f"  {reason}: {_counted(alike)}: {', '.join(v.name for v in alike[:_LISTED])}{more}")
        if self.params:
            suggestion = list(self.params) if len(self.params) <= _SUGGESTED else "__ALL__"
            lines.append(f"  to take them too: params={suggestion!r}")
        return lines


NOTHING = LeftOut()


def _counted(variables: Sequence[LeftOutVariable]) -> str:
    number = len(variables)
    return f"{number} variable{'s' * (number > 1)} with {sum(v.weights for v in variables):,} weights"


def patterns_of(names: Sequence[str], avoid: Collection[str]) -> list[str]:
    r"""Names as `params` takes them, those that differ in numbers only as one pattern.

    >>> patterns_of(["block/mix/w", "block_1/mix/w", "block_2/mix/w", "head/w"], [])
    ['re:block(_?\\d+)?/mix/w$', 'head/w']

    Args:
        names: Paths of variables.
        avoid: Paths that a pattern mustn't match.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_NUMBER.sub("", name), []).append(name)
    return [item for group in alike.values() for item in _pattern(list(dict.fromkeys(group)), avoid)]


def _pattern(group: list[str], avoid: Collection[str]) -> list[str]:
    pieces = _NUMBER.split(max(group, key=lambda name: len(_NUMBER.findall(name))))
    pattern = r"(_?\d+)?".join(map(re.escape, pieces)) + "$"
    fits = all(re.match(pattern, name) for name in group) and not any(re.match(pattern, name) for name in avoid)
    return [f"re:{pattern}"] if fits and len(group) > 1 else group
