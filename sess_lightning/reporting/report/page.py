"""The offline report: one page without network that replays a training, drawn from its records."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from sess_lightning.reporting.report.charts import LEFT, RIGHT, WIDTH, Line, Point, curve_frame, line_chart
from sess_lightning.reporting.report.records import RunRecord, outlines, picture, whole

MAX_BYTES = 10_000_000
FIGURES = {
    "overall": ("Overall = insertion − deletion", "higher is better"),
    "insertion": ("Insertion", "higher is better"),
    "deletion": ("Deletion", "lower is better"),
    "pointing_game": ("Pointing Game", "higher is better"),
    "pointing_game_difficult": ("Pointing Game, difficult", "higher is better"),
    "relevance_mass": ("Relevance mass: share inside the object", "higher is better"),
    "insertion_normalised": ("Insertion, normalised", "higher is better"),
    "deletion_normalised": ("Deletion, normalised", "lower is better"),
}
COUNTS = {
    "n": "explained", "misclassified": "misclassified", "flat": "flat maps", "nan": "not finite",
    "skipped": "without object", "failed": "failed runs",
}  # fmt: skip
STYLES = {"base": "base", "random": "random", "centre": "centre"}
FURTHER = 5
"""Styles for methods of other names."""
OWN_METRICS = 8
"""Most charts of the user's own metrics."""


