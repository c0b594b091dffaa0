"""The page's content: records in, texts and charts out. The renderer escapes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sess_lightning.reporting.dashboard import CONTROLS, rivals
from sess_lightning.reporting.report.charts import Chart, Line, Point, line_chart
from sess_lightning.reporting.report.records import RunRecord
from sess_lightning.scores import (
    CURVES,
    CURVES_N,
    DRIFT_INITIAL,
    DRIFT_PREVIOUS,
    FLAT,
    OVERALL,
    POINTING_GAME,
    REGION_SHARE,
    RELEVANCE_MASS,
    SCORES,
    Key,
    Score,
    build,
    column_label,
    split,
)

STYLES = {"base": "base", "random": "random", "centre": "centre"}
FURTHER = 5
"""Number of styles for methods with other names."""
ORDER = [SCORES[OVERALL], *(score for score in SCORES.values() if score.key != OVERALL)]
"""The summarising score comes first."""
COMPARED = (OVERALL, POINTING_GAME, RELEVANCE_MASS)
"""Scores whose differences have a chart; those of the others are in the table."""
TILES = (*COMPARED, *CURVES)
BESIDE = {REGION_SHARE: (RELEVANCE_MASS, "object size"), DRIFT_INITIAL: (DRIFT_PREVIOUS, "first run")}
"""Score -> the score in whose chart it is drawn, and the name of its line there."""
SMALL = 0.01
"""The axis of differences is at least this large: a tighter one would make noise look like a finding."""
OWN_METRICS = 8
"""The most charts of the user's own metrics."""
TICKS = 7
"""The most ticks of an x-axis."""


@dataclass(frozen=True)
class Tile:
    """A score after the last run: its value, and each compared method's name, value and paired difference."""

    name: str
    value: str
    interval: str = ""
    note: str = ""
    rows: Sequence[tuple[str, str, str]] = ()


class Sketch(NamedTuple):
    """A chart's title, its lines, the ends of its y-axis if they are fixed, and a note."""

    title: str
    lines: Sequence[Line]
    bounds: tuple[float, float] | None = None
    note: str = ""


