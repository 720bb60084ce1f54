"""Curves as inline SVG."""

import math
from collections.abc import Mapping, Sequence

from keras_woodfisher.reports.html.elements import text
from keras_woodfisher.reports.html.style import COLORS

_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 12, 36
"""Room for the labels of axes; text is 11 units high, and a page shows a unit as a pixel or somewhat more."""

MOST_CURVES = len(COLORS)
"""More of them can't be told apart."""

_MOST_DOTS = 40
"""A curve of more points has none of them marked."""

Points = Sequence[tuple[float, float]]


def curves(series: Mapping[str, Points], title: str, x_label: str, limits: tuple[float, float] | None = None) -> str:
    """A figure with a curve a name; points that aren't finite interrupt it.

    Args:
        series: At most `MOST_CURVES` names, each with points (x, y).
        title: What the y axis shows.
        x_label: What the x axis shows.
        limits: Of the y axis, where the points needn't set them.

    Returns:
        HTML, or "" where no point is finite.
    """
    finite = [point for points in series.values() for point in points if _is_finite(point)]
    if not finite:
        return ""
    x_range = _widened(min(x for x, _ in finite), max(x for x, _ in finite))
    y_range = limits or _widened(min(y for _, y in finite), max(y for _, y in finite))
    x_ticks, y_ticks = _ticks(*x_range), _ticks(*y_range)
    # Curves begin and end on a line of the grid.
    y_range = (min(y_range[0], y_ticks[0]), max(y_range[1], y_ticks[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_range[0], tick)
        parts.append(f'<line class="kw-grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text(_label(tick))}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_range[0])
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{text(_label(tick))}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{text(x_label)}</text>')
    for number, points in enumerate(series.values()):
        for run in _runs(points):
            parts += _curve([place(*point) for point in run], number)
    legend = "".join(
        f'<span><i style="background:var(--c{number})"></i>{text(name)}</span>' for number, name in enumerate(series)
    )
    drawing = "\n".join(parts)
    return (
        f"<figure><figcaption><strong>{text(title)}</strong><br>{legend}</figcaption>\n"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(title)}">\n{drawing}\n</svg></figure>'
    )


def side_by_side(figures: Sequence[str]) -> str:
    """Figures in a row, or one under the other where the page is narrow; "" where there are none."""
    found = [figure for figure in figures if figure]
    return f'<div class="kw-charts">{"".join(found)}</div>' if found else ""


def _curve(places: Points, number: int) -> list[str]:
    color = f"var(--c{number})"
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marked = places if len(places) <= _MOST_DOTS else ()
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" style="fill:{color}"/>' for x, y in marked]
    return [f'<polyline class="kw-curve" points="{line}" style="stroke:{color}"/>', *dots]


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """The points between those that aren't finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if _is_finite(point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _is_finite(point: tuple[float, float]) -> bool:
    return all(map(math.isfinite, point))


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that isn't empty, nor lost in the rounding of its ends."""
    least = 1e-6 * max(abs(low), abs(high)) or 1.0
    return (low, high) if high - low > least else (low - least / 2, high + least / 2)


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from the one at or below `low` to the one at or above `high`, or within where they are few."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _label(value: float) -> str:
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")
