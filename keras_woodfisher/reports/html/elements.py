"""The parts of a page: sections, tables, lists and figures, with every text escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Cells = Sequence[Sequence[str]]
"""A table as plain text has it: rows of cells, the first one the header."""


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        title: Its heading, as plain text.
        body: What is under it, as HTML.
    """

    title: str
    body: str


def text(value: object) -> str:
    """Any text as HTML; quotes too, so that it may stand in an attribute."""
    return escape(str(value), quote=True)


def table(cells: Cells, left: int = 1, shares: Sequence[float] | None = None, total: bool = False) -> str:
    """A table that scrolls by itself where the page is narrow.

    Args:
        cells: Rows of text, the first one the header.
        left: So many columns are flush left, the others flush right.
        shares: For each row under the header how full the bar is that stands in its last cell, in [0, 1].
        total: Whether the last row sums the others up.
    """
    header, *rows = cells
    head = "".join(f"<th{_side(column, left)}>{text(cell)}</th>" for column, cell in enumerate(header))
    body = [
        "".join(
            _cell(cell, column, left, None if shares is None or column + 1 < len(row) else shares[number])
            for column, cell in enumerate(row)
        )
        for number, row in enumerate(rows)
    ]
    marks = [' class="kw-total"' if total and number == len(rows) - 1 else "" for number in range(len(rows))]
    lines = "".join(f"<tr{mark}>{row}</tr>\n" for mark, row in zip(marks, body, strict=True))
    # It can be scrolled with the keys alone, too.
    return (
        f'<div class="kw-scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{lines}</tbody></table></div>"
    )


def heat_table(cells: Cells, shades: Sequence[Sequence[float]]) -> str:
    """A table whose cells are the darker the more there is in them.

    Args:
        cells: As in `table`.
        shades: For each row under the header the shades of its last cells, in [0, 1].
    """
    header, *rows = cells
    head = "".join(f"<th{_side(column, 1)}>{text(cell)}</th>" for column, cell in enumerate(header))
    lines = []
    for row, shade in zip(rows, shades, strict=True):
        plain = "".join(_cell(cell, column, 1, None) for column, cell in enumerate(row[: -len(shade)]))
        shaded = "".join(
            f'<td class="kw-heat" style="--shade:{100 * value:.0f}%">{text(cell)}</td>'
            for cell, value in zip(row[-len(shade) :], shade, strict=True)
        )
        lines.append(f"<tr>{plain}{shaded}</tr>\n")
    return (
        f'<div class="kw-scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody></table></div>"
    )


def _cell(cell: str, column: int, left: int, share: float | None) -> str:
    if share is None:
        return f"<td{_side(column, left)}>{text(cell)}</td>"
    bar = f'<span class="kw-bar"><span style="width:{100 * min(max(share, 0.0), 1.0):.2f}%"></span></span>'
    return f'<td class="kw-share">{bar}<span>{text(cell)}</span></td>'


def _side(column: int, left: int) -> str:
    return ' class="kw-left"' if column < left else ""


def tiles(figures: Mapping[str, str]) -> str:
    """The few numbers that matter most, by their names."""
    found = "".join(
        f"<div><span>{text(name)}</span><strong>{text(value)}</strong></div>" for name, value in figures.items()
    )
    return f'<div class="kw-tiles">{found}</div>'


def settings(values: Mapping[str, Any]) -> str:
    """Options and what they were."""
    pairs = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in values.items())
    return f"<dl>{pairs}</dl>"


def bullets(lines: Sequence[str]) -> str:
    """A list; a line that is indented belongs to the one before it."""
    items: list[list[str]] = []
    for line in lines:
        if line.startswith(" ") and items:
            items[-1].append(line)
        else:
            items.append([line])
    inner = (
        text(first) + ("<ul>" + "".join(f"<li>{text(part.strip())}</li>" for part in more) + "</ul>" if more else "")
        for first, *more in items
    )
    return "<ul>" + "".join(f"<li>{item}</li>" for item in inner) + "</ul>"


def paragraph(line: str) -> str:
    """A few words."""
    return f"<p>{text(line)}</p>"