class Content:
    """The texts and charts of a training.

    Args:
        records: Its runs, in order; curves, panels and tables are not read.
    """

    def __init__(self, records: Sequence[RunRecord]) -> None:
        self.records = records
        self.last = records[-1]
        names = dict.fromkeys(key for record in records for key in record.scalars)
        self.keys = {key: split(key) for key in names}
        self.methods = _methods(self.last, self.keys.values())
        self.x_name, self.places = _places(records)

    @property
    def title(self) -> str:
        """Headline of the page."""
        return f"{self.last.settings.get('model', 'Model')}: explanations by {self.last.method}"

    @property
    def when(self) -> str:
        """How many runs there are, and when the last one was."""
        count = len(self.records)
        return f"{count} validation run{'s' * (count > 1)}, last after {when(self.last)}"

    @property
    def styles(self) -> dict[str, str]:
        """Key of a method -> its class in the style sheet."""
        others = [method for method in self.methods if method not in STYLES]
        further = {method: f"further{i % FURTHER}" for i, method in enumerate(others)}
        return {"": "own", **STYLES, **further}

    def alerts(self) -> Iterator[tuple[str, str]]:
        """Yield the alerts, with their time."""
        for record in self.records:
            for text in record.alerts:
                yield when(record), text

    def tiles(self) -> Iterator[Tile]:
        """Yield the model's accuracy and the main scores, after the last run."""
        if (name := _accuracy(self.last)) in self.last.metrics:
            first = self.records[0].metrics.get(name)
            change = "" if first is None or len(self.records) < 2 else f"from {first:.3f}"
            yield Tile(f"Accuracy: {name}", f"{self.last.metrics[name]:.3f}", change)
        for score in (SCORES[key] for key in TILES):
            if score.key in self.last.scalars:
                yield self._tile(score)
        yield from self._flat_maps()

    def _tile(self, score: Score) -> Tile:
        last, note = self.last, f"{_better(score)}; {self.last.method} minus the others:"
        rows = [
            (self._name(method, score), f"{last.scalars[key]:.3f}", _difference(last, score, method))
            for method in self.methods
            if (key := build(score.key, method)) in last.scalars
        ]
        if score.key == RELEVANCE_MASS and REGION_SHARE in last.scalars:
            rows.insert(0, (SCORES[REGION_SHARE].label, f"{last.scalars[REGION_SHARE]:.3f}", ""))
        name = f"{score.label} = {score.note}" if score.key == OVERALL else score.label
        return Tile(name, f"{last.scalars[score.key]:.3f}", _interval(last, score.key), note, rows)

    def _flat_maps(self) -> Iterator[Tile]:
        """Yield how many maps show nothing, if there are any; controls are not maps of the model."""
        last = self.last
        methods = [method for method in ("", *self.methods) if method not in CONTROLS]
        counts = {
            method: f"{last.scalars[key]:.0f} of {last.scalars.get('n', 0):.0f}"
            for method in methods
            if (key := build(FLAT, method)) in last.scalars
        }
        if any(last.scalars[build(FLAT, method)] for method in counts):
            rows = [(self._label(method), text, "") for method, text in counts.items() if method]
            yield Tile(
                "Flat maps", counts.get("", "–"), note="They show nothing; the same images:", rows=rows
            )

    def charts(self) -> Iterator[Chart]:
        """Yield a chart of each score, one of its differences to other methods, and of each user's metric."""
        ticks = [
            (x, str(getattr(record, self.x_name)))
            for x, record in zip(self.places, self.records, strict=True)
        ]
        ticks = ticks[:: -(-len(ticks) // TICKS)]
        for sketch in self._sketches():
            if sketch.lines:
                yield line_chart(*sketch, ticks=ticks, x_name=self.x_name)

    def _sketches(self) -> Iterator[Sketch]:
        for score in ORDER:
            if score.key not in BESIDE and not score.is_count and not score.key.endswith("_normalised"):
                yield self._values(score)
            if score.key in COMPARED:
                yield self._differences(score)
        for key in (key for key, known in self.keys.items() if known is None):
            yield Sketch(key, self._line("", key, "own"))
        metrics = dict.fromkeys(key for record in self.records for key in record.metrics)
        accuracy = _accuracy(self.last)
        shown = sorted(
            (key for key in metrics if not key.endswith("_step")),
            key=lambda key: (key != accuracy, "acc" not in key.lower(), key),
        )
        for key in shown[:OWN_METRICS]:
            yield Sketch(key, self._line("", key, "metric", "metrics"), note="logged by the model")

    def _values(self, score: Score) -> Sketch:
        name = "previous run" if score.key == DRIFT_PREVIOUS else self.last.method
        lines = self._line(name, score.key, "own")
        for method in self.methods:
            lines += self._line(self._label(method), build(score.key, method), self.styles[method])
        for key, (beside, name) in BESIDE.items():
            if lines and beside == score.key:
                lines += self._line(name, key, "reference")
        few = [name for method in self.methods if "(n=" in (name := self._name(method, score))]
        title = f"{score.label}{' = ' if score.key == OVERALL else ': '}{score.note}".removesuffix(": ")
        note = ", ".join(text for text in (_better(score), *few) if text)
        return Sketch(title, lines, (0.0, 1.0) if score.bounds == (0.0, 1.0) else None, note)

    def _differences(self, score: Score) -> Sketch:
        """Return the paired differences to compared methods; those to controls are on another scale."""
        others = rivals(self.methods)
        single, lines = len(others) == 1, []
        for method in others:
            key, name, style = build(score.key, method, minus=True), self._label(method), self.styles[method]
            lines += self._line("" if single else name, key, "own" if single else style)
        less = self._label(others[0]) if single else "the others"
        title = f"{score.label}: {self.last.method} − {less}"
        return Sketch(title, lines, _at_least(lines, SMALL), "same images, above 0 is better")

    def _line(self, name: str, key: str, style: str, kind: str = "scalars") -> list[Line]:
        points = [
            Point(x, values[key], values.get(f"{key}_ci_low"), values.get(f"{key}_ci_high"), when(record))
            for x, record in zip(self.places, self.records, strict=True)
            if (values := getattr(record, kind)).get(key) is not None
        ]
        return [Line(name, points, style)] if points else []

    def _label(self, method: str) -> str:
        return label(self.last, method)

    def _name(self, method: str, score: Score) -> str:
        return _name(self.last, method, score)

    def run(self, record: RunRecord, at: float) -> dict[str, Any]:
        """Return what the page shows of one run, at place ``at`` of the x-axis."""
        counts = [
            f"{value:.0f} {SCORES[key].label}"
            for key, value in record.scalars.items()
            if key in SCORES and SCORES[key].is_count
        ]
        return {
            "at": round(at, 4),
            "when": when(record),
            "counts": ", ".join(counts),
            "curves": [
                {"name": _curve_name(record, method), "method": method, "lines": curves}
                for method, curves in record.curves.items()
            ],
            "panel": [vars(sample) for sample in record.panel],
            "tables": [
                self._scores(record),
                *(_table(name, rows) for name, rows in record.tables.items() if rows),
            ],
        }

    def _scores(self, record: RunRecord) -> dict[str, Any]:
        """Return a table of all scores: a row per score, a column per method and per difference."""
        methods, columns = self.methods, ["score", record.method]
        for method in methods:
            name = _name(record, method, SCORES[OVERALL])
            columns += [name, f"{record.method} − {label(record, method)}"]
        rows = []
        for score in ORDER:
            cells = [_cell(record, score, "")]
            for method in methods:
                cells += [_cell(record, score, method), _difference(record, score, method)]
            if any(text != "–" for text in cells):
                better = f" ({score.better})" if score.better else ""
                rows.append([f"{score.label}{better}", *cells])
        further = {key: value for key, value in record.scalars.items() if self.keys[key] is None}
        rows += [[key, _word(value), *["–"] * (2 * len(methods))] for key, value in further.items()]
        caption = "Scores, 95 % intervals, and which end is better"
        return {"caption": caption, "columns": columns, "rows": rows}

    def settings(self) -> Iterator[tuple[str, str]]:
        """Yield how the figures were measured, and how long it took."""
        for name, value in self.last.settings.items():
            if name != "seconds":
                yield name, _word(value)
        known = [record.settings.get("seconds") for record in self.records]
        seconds = [value for value in known if isinstance(value, (int, float))]
        if seconds:
            text = f"{seconds[-1]:.1f} s for the last run, {sum(seconds):.0f} s for all {len(seconds)} runs"
            yield "time spent explaining and scoring", text


def when(record: RunRecord) -> str:
    """Return epoch and step in words."""
    return f"epoch {record.epoch}, step {record.step}"


def label(record: RunRecord, method: str) -> str:
    """Return a method's display name."""
    return record.names.get(method, method) if method else record.method


def _methods(last: RunRecord, keys: Iterable[Key | None]) -> list[str]:
    """Return the keys of all methods that were compared, in their order."""
    scored = dict.fromkeys(key.method for key in keys if key is not None and key.method)
    return [*dict.fromkeys([*(name for name in last.names if name in scored), *scored])]


def _places(records: Sequence[RunRecord]) -> tuple[str, list[float]]:
    """Return the x-axis, which is epochs if each has one run, and the runs' places on it in [0, 1]."""
    epochs = [record.epoch for record in records]
    x_name = "epoch" if len({*epochs}) == len(epochs) else "step"
    at = epochs if x_name == "epoch" else [record.step for record in records]
    span = at[-1] - at[0]
    return x_name, [(x - at[0]) / span if span else 0.5 for x in at]


def _accuracy(record: RunRecord) -> str:
    """Return the key of the accuracy; older records do not name it."""
    if record.accuracy is not None:
        return record.accuracy
    spoken = (key for key in sorted(record.metrics) if "acc" in key.lower() and "train" not in key.lower())
    return next(spoken, "")


def _better(score: Score) -> str:
    return f"{score.better} is better" if score.better else ""


def _interval(record: RunRecord, key: str, sign: str = "") -> str:
    low, high = (record.scalars.get(f"{key}_ci_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return ""
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]".replace("-", "−")


def _cell(record: RunRecord, score: Score, method: str) -> str:
    key = build(score.key, method)
    value = record.scalars.get(key)
    if value is None:
        return "–"
    if score.is_count:
        return f"{value:.0f}"
    return f"{value:.3f} {_interval(record, key)}".strip().replace("-", "−")


def _difference(record: RunRecord, score: Score, method: str) -> str:
    key = build(score.key, method, minus=True)
    value = record.scalars.get(key)
    return "–" if value is None else f"{value:+.3f} {_interval(record, key, '+')}".strip().replace("-", "−")


def _at_least(lines: Sequence[Line], size: float) -> tuple[float, float]:
    """Return the ends of an axis for lines and intervals, at least ``size`` to either side."""
    values = [v for line in lines for p in line.points for v in (p.y, p.low, p.high) if v is not None]
    return min(-size, *values, 0.0), max(size, *values, 0.0)


def _count(record: RunRecord, method: str) -> float | None:
    return record.scalars.get(build(CURVES_N, method))


def _name(record: RunRecord, method: str, score: Score) -> str:
    """Return a compared method's name, with the number of images behind a score if that is smaller."""
    count, all_of_them = _count(record, method), _count(record, "")
    few = count is not None and all_of_them is not None and count < all_of_them
    of_curves = score.key.partition("_")[0] in (*CURVES, OVERALL)
    return f"{label(record, method)} (n={count:.0f})" if few and of_curves else label(record, method)


def _curve_name(record: RunRecord, method: str) -> str:
    count = _count(record, method)
    return label(record, method) + ("" if count is None else f" (n={count:.0f})")


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "caption": name.replace("_", " ").capitalize(),
        "columns": [*map(column_label, columns)],
        "rows": [[_word(row.get(column)) for column in columns] for row in rows],
    }


def _word(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        text = f"{value:.3f}".removesuffix(".000") if abs(value) < 1000 else f"{value:.4g}"
        return text.replace("-", "−")
    if isinstance(value, list):
        return ", ".join(map(_word, value))
    return str(value)
