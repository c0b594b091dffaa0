"""Finished evaluations side by side: one table and one figure over what differs between them."""

from __future__ import annotations

import ast
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import yaml
from PIL import Image

from sess_lightning import methods
from sess_lightning.evaluation.journal import read_settings
from sess_lightning.evaluation.results import SECONDS, SHOWN, heads, parts, percent, write_table
from sess_lightning.reporting.panels import Picture, without_latex
from sess_lightning.reporting.text import text_table
from sess_lightning.scores import SCORES

COLOURED = (
    "SESS", "GradCAM", "GuidedBackprop", "GroupCAM", "RISE", "ScoreCAM", "Blurred", "RandomMap",
    "CentreGaussian", "ContrastiveSESS",
)  # fmt: skip
"""The methods that have the ten colours which are easiest to tell apart."""
OUT = Path("runs/evaluate")
"""Folder of an evaluation that names none."""
LONGEST = 40
"""Characters of what differs between runs; if there are more, runs are called by their folders."""


class Run(NamedTuple):
    """A finished evaluation.

    Attributes:
        folder: Where its results are.
        options: The method's hyper-parameters and the other settings.
        rows: The rows of ``results.csv``.
        kinds: The methods scored beside it: name -> name of its class.
    """

    folder: Path
    options: Mapping[str, Any]
    rows: Sequence[Mapping[str, str]]
    kinds: Mapping[str, str]


class Point(NamedTuple):
    """A figure of one run.

    Attributes:
        x: Its place on the horizontal axis: a number, or a name.
        series: The line it belongs to.
        kind: The class of the method, which has one colour in all pictures.
        is_explained: Whether it is the explained method's, not a compared one's.
        figure: Its name.
        value: Its value; ``low`` and ``high`` end its 95 % interval, ``paper`` is the paper's.
    """

    x: Any
    series: str
    kind: str
    is_explained: bool
    figure: str
    value: float
    low: float | None
    high: float | None
    paper: float | None


def read_run(path: str | Path) -> Run:
    """Read a finished evaluation.

    Args:
        path: Its folder, or the config it was started with, which may name it (``out``).

    Raises:
        FileNotFoundError: If there are no results or no records.
        ValueError: If the records do not show the methods, or the file is not a config.
    """
    folder = Path(path)
    if folder.suffix in (".yaml", ".yml"):
        with folder.open(encoding="utf-8") as file:
            config = yaml.safe_load(file) or {}
        if not isinstance(config, dict):
            raise ValueError(f"{path}: not a config of sess-lightning evaluate.")
        folder = Path(config.get("out", OUT))
    if not (folder / "results.csv").is_file():
        raise FileNotFoundError(f"{folder}: no results.csv; let sess-lightning evaluate finish first.")
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    settings = read_settings(folder)
    try:
        compare, method = (ast.parse(settings.pop(name), mode="eval").body for name in ("compare", "method"))
    except SyntaxError as error:
        raise ValueError(
            f"{folder}: the records do not show its methods; give target layers by name, not as modules."
        ) from error
    pairs = zip(compare.keys, compare.values, strict=True) if isinstance(compare, ast.Dict) else ()
    kinds = {ast.literal_eval(key): ast.unparse(value).partition("(")[0] for key, value in pairs if key}
    return Run(folder, settings | _hyper_parameters(method), rows, kinds)


def _hyper_parameters(call: ast.expr) -> dict[str, Any]:
    """Return the hyper-parameters in a method's repr, without running any of it."""
    if not isinstance(call, ast.Call):
        return {"method": ast.unparse(call)}
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
        x: The option to draw over; None is the number that differs most, else what differs, or the folders
            where that is much.

    Raises:
        ValueError: If ``x`` is not an option of the runs.
    """
    axis, rest, labels = _axis(runs, x)
    figures = []
    for run, label in zip(runs, labels, strict=True):
        title = ", ".join(label)
        for row in run.rows:
            if not _is_shown(row, run):
                continue
            is_explained = row["method"] not in run.kinds
            kind = str(run.options["method"]) if is_explained else run.kinds[row["method"]]
            name = kind if is_explained else row["method"]
            if name == "base" and len({each.kinds.get(name, kind) for each in runs}) > 1:
                name = f"base, {kind}"
            if len(runs) == 1:
                place, series = name, ""
            elif axis is None:
                place, series = title or run.folder.name, name
            else:
                place, series = run.options[axis], f"{name} ({title})" if title else name
            ends = (float(row[end]) if row[end] else None for end in ("value", "ci_low", "ci_high", "paper"))
            figures.append(Point(place, series, kind, is_explained, row["figure"], *ends))  # type: ignore[arg-type]
    return (axis or ("method" if len(runs) == 1 else ", ".join(rest))), figures


def _axis(runs: Sequence[Run], x: str | None) -> tuple[str | None, list[str], list[tuple[str, ...]]]:
    """Return the number to draw over, the names of what else differs, and each run's values of these."""
    differing = varied(runs)
    if x is not None and x not in runs[0].options:
        raise ValueError(f"compare: x must be one of {sorted(runs[0].options)}, got {x!r}.")
    numbers = [name for name in differing if all(_is_number(run.options.get(name)) for run in runs)]
    axis = next(iter(numbers), None) if x is None else x
    if axis not in numbers:  # Names: everything that differs is written below the axis.
        differing, axis = ({axis: 0} | differing) if axis else differing, None
    rest = [name for name in differing if name != axis]
    labels = [*zip(*(_short([run.options.get(name) for run in runs]) for name in rest), strict=True)]
    longest = max(map(len, map(", ".join, labels)), default=0)
    if axis is None and x is None and (len(rest) > 1 or longest > LONGEST):
        rest, labels = ["run"], [(name,) for name in _folder_names(runs)]
    return axis, rest, labels if rest else [()] * len(runs)


