"""Line charts as SVG text: numbers in, markup out. Colours and sizes are the page's style sheet's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 40, 86, 12, 38
"""Room for the ticks, the lines' names, half a line of text, and the ticks and name of the x-axis."""
MARKED = 60
"""Most points of a line that get markers, which tell their value."""
NAME = 11
"""Most letters of a line's name beside its end."""


@dataclass(frozen=True)
class Point:
    """A value with its interval, if there is one, and what it is the value of."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    at: str = ""

    def __str__(self) -> str:
        around = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.at}: {self.y:.3f}{around}"


@dataclass(frozen=True)
class Line:
    """A named line; ``style`` is a class of the style sheet."""

    name: str
    points: Sequence[Point]
    style: str


def line_chart(
    title: str,
    lines: Sequence[Line],
    ticks: Sequence[tuple[float, str]],
    *,
    x_name: str = "epoch",
    bounds: tuple[float, float] | None = None,
    note: str = "",
    number: int = 0,
) -> str:
    """Draw lines over x in [0, 1], each named at its end, with its intervals as a band.

    Args:
        title: What the values are.
        lines: At least one, with at least one point.
        ticks: Of the x-axis.
        x_name: Name of the x-axis.
        bounds: Of the y-axis; None takes those of the values, and zero.
        note: What else the reader should know.
        number: Tells this chart from the page's others.
    """
    values = [v for line in lines for p in line.points for v in (p.y, p.low, p.high) if v is not None]
    rows = _ticks(min(0.0, *values), max(0.0, *values)) if bounds is None else _ticks(*bounds)
    low, high = rows[0], rows[-1]
    body = [_frame(rows, ticks, low, high, x_name)]
    body += [_band(line, low, high) for line in reversed(lines)]
    body += [_line(line, low, high) for line in reversed(lines)]
    body += _names(lines, low, high)
    told = "; ".join(f"{line.name} {line.points[0]}, {line.points[-1]}" for line in lines)
    return (
        f'<figure class="chart"><h3 id="chart-{number}">{escape(title)}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="chart-{number}" aria-describedby="told-{number}">'
        f'<desc id="told-{number}">{escape(f"First and last values: {told}.")}</desc>{"".join(body)}'
        f'<line class="now" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f"{f'<figcaption>{escape(note)}</figcaption>' if note else ''}</figure>"
    )


def curve_frame(title: str, css: str) -> str:
    """Draw the axes that mean insertion or deletion curves are put into, all of them from 0 to 1."""
    share = [(i / 4, f"{25 * i} %") for i in range(5)]
    frame = _frame([i / 4 for i in range(5)], share, 0.0, 1.0, "pixels changed, most salient first")
    return (
        f'<figure class="chart {css}"><h4>{escape(title)}</h4>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{frame}'
        f'<svg class="lines" x="{LEFT}" y="{TOP}" width="{_inner_width()}" height="{_inner_height()}" '
        'viewBox="0 0 1 1" preserveAspectRatio="none"></svg></svg><ul class="legend"></ul></figure>'
    )


def _inner_width() -> int:
    return WIDTH - LEFT - RIGHT


def _inner_height() -> int:
    return HEIGHT - TOP - BOTTOM


def _x(x: float) -> float:
    return LEFT + x * _inner_width()


def _y(y: float, low: float, high: float) -> float:
    return TOP + (high - y) / (high - low) * _inner_height()


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round values, evenly apart, that enclose the range."""
    span = high - low or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if span / (m * magnitude) <= about + 0.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _frame(
    rows: Sequence[float], columns: Sequence[tuple[float, str]], low: float, high: float, x_name: str
) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    digits = max(0, -math.floor(math.log10(rows[1] - rows[0]) + 1e-9))
    if abs(round(rows[1] - rows[0], digits) - (rows[1] - rows[0])) > 1e-9:
        digits += 1  # Steps of 0.25.
    parts = []
    for row in rows:
        y = _y(row, low, high)
        css = "zero" if abs(row) < 1e-12 else "grid"
        parts.append(f'<line class="{css}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{row + 0.0:.{digits}f}</text>')
    for x, name in columns:
        parts.append(f'<text x="{_x(x):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(name)}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_name)}</text>')
    return f'<g class="axes" aria-hidden="true">{"".join(parts)}</g>'


def _band(line: Line, low: float, high: float) -> str:
    found = [(_x(p.x), _y(p.low, low, high), _y(p.high, low, high))
             for p in line.points if p.low is not None and p.high is not None]  # fmt: skip
    if not found:
        return ""
    if len(found) == 1:
        x, bottom, top = found[0]
        return f'<line class="{line.style} line" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>'
    edge = [(x, top) for x, _, top in found] + [(x, bottom) for x, bottom, _ in reversed(found)]
    return f'<polygon class="{line.style} band" points="{_pairs(edge)}"/>'


def _line(line: Line, low: float, high: float) -> str:
    at = [(_x(p.x), _y(p.y, low, high)) for p in line.points]
    drawn = f'<polyline class="{line.style} line" points="{_pairs(at)}"/>'
    if len(at) <= MARKED:
        drawn += "".join(
            f'<circle class="{line.style} dot" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{escape(f'{line.name}, {point}')}</title></circle>"
            for (x, y), point in zip(at, line.points, strict=True)
        )
    return drawn


def _names(lines: Sequence[Line], low: float, high: float, apart: float = 14) -> list[str]:
    """Write each line's name beside its end, pushed apart where ends are close."""
    ends = sorted((_y(line.points[-1].y, low, high), i) for i, line in enumerate(lines))
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + apart) if places else y)
    places[-1] = min(places[-1], HEIGHT - BOTTOM)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - apart)
    names = []
    for y, (_, i) in zip(places, ends, strict=True):
        line = lines[i]
        shown = line.name if len(line.name) <= NAME else line.name[: NAME - 1] + "…"
        names.append(
            f'<text class="{line.style} name" x="{_x(line.points[-1].x) + 8:.1f}" y="{y + 4:.1f}" '
            f'aria-hidden="true">{escape(shown)}</text>'
        )
    return names


def _pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
