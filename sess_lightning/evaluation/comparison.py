"""Finished evaluations side by side: one table and one figure over what differs between them."""

from __future__ import annotations

import ast
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from sess_lightning.evaluation.journal import read_settings
from sess_lightning.evaluation.results import SECONDS, SHOWN, write_table
from sess_lightning.reporting.panels import Picture
from sess_lightning.scores import SCORES


class Run(NamedTuple):
    """A finished evaluation.

    Attributes:
        folder: Where its results are.
        options: The method's hyper-parameters and the other settings.
        others: Names of the methods scored beside it.
        rows: The rows of ``results.csv``.
    """

    folder: Path
    options: Mapping[str, Any]
    others: Sequence[str]
    rows: Sequence[Mapping[str, str]]


class Point(NamedTuple):
    """A figure of one run.

    Attributes:
        x: Its place on the horizontal axis: a number, or a name.
        series: The line it belongs to.
        is_explained: Whether it is the explained method's, not a compared one's.
        figure: Its name.
        value: Its value; ``low`` and ``high`` end its 95 % interval, ``paper`` is the paper's.
    """

    x: Any
    series: str
    is_explained: bool
    figure: str
    value: float
    low: float | None
    high: float | None
    paper: float | None


def read_run(path: str | Path) -> Run:
    """Read a finished evaluation.

    Args:
        path: Its folder, or the config that names it (``out``).

    Raises:
        FileNotFoundError: If there are no results or no records.
    """
    folder = Path(path)
    if folder.suffix in (".yaml", ".yml"):
        folder = Path(yaml.safe_load(folder.read_text(encoding="utf-8"))["out"])
    if not (folder / "results.csv").is_file():
        raise FileNotFoundError(f"{folder}: no results.csv; let sess-lightning evaluate finish there first.")
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    settings = read_settings(folder)
    compare = ast.parse(settings.pop("compare"), mode="eval").body
    others = [ast.literal_eval(key) for key in compare.keys if key] if isinstance(compare, ast.Dict) else []
    return Run(folder, settings | _hyper_parameters(settings.pop("method")), others, rows)