def write_report(folder: str | Path, path: str | Path, max_bytes: int = MAX_BYTES) -> Path:
    """Draw the runs recorded in ``folder`` as one page at ``path``.

    The charts tell of every run. Pictures, curves and tables of so many runs are put in, the first and last
    among them, as ``max_bytes`` have room for. A page that exists is replaced in one stroke.

    Args:
        folder: Where ``ReportSink`` keeps its records.
        path: Where the page goes.
        max_bytes: What it may weigh.

    Raises:
        FileNotFoundError: If there are no records.
        ValueError: If ``max_bytes`` has no room for a single run.
    """
    runs = outlines(folder)
    if not runs:
        raise FileNotFoundError(f"write_report: no records of a validation run in {folder}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, every = path.with_name(path.name + ".new"), 1
    try:
        while (size := _write(draft, _page(runs, folder, every))) > max_bytes:
            if every >= len(runs):
                raise ValueError(f"write_report: one run takes {size} bytes; raise max_bytes={max_bytes}.")
            every = max(every + 1, every * size // max_bytes)
        return draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write(path: Path, parts: Iterable[str]) -> int:
    with path.open("wb") as file:
        # A file's name may hold what is no text.
        return sum(file.write(part.encode(errors="replace")) for part in parts)


def _page(runs: Sequence[tuple[RunRecord, int]], folder: str | Path, every: int) -> Iterator[str]:
    """Yield the page part by part: of a long training, the whole would be too much to hold."""
    records = [record for record, _ in runs]
    last, own = records[-1], _own(records[-1])
    methods = _methods(records)
    x_name, places = _places(records)
    chosen = sorted({0, *range(len(runs) - 1, -1, -every)})
    room = files("sess_lightning.reporting.report") / "page"
    css, script, page = (
        (room / name).read_text("utf-8") for name in ("report.css", "report.js", "report.html")
    )
    partly = f", {len(chosen)} of {len(records)} runs to keep the page small" if every > 1 else ""
    content: dict[str, str | Iterable[str]] = {
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(css)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        "css": css,
        "script": script,
        "title": escape(f"{last.settings.get('model', 'Model')}: explanations by {own}"),
        "when": escape(f"{len(records)} validation run{'s' * (len(records) > 1)}, last after {_when(last)}"),
        "alerts": _alerts(records),
        "tiles": _tiles(records, own, methods),
        "charts": _charts(records, own, methods, x_name, places),
        "partly": escape(partly),
        "latest": str(len(chosen) - 1),
        "frames": curve_frame("Insertion: pixels appear", "insertion")
        + curve_frame("Deletion: pixels vanish", "deletion"),
        "settings": _settings(records),
        "data": _data([(runs[i][1], places[i]) for i in chosen], folder, own, methods),
    }
    for i, part in enumerate(re.split(r"\$(\w+)", page)):
        told = content[part] if i % 2 else part
        yield from [told] if isinstance(told, str) else told


def _data(
    runs: Sequence[tuple[int, float]], folder: str | Path, own: str, methods: Sequence[str]
) -> Iterator[str]:
    """Yield the text of what the page's script shows."""
    names: dict[str, None] = {}
    yield '{"runs":['
    for i, (place, at) in enumerate(runs):
        record = whole(folder, place)
        names |= dict.fromkeys(name for sample in record.panel for name in sample.pictures.values())
        yield "," * (i > 0) + _json(_run(record, own, methods, at))
    yield '],"pictures":{'
    for i, name in enumerate(names):
        yield "," * (i > 0) + f"{_json(name)}:{_json(base64.b64encode(picture(folder, name)).decode())}"
    styles = {"": "own"} | {name: _style(name, methods) for name in methods}
    yield f'}},"styles":{_json(styles)},"plot":{_json({"left": LEFT, "width": WIDTH - LEFT - RIGHT})}}}'


def _json(value: Any) -> str:
    # No "<" may stand in a script element: a name could end it.
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _own(record: RunRecord) -> str:
    return record.method


def _label(record: RunRecord, method: str) -> str:
    """Return a compared method's display name."""
    return record.names.get(method, method)


def _methods(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the compared methods, in their order."""
    keys = (key.rpartition("/") for record in records for key in record.scalars)
    known = (name for name, slash, figure in keys if slash and figure in FIGURES)
    return list(dict.fromkeys(name for name in known if not name.startswith("minus_")))


def _style(name: str, methods: Sequence[str]) -> str:
    others = [each for each in methods if each not in STYLES]
    return STYLES[name] if name in STYLES else f"further{others.index(name) % FURTHER}"


def _when(record: RunRecord) -> str:
    return f"epoch {record.epoch}, step {record.step}"


def _places(records: Sequence[RunRecord]) -> tuple[str, list[float]]:
    """Return what the x-axis is, epochs where each has one run, and where in [0, 1] the runs stand."""
    epochs = [record.epoch for record in records]
    x_name = "epoch" if len({*epochs}) == len(epochs) else "step"
    at = epochs if x_name == "epoch" else [record.step for record in records]
    span = at[-1] - at[0]
    return x_name, [(each - at[0]) / span if span else 0.5 for each in at]


def _alerts(records: Sequence[RunRecord]) -> Iterable[str]:
    for record in records:
        for text in record.alerts:
            yield f"<p><strong>Warning after {escape(_when(record))}:</strong> {escape(text)}</p>"


def _tiles(records: Sequence[RunRecord], own: str, methods: Sequence[str]) -> Iterable[str]:
    last = records[-1]
    for name in sorted(last.metrics, key=_rank):
        if "acc" in name.lower():
            first = records[0].metrics.get(name)
            told = "" if first is None or len(records) < 2 else f" from {first:.3f}"
            yield _tile(name, f"{last.metrics[name]:.3f}{told}", [])
            break
    for figure in ("overall", "pointing_game", "insertion", "deletion"):
        if figure not in last.scalars:
            continue
        rows = [
            (
                f"{_label(last, other)}{_few(last, other, figure)}",
                last.scalars[key],
                _difference(last, other, figure),
            )
            for other in methods
            if (key := f"{other}/{figure}") in last.scalars
        ]
        value = f"{last.scalars[figure]:.3f} {_interval(last, figure)}"
        yield _tile(FIGURES[figure][0], value, rows, f"{FIGURES[figure][1]}; {own} less the others:")


def _tile(name: str, value: str, rows: Sequence[tuple[str, float, str]], note: str = "") -> str:
    number, _, interval = value.partition(" ")
    said = "".join(
        f'<tr><th scope="row">{_kept(other)}</th><td>{figure:.3f}</td><td>{_kept(difference)}</td></tr>'
        for other, figure, difference in rows
    )
    body = f"<table><caption>{escape(note)}</caption><tbody>{said}</tbody></table>" if rows else ""
    return (
        f'<div class="tile"><h3>{escape(name)}</h3>'
        f"<p>{escape(number)} <small>{escape(interval)}</small></p>{body}</div>"
    )


def _kept(text: str) -> str:
    """Return the first word and the rest, each of which stays on its line."""
    return " ".join(f"<span>{escape(part)}</span>" for part in text.split(" ", 1))


def _interval(record: RunRecord, key: str, sign: str = "") -> str:
    ends = [record.scalars.get(f"{key}_ci_{end}") for end in ("low", "high")]
    if None in ends:
        return ""
    return f"[{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]".replace("-", "−")


def _difference(record: RunRecord, other: str, figure: str) -> str:
    key = f"minus_{other}/{figure}"
    value = record.scalars.get(key)
    return "–" if value is None else f"{value:+.3f} {_interval(record, key, '+')}".strip().replace("-", "−")


def _few(record: RunRecord, name: str, figure: str) -> str:
    """Say on how many images a figure stands, if fewer than the method's own."""
    number = record.scalars.get(f"{name}/curves_n")
    few = number is not None and number < record.scalars.get("curves_n", 0)
    return f" (n={number:.0f})" if few and not figure.startswith(("pointing", "relevance")) else ""


def _rank(name: str) -> tuple[bool, str]:
    return "acc" not in name.lower(), name


def _charts(
    records: Sequence[RunRecord], own: str, methods: Sequence[str], x_name: str, places: Sequence[float]
) -> Iterable[str]:
    ticks = _sparse([(x, str(getattr(record, x_name))) for x, record in zip(places, records, strict=True)])
    shown = (each for each in _lines(records, own, methods, places) if each[1])
    for number, (name, lines, bounds, note) in enumerate(shown):
        yield line_chart(name, lines, ticks, x_name=x_name, bounds=bounds, note=note, number=number)


def _lines(
    records: Sequence[RunRecord], own: str, methods: Sequence[str], places: Sequence[float]
) -> Iterable[tuple[str, list[Line], tuple[float, float] | None, str]]:
    """Yield each chart's name, lines, bounds and note."""

    def line(name: str, key: str, style: str, kind: str = "scalars") -> list[Line]:
        points = [
            Point(x, values[key], values.get(f"{key}_ci_low"), values.get(f"{key}_ci_high"), _when(record))
            for x, record in zip(places, records, strict=True)
            if (values := getattr(record, kind)).get(key) is not None
        ]
        return [Line(name, points, style)] if points else []

    label = partial(_label, records[-1])
    for figure, (name, better) in FIGURES.items():
        if figure.endswith("normalised"):
            continue
        lines = line(own, figure, "own")
        for other in methods:
            lines += line(label(other), f"{other}/{figure}", _style(other, methods))
        few = [f"{label(other)}{_few(records[-1], other, figure)}" for other in methods]
        note = ", ".join([better, *(each for each in few if "(n=" in each)])
        yield name, lines, None if figure == "overall" else (0.0, 1.0), note
        if figure in ("overall", "pointing_game", "relevance_mass"):
            paired = line(f"{own} − {label('base')}", f"minus_base/{figure}", "own")
            short = re.split("[=:]", name)[0].strip()
            yield f"{short}: {own} − {label('base')}", paired, None, "same images, above 0 is better"
    known = {*FIGURES, *COUNTS}
    keys = dict.fromkeys(key for record in records for key in record.scalars)
    for key in keys:
        figure = key.rpartition("/")[2]
        if figure not in known and "_ci_" not in figure and not figure.endswith("_n"):
            yield key, line("", key, "own"), None, ""
    metrics = dict.fromkeys(key for record in records for key in record.metrics if not key.endswith("_step"))
    for key in sorted(metrics, key=_rank)[:OWN_METRICS]:
        yield key, line("", key, "metric", "metrics"), None, "logged by the model"


def _sparse(ticks: Sequence[tuple[float, str]], most: int = 7) -> list[tuple[float, str]]:
    every = -(-len(ticks) // most)
    return list(ticks[::every])


def _run(record: RunRecord, own: str, methods: Sequence[str], at: float) -> dict[str, Any]:
    """Return what the page shows of one run."""
    counts = [f"{value:.0f} {COUNTS[key]}" for key, value in record.scalars.items() if key in COUNTS]
    return {
        "at": round(at, 4),
        "when": _when(record),
        "figures": _figures(record, own, methods),
        "counts": ", ".join(counts),
        "curves": [
            {"name": _curve_name(record, method), "method": method, "lines": curves}
            for method, curves in record.curves.items()
        ],
        "panel": [asdict(sample) for sample in record.panel],
        "tables": [_table(name, rows) for name, rows in record.tables.items() if rows],
    }


def _curve_name(record: RunRecord, method: str) -> str:
    count = record.scalars.get(f"{method}/curves_n" if method else "curves_n")
    name = _label(record, method) if method else record.method
    return name if count is None else f"{name} (n={count:.0f})"


def _figures(record: RunRecord, own: str, methods: Sequence[str]) -> dict[str, Any]:
    rows = []
    for figure, (name, better) in FIGURES.items():
        if figure not in record.scalars:
            continue
        cells = [f"{name.partition(' =')[0]} ({better.partition(' ')[0]})", _cell(record, figure)]
        for other in methods:
            cells += [_cell(record, f"{other}/{figure}"), _difference(record, other, figure)]
        rows.append(cells)
    columns = ["figure", own]
    for other in methods:
        name = _label(record, other)
        columns += [f"{name}{_few(record, other, 'overall')}", f"{own} − {name}"]
    return {
        "caption": "Figures, 95 % intervals, and which is better",
        "columns": columns,
        "rows": rows,
    }


def _cell(record: RunRecord, key: str) -> str:
    value = record.scalars.get(key)
    return "–" if value is None else f"{value:.3f} {_interval(record, key)}".strip().replace("-", "−")


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "caption": name.replace("_", " ").capitalize(),
        "columns": [column.replace("_", " ") for column in columns],
        "rows": [[_word(row.get(column)) for column in columns] for row in rows],
    }


def _word(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        text = f"{value:.3f}".removesuffix(".000") if abs(value) < 1000 else f"{value:.4g}"
        return text.replace("-", "−")
    if isinstance(value, list):
        return ", ".join(_word(each) for each in value)
    return str(value)


def _settings(records: Sequence[RunRecord]) -> str:
    settings = {key: value for key, value in records[-1].settings.items() if key != "seconds"}
    seconds = [float(r.settings["seconds"]) for r in records if r.settings.get("seconds") is not None]
    if seconds:
        settings["time of explaining and scoring"] = (
            f"{seconds[-1]:.1f} s the last run, {sum(seconds):.0f} s all {len(seconds)} runs"
        )
    return "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_word(value))}</td></tr>'
        for key, value in settings.items()
    )