def _is_shown(row: Mapping[str, str], run: Run) -> bool:
    differences = tuple(f" - {name}" for name in run.kinds)
    is_difference = row["method"] not in run.kinds and row["method"].endswith(differences)
    return row["figure"] in (*SHOWN, SECONDS) and not is_difference


def _short(values: Sequence[Any]) -> list[str]:
    """Return values as text, without their arguments if their names suffice to distinguish them."""
    whole = [str(value) for value in values]
    names = [text.partition("(")[0] for text in whole]
    return names if len(set(names)) == len(set(whole)) else whole


def _folder_names(runs: Sequence[Run]) -> list[str]:
    names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(runs) else [str(run.folder) for run in runs]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def compare(paths: Sequence[str | Path], out: str | Path, x: str | None = None) -> list[Path]:
    """Write ``compare.txt``, ``compare.csv`` (every figure) and ``compare.png``; return what was written.

    Args:
        paths: Folders of finished evaluations, or their configs.
        out: Folder to write to.
        x: As for ``points``.

    Raises:
        FileNotFoundError: If an evaluation is not finished.
        ValueError: If ``x`` is not an option of the runs.
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
    (out / "compare.txt").write_text(table(label, figures) + "\n", encoding="utf-8")
    written = write_table(out / "compare.csv", columns, parquet=False)
    with without_latex():
        Image.fromarray(draw(label, figures)).save(out / "compare.png")
    return [out / "compare.txt", *written, out / "compare.png"]


def table(label: str, figures: Sequence[Point]) -> str:
    """Return figures in percent as text: a line per method and place, 95 % intervals in brackets."""
    shown = [name for name in SHOWN if any(point.figure == name for point in figures)]
    tables = ("\n".join(text_table(_lines(label, figures, part))) for part in parts(shown))
    return "\n\n".join(["Percent, in brackets the 95 % interval.", *tables])


def _lines(label: str, figures: Sequence[Point], shown: Sequence[str]) -> list[list[str]]:
    names = [label, "method"] if any(point.series for point in figures) else [label]
    lines = [[*first, *line] for first, line in zip((names, [""] * len(names)), heads(shown), strict=True)]
    for place, series in dict.fromkeys((point.x, point.series) for point in figures):
        of_line = {p.figure: p for p in figures if (p.x, p.series) == (place, series)}
        cells = (_cell(of_line[name]) if name in of_line else "-" for name in shown)
        lines.append([*[str(place), series][: len(names)], *cells])
    return lines


def _cell(point: Point) -> str:
    if point.figure == SECONDS:
        return f"{point.value:.3g}"
    return percent(point.value, (point.low, point.high))


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
    series = list(dict.fromkeys((point.series, point.kind) for point in figures))
    styles = _styles([kind for _, kind in series])
    for field, name in zip(fields, shown, strict=False):
        for number, line in enumerate(series):
            of_line = sorted(
                (p for p in figures if (p.figure, p.series, p.kind) == (name, *line)),
                key=lambda p: p.x if numeric else places.index(p.x),
            )
            # Side by side: intervals at the same place would hide one another.
            shift = 0.0 if numeric or not line[0] else 0.12 * (number - (len(series) - 1) / 2)
            where = [float(p.x) if numeric else places.index(p.x) + shift for p in of_line]
            _draw_series(field, of_line, where, *styles[number])
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


def colour_of(kind: str) -> tuple[float, float, float]:
    """Return a method's colour, which is the same in every picture."""
    from matplotlib import colormaps

    pale = (2 * index + 1 for index in range(10))
    palette = [colormaps["tab10"](index) for index in range(10)]
    palette += [colormaps["tab20"](index) for index in pale]
    palette += [colormaps["Dark2"](index) for index in range(8)]
    known = [*COLOURED, *(name for name in methods.__all__ if name not in COLOURED)]
    place = known.index(kind) if kind in known else crc32(kind.encode())
    red, green, blue, _ = palette[place % len(palette)]
    return red, green, blue


def _styles(kinds: Sequence[str]) -> list[tuple[tuple[float, float, float], str, str]]:
    """Return colour, marker and line of each series; those of one method share a colour."""
    earlier = [kinds[:number].count(kind) for number, kind in enumerate(kinds)]
    return [
        (colour_of(kind), "os^vDP"[number % 6], ("-", "--", "-.", ":")[number % 4])
        for kind, number in zip(kinds, earlier, strict=True)
    ]


def _draw_series(
    field: Any,
    line: Sequence[Point],
    where: Sequence[float],
    colour: tuple[float, float, float],
    marker: str,
    stroke: str,
) -> None:
    if not line:
        return
    ends = [(p.value - (p.low if p.low is not None else p.value),
             (p.high if p.high is not None else p.value) - p.value) for p in line]  # fmt: skip
    field.errorbar(
        where, [p.value for p in line], yerr=np.array(ends).T, label=line[0].series or None, color=colour,
        marker=marker, ms=4, capsize=3, lw=2 if line[0].is_explained else 1,
        ls=stroke if all(_is_number(p.x) for p in line) else "none",
    )  # fmt: skip
    printed = [(x, p.paper) for x, p in zip(where, line, strict=True) if p.paper is not None]
    if printed:
        title = f"{line[0].series} in the paper".strip()
        field.plot(
            *zip(*printed, strict=True), ls="none", marker="D", ms=7, mfc="none", color=colour, label=title
        )
