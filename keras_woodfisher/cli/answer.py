"""What a command answers: a text for people and plain data for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_woodfisher.reports.rendering import aligned


@dataclass(frozen=True)
class Answer:
    """The outcome of a command.

    Attributes:
        text: What people read.
        data: The same as plain data, for `--json`.
        code: The exit code.
    """

    text: str
    data: Mapping[str, Any]
    code: int = 0


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None, left: int = 1
) -> str:
    """Aligned columns, the first ones to the `left`, with a line under the header and one above the total."""
    lines = aligned([tuple(row) for row in (header, *rows, *([total] if total else []))], left)
    rule = "-" * len(lines[0])
    lines.insert(1, rule)
    if total:
        lines.insert(-1, rule)
    return "\n".join(line.rstrip() for line in lines)
