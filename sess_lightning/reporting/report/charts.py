"""Line charts: numbers in, places on a canvas out; the page's templates draw them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 40, 86, 12, 38
"""Margins for the ticks, the lines' names, half a line of text, and the ticks and name of the x-axis."""
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
MARKED = 60
"""The most points of a line that get markers, which show their value."""
DRAWN = 300
"""The most segments of a line: there are not many more pixels."""
NAME = 11
"""The most letters of a line's name beside its end."""


@dataclass(frozen=True)
class Point:
    """A value with its interval, if there is one, and its label."""

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


@dataclass(frozen=True)
class Axes:
    """A frame with its ticks.

    Attributes:
        rows: Height, text and class of each horizontal line.
        columns: Place and text of each tick of the x-axis.
        x_name: Name of the x-axis.
    """

    rows: Sequence[tuple[float, str, str]]
    columns: Sequence[tuple[float, str]]
    x_name: str


@dataclass(frozen=True)
class Drawn:
    """A line on the canvas.

    Attributes:
        style: Its class in the style sheet.
        points: The points of the polyline.
        band: The points of the polygon of its intervals; empty if there are none.
        stroke: The interval of a single point: x, bottom, top.
        dots: Place and text of its markers; none for a long line.
        end: Place and text of its name.
    """

    style: str
    points: str
    band: str
    stroke: tuple[float, float, float] | None
    dots: Sequence[tuple[float, float, str]]
    end: tuple[float, float, str]


@dataclass(frozen=True)
class Chart:
    """A chart on the canvas.

    Attributes:
        title: What the values are.
        note: What else the reader should know.
        summary: The first and last values in words.
        axes: The frame.
        lines: Its lines; the first one is drawn last, above the others.
    """

    title: str
    note: str
    summary: str
    axes: Axes
    lines: Sequence[Drawn]


def line_chart(
    title: str,
    lines: Sequence[Line],
    bounds: tuple[float, float] | None = None,
    note: str = "",
    *,
    ticks: Sequence[tuple[float, str]],
    x_name: str = "epoch",
) -> Chart:
    """Place lines over x in [0, 1], each named at its end, with its intervals as a band.

    Args:
        title: What the values are.
        lines: At least one, with at least one point.
        bounds: Ends of the y-axis; None takes those of the values, and zero.
        note: What else the reader should know.
        ticks: Of the x-axis.
        x_name: Name of the x-axis.
    """
    values = [v for line in lines for p in line.points for v in (p.y, p.low, p.high) if v is not None]
    rows = _ticks(min(0.0, *values), max(0.0, *values)) if bounds is None else _ticks(*bounds)
    low, high = rows[0], rows[-1]
    ends = _apart([_y(line.points[-1].y, low, high) for line in lines])
    return Chart(
        title,
        note,
        "; ".join(f"{line.name} {line.points[0]}, {line.points[-1]}".strip() for line in lines),
        _axes(rows, ticks, x_name),
        [_drawn(line, low, high, end) for line, end in zip(lines, ends, strict=True)],
    )


def share_axes() -> Axes:
    """Return the axes for mean insertion or deletion curves, all from 0 to 1."""
    share = [(i / 4, f"{25 * i} %") for i in range(5)]
    return _axes([i / 4 for i in range(5)], share, "pixels changed, most salient first")


def _axes(rows: Sequence[float], columns: Sequence[tuple[float, str]], x_name: str) -> Axes:
    step = rows[1] - rows[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(round(step, digits) - step) > 1e-9:
        digits += 1  # Steps of 0.25.
    return Axes(
        [
            (_y(row, rows[0], rows[-1]), f"{row + 0.0:.{digits}f}", "zero" if abs(row) < 1e-12 else "grid")
            for row in rows
        ],
        [(_x(x), text) for x, text in columns],
        x_name,
    )


def _x(x: float) -> float:
    return LEFT + x * INNER_WIDTH


def _y(y: float, low: float, high: float) -> float:
    return TOP + (high - y) / (high - low) * INNER_HEIGHT


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return evenly spaced round values that enclose the range."""
    span = high - low or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if span / (m * magnitude) <= about + 0.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _drawn(line: Line, low: float, high: float, end: float) -> Drawn:
    points = [(_x(p.x), _y(p.y, low, high)) for p in _extremes(line.points)]
    known = [
        (_x(p.x), _y(p.low, low, high), _y(p.high, low, high))
        for p in _widest(line.points)
        if p.low is not None and p.high is not None
    ]
    edge = [(x, top) for x, _, top in known] + [(x, bottom) for x, bottom, _ in reversed(known)]
    marked = line.points if len(line.points) <= MARKED else []
    return Drawn(
        line.style,
        _pairs(points),
        _pairs(edge) if len(known) > 1 else "",
        known[0] if len(known) == 1 else None,
        [(_x(p.x), _y(p.y, low, high), f"{line.name}, {p}".removeprefix(", ")) for p in marked],
        (_x(line.points[-1].x) + 8, end, _short(line.name)),
    )


def _stretches(points: Sequence[Point]) -> Iterator[Sequence[Point]]:
    size = max(1, -(-len(points) // DRAWN))
    return (points[i : i + size] for i in range(0, len(points), size))


def _extremes(points: Sequence[Point]) -> list[Point]:
    """Return the lowest and the highest point of each segment: no outlier of a long training is lost."""
    if len(points) <= DRAWN:
        return list(points)
    kept = [points[0]]
    for part in _stretches(points):
        ends = {part.index(min(part, key=lambda p: p.y)), part.index(max(part, key=lambda p: p.y))}
        kept += [part[i] for i in sorted(ends)]
    return [*kept, points[-1]]


def _widest(points: Sequence[Point]) -> list[Point]:
    """Return a point for each segment, with an interval that encloses all its intervals."""
    kept: list[Point] = []
    for part in _stretches([p for p in points if p.low is not None and p.high is not None]):
        lows, highs = [p.low for p in part if p.low is not None], [p.high for p in part if p.high is not None]
        kept.append(Point(part[0].x, part[0].y, min(lows), max(highs)))
    return kept


def _apart(heights: Sequence[float], gap: float = 14.0) -> list[float]:
    """Return the places of the names, pushed apart where lines end close to each other."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    places: list[float] = []
    for i in order:
        places.append(max(heights[i], places[-1] + gap) if places else heights[i])
    places[-1] = min(places[-1], float(HEIGHT - BOTTOM))
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - gap)
    by_line = dict(zip(order, places, strict=True))
    return [by_line[i] + 4 for i in range(len(heights))]


def _short(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


def _pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