def _hyper_parameters(method: str) -> dict[str, Any]:
    """Read a method's repr without running any of it."""
    call = ast.parse(method, mode="eval").body
    if not isinstance(call, ast.Call):
        return {"method": method}
    return {"method": ast.unparse(call.func)} | {
        str(keyword.arg): _value(keyword.value) for keyword in call.keywords
    }


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def varied(runs: Sequence[Run]) -> dict[str, int]:
    """Return the options that differ between runs, and how many values each has; most values first."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    counts = {name: len({repr(run.options.get(name)) for run in runs}) for name in names}
    return {name: counts[name] for name in sorted(names, key=lambda name: -counts[name]) if counts[name] > 1}


def points(runs: Sequence[Run], x: str | None = None) -> tuple[str, list[Point]]:
    """Return the label of the horizontal axis, and every figure of every run.

    Args:
        runs: A single one is drawn over its methods.
        x: The option to draw over; None is the number that differs most, else all that differs.

    Raises:
        ValueError: If ``x`` is no option of the runs.
    """
    differing = varied(runs)
    if x is not None and x not in runs[0].options:
        raise ValueError(f"compare: x must be one of {sorted(runs[0].options)}, got {x!r}.")
    numbers = [name for name in differing if all(_is_number(run.options.get(name)) for run in runs)]
    axis = next(iter(numbers), None) if x is None else x
    if axis not in numbers:  # Names: everything that differs is written below the axis.
        differing, axis = ({axis: 0} | differing) if axis else differing, None
    rest = [name for name in differing if name != axis]
    labels = zip(*(_short([run.options.get(name) for run in runs]) for name in rest), strict=True)
    figures = []
    for run, label in zip(runs, labels if rest else [()] * len(runs), strict=True):
        title = ", ".join(label)
        for row in run.rows:
            is_explained = row["method"] not in run.others
            differences = tuple(f" - {name}" for name in run.others)
            if row["figure"] not in (*SHOWN, SECONDS) or (
                is_explained and row["method"].endswith(differences)
            ):
                continue
            name = str(run.options["method"]) if is_explained else row["method"]
            if len(runs) == 1:
                place, series = name, ""
            elif axis is None:
                place, series = title or run.folder.name, name
            else:
                place, series = run.options[axis], f"{name} ({title})" if title else name
            ends = (float(row[end]) if row[end] else None for end in ("value", "ci_low", "ci_high", "paper"))
            figures.append(Point(place, series, is_explained, row["figure"], *ends))  # type: ignore[arg-type]
    return (axis or ("method" if len(runs) == 1 else ", ".join(rest))), figures


def _short(values: Sequence[Any]) -> list[str]:
    """Return values as text, without their arguments if their names suffice to distinguish them."""
    whole = [str(value) for value in values]
    names = [text.partition("(")[0] for text in whole]
    return names if len(set(names)) == len(set(whole)) else whole


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def compare(paths: Sequence[str | Path], out: str | Path, x: str | None = None) -> list[Path]:
    """Write ``compare.csv`` (every figure of every run) and ``compare.png``; return what was written.

    Args:
        paths: Folders of finished evaluations, or their configs.
        out: Folder to write to.
        x: As for ``points``.

    Raises:
        FileNotFoundError: If an evaluation is not finished.
        ValueError: If ``x`` is no option of the runs.
    """
    runs = [read_run(path) for path in paths]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    label, figures = points(runs, x)
    options = list(varied(runs))
    rows = [
        {"folder": str(run.folder), **{name: run.options.get(name) for name in options}, **row}
        for run in runs
        for row in run.rows
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    written = write_table(out / "compare.csv", columns, parquet=False)
    Image.fromarray(draw(label, figures)).save(out / "compare.png")
    return [*written, out / "compare.png"]


def draw(label: str, figures: Sequence[Point]) -> Picture:
    """Draw figures over what differs: a plot per figure, a line per method, with the paper's values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in (*SHOWN, SECONDS) if any(point.figure == name for point in figures)]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * lines), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    fields = figure.subplots(lines, columns, squeeze=False).flat
    places = list(dict.fromkeys(point.x for point in figures))
    numeric = all(_is_number(place) for place in places)
    series = list(dict.fromkeys(point.series for point in figures))
    for field, name in zip(fields, shown, strict=False):
        for number, line in enumerate(series):
            of_line = sorted(
                (p for p in figures if (p.figure, p.series) == (name, line)),
                key=lambda p: p.x if numeric else places.index(p.x),
            )
            # Side by side: intervals at the same place would hide one another.
            shift = 0.0 if numeric else 0.12 * (number - (len(series) - 1) / 2)
            where = [float(p.x) if numeric else places.index(p.x) + shift for p in of_line]
            _draw_series(field, of_line, where, f"C{number}")
        field.set(title=SCORES[name].label, xlabel=label)
        if not numeric:
            field.set_xlim(-0.5, len(places) - 0.5)
            field.set_xticks(range(len(places)), [str(place) for place in places], rotation=20, ha="right")
        field.grid(alpha=0.3)
    for field in list(figure.axes)[len(shown) :]:
        field.remove()
    legends = [field.get_legend_handles_labels() for field in figure.axes]
    names = {name: line for lines, labels in legends for name, line in zip(labels, lines, strict=True)}
    if names:
        figure.legend(names.values(), names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_series(field: Any, line: Sequence[Point], where: Sequence[float], colour: str) -> None:
    if not line:
        return
    ends = [(p.value - (p.low if p.low is not None else p.value),
             (p.high if p.high is not None else p.value) - p.value) for p in line]  # fmt: skip
    field.errorbar(
        where, [p.value for p in line], yerr=np.array(ends).T, label=line[0].series or None, color=colour,
        marker="o", ms=4, capsize=3, lw=2 if line[0].is_explained else 1, ls="-" if _joined(line) else "none",
    )  # fmt: skip
    printed = [(x, p.paper) for x, p in zip(where, line, strict=True) if p.paper is not None]
    if printed:
        title = f"{line[0].series} in the paper".strip()
        field.plot(
            *zip(*printed, strict=True), ls="none", marker="D", ms=7, mfc="none", color=colour, label=title
        )


def _joined(line: Sequence[Point]) -> bool:
    return all(_is_number(p.x) for p in line)
