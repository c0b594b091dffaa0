"""The results of an evaluation, as a table and as files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from sess_lightning.metrics.bootstrap import Mean, resample
from sess_lightning.metrics.summary import NO_TRIAL, Rows, interval_ends, sample_scores
from sess_lightning.reporting.files import harmless
from sess_lightning.reporting.panels import curve_figure
from sess_lightning.reporting.text import text_table
from sess_lightning.scores import (
    DIFFICULT,
    ENDS,
    OF_REGIONS,
    POINTING_GAME,
    POINTING_GAME_IMAGES,
    SCORES,
    SECONDS_PER_IMAGE,
    Key,
    build,
)

SHOWN = tuple(key for key, score in SCORES.items() if score.better and score.bounds)
"""Scores that the table and figures show; files hold all."""
SHARED = tuple(key for key, score in SCORES.items() if score.is_shared)
SECONDS = SECONDS_PER_IMAGE
HEADS = {
    POINTING_GAME: ("Pointing Game", "mean over classes"),
    POINTING_GAME_IMAGES: ("Pointing Game", "mean over images"),
    DIFFICULT: ("difficult subset", "mean over classes"),
    SECONDS: ("Seconds", "per image"),
}
"""Two lines above a column of the table; others have the score's label and which end is good."""
OWN = "method"
"""Name of the explained method in the tables of samples and classes."""


@dataclass(frozen=True)
class Results:
    """The results of an evaluation.

    Attributes:
        method: The method, as text.
        others: Names of the methods scored beside it.
        figures: As ``SESSMetric.compute`` gives them, and how many images were scored, broken or are missing.
        curves: Mean insertion and deletion curve of each method.
        classes: Pointing Game, trials and hits by class.
        samples: Columns of a table with a row per trial, method (``"method"`` is the method itself) and
            figure; ``difficult`` is -1 where unknown.
        seconds: Mean time of an image's maps, s, by method (``""`` is the method itself); not among the
            figures, since it depends on the machine.
        settings: What the figures depend on.
    """

    method: str
    others: tuple[str, ...]
    figures: dict[str, float]
    curves: dict[str, Tensor]
    classes: list[dict[str, Any]]
    samples: Mapping[str, npt.NDArray[Any]]
    seconds: Mapping[str, float]
    settings: dict[str, str]

    def rows(self, paper: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """Return a row per method and figure: value, 95 % interval, the paper's value and the difference.

        Args:
            paper: Figures as printed there, in percent (``seconds_per_image`` in s); ``base/...`` for the
                base method's.
        """
        labels = {("", False): self.method} | {(name, False): name for name in self.others}
        labels |= {(name, True): f"{self.method} - {name}" for name in self.others}
        rows = [
            _row(self.figures, paper or {}, build(score, *of), label, score)
            for of, label in labels.items()
            for score in SCORES
            if score not in SHARED and build(score, *of) in self.figures
        ]
        for name, seconds in self.seconds.items():
            printed = (paper or {}).get(build(SECONDS, name))
            rows.append(_line(labels[name, False], SECONDS, seconds, printed))
        return rows + [_row(self.figures, {}, key, "", key) for key in SHARED if key in self.figures]

    def table(self, paper: Mapping[str, float] | None = None) -> str:
        """Return the figures in percent as text: a line per method, 95 % intervals in brackets."""
        shown = [score for score in SHOWN if score in self.figures]
        tables = ("\n".join(text_table(self._lines(part, paper or {}))) for part in parts(shown))
        title = f"{self.method}\nPercent, in brackets the 95 % interval."
        return "\n\n".join([title, *tables, ", ".join(self._notes())])

    def _lines(self, shown: Sequence[str], paper: Mapping[str, float]) -> list[list[str]]:
        """Return the rows of a table with these scores, and with seconds if they are among them."""
        short, scores = self.method.partition("(")[0], [score for score in shown if score != SECONDS]
        lines = [["", *line] for line in heads(shown)]

        def add(name: str, cells: Iterable[str], time: str) -> None:
            lines.append([name, *cells, *([time] if SECONDS in shown else [])])

        for name in ("", *self.others):
            keys = [build(score, name) for score in scores]
            time = f"{self.seconds[name]:.3g}" if name in self.seconds else "-"
            add(name or short, (_cell(self.figures, key) for key in keys), time)
            if paper.keys() & {*keys, *([build(SECONDS, name)] if SECONDS in shown else [])}:
                beside = (_beside(self.figures, paper, key) for key in keys)
                add("  in the paper", beside, str(paper.get(build(SECONDS, name), "-")))
        for name in self.others if scores else ():
            keys = [build(score, name, minus=True) for score in scores]
            add(f"{short} - {name}", (_cell(self.figures, key, signed=True) for key in keys), "")
        return lines

    def __str__(self) -> str:
        return self.table()

    def _notes(self) -> Iterator[str]:
        """Yield the lines below the table."""
        for key, score in SCORES.items():
            value = self.figures.get(key, 0.0)
            if value and (score.is_count or score.is_shared):
                yield f"{value:.0f} {score.label}" if score.is_count else f"{score.label} {100 * value:.2f} %"

    def write(
        self,
        folder: str | Path,
        paper: Mapping[str, float] | None = None,
        parquet: bool | None = None,
    ) -> list[Path]:
        """Write all tables and the curves, and return what was written.

        ``results.csv`` and ``.txt`` hold the figures, ``classes.csv`` the Pointing Game by class,
        ``samples.csv`` a row per trial, method and figure, ``curves.png`` the mean curves. With pyarrow,
        figures and samples are also written as ``.parquet``.

        Args:
            folder: Created if it does not exist.
            paper: As for ``rows``.
            parquet: Whether to write Parquet; None means if pyarrow is installed.

        Raises:
            ImportError: If Parquet is asked for and pyarrow is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "results.txt"]
        written[0].write_text(self.table(paper) + "\n", encoding="utf-8")
        rows = self.rows(paper)
        figures = {column: [row[column] for row in rows] for column in rows[0]}
        written += write_table(folder / "results.csv", figures, parquet)
        if self.samples:
            written += write_table(folder / "samples.csv", self.samples, parquet)
        if any(row["trials"] for row in self.classes):
            by_class = {column: [row[column] for row in self.classes] for column in self.classes[0]}
            written += write_table(folder / "classes.csv", by_class, False)
        drawn = {name or self.method: curve for name, curve in self.curves.items() if curve.isfinite().all()}
        if drawn:
            written.append(folder / "curves.png")
            Image.fromarray(curve_figure(drawn)).save(written[-1])
        return written


def parts(shown: Sequence[str]) -> list[list[str]]:
    """Return scores as the columns of one or two tables, so that none is too wide for a terminal."""
    regions = [key for key in shown if key in (*OF_REGIONS, POINTING_GAME_IMAGES)]
    both = [part for part in ([key for key in shown if key not in regions], regions) if part]
    first, *others = both or [[]]  # Without any score, it is the seconds that are asked for.
    return [[*first, SECONDS], *others]


def heads(scores: Sequence[str]) -> list[list[str]]:
    """Return the two lines above a table's columns: labels, and what to know of them."""
    pairs = [HEADS.get(key, (SCORES[key].label, f"{SCORES[key].better} is better")) for key in scores]
    return [[pair[line] for pair in pairs] for line in (0, 1)]


def _class_name(names: Sequence[str], target: int) -> str:
    return names[target] if target < len(names) else str(target)


def per_class(rows: Rows, names: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
    """Return the Pointing Game's trials and hits, a row per class.

    Args:
        rows: Of all samples.
        names: Of the classes, as far as known.
        others: Names of the methods beside, in the rows' order.
    """
    table = []
    for target in rows.targets.unique().tolist():
        hits = rows.hits[rows.targets == target]
        row: dict[str, Any] = {"class": _class_name(names, target), "trials": int((hits[:, 0] >= 0).sum())}
        row |= {f"{name}_hits": int((hits[:, i] == 1).sum()) for i, name in enumerate((OWN, *others))}
        table.append(row)
    return table


def over_images(rows: Rows, methods: Sequence[str]) -> dict[str, float]:
    """Return the Pointing Game's mean over trials, whatever their class, with intervals and differences.

    Args:
        rows: Of all samples.
        methods: The methods' names; the first, the explained one's, is empty.
    """
    hits, chosen = rows.hits.double(), (rows.hits != NO_TRIAL).all(1)
    if not chosen.any():
        return {}
    columns = {Key(POINTING_GAME_IMAGES, name): hits[:, i] for i, name in enumerate(methods)}
    columns |= {
        Key(POINTING_GAME_IMAGES, name, minus=True): hits[:, 0] - hits[:, i]
        for i, name in enumerate(methods)
        if name
    }
    means = {key: Mean(column[chosen], rows.image_of[chosen]) for key, column in columns.items()}
    resampled = resample(means, int(rows.image_of[-1]) + 1, len(hits))
    return {build(*key): mean.value for key, mean in means.items()} | interval_ends(resampled)


def per_sample(
    rows: Rows, names: Sequence[str], others: Sequence[str], entries: Mapping[int, Mapping[str, Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of a table with a row per trial, method and figure.

    Args:
        rows: Of all samples.
        names: Of the classes, as far as known.
        others: Names of the methods beside, in the rows' order.
        entries: The records that the rows came from, by sample.
    """
    counts = [len(entry["rows"]["targets"]) for entry in entries.values()]
    known = {
        "sample": np.repeat(list(entries), counts),
        "id": np.repeat([str(entry["id"]) for entry in entries.values()], counts),
        "target": rows.targets.numpy(),
        "class": np.array([_class_name(names, target) for target in rows.targets.tolist()]),
        "predicted": rows.predicted.numpy(),
        "score": rows.ends[:, 0].double().numpy(),
        "difficult": rows.difficult.numpy(),
    }
    parts = []
    for i, name in enumerate((OWN, *others)):
        for figure, values in sample_scores(rows, i).items():
            finite = values.isfinite().numpy()
            part = {column: entry[finite] for column, entry in known.items()}
            part |= {"method": np.repeat(name, finite.sum()), "figure": np.repeat(figure, finite.sum())}
            parts.append({**part, "value": values.numpy()[finite]})
    return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}


def _row(
    figures: Mapping[str, float], paper: Mapping[str, float], key: str, label: str, figure: str
) -> dict[str, Any]:
    line = _line(label, figure, figures[key], paper[key] / 100 if key in paper else None)
    return line | {end: figures.get(f"{key}_{end}") for end in ENDS}


def _line(label: str, figure: str, value: float, printed: float | None) -> dict[str, Any]:
    return {
        "method": label,
        "figure": figure,
        "value": value,
        "ci_low": None,
        "ci_high": None,
        "paper": printed,
        "difference": None if printed is None else value - printed,
    }


def _cell(figures: Mapping[str, float], key: str, signed: bool = False) -> str:
    if key not in figures:
        return "-"
    return percent(figures[key], [figures.get(f"{key}_{end}") for end in ENDS], signed)


def percent(value: float, ends: Iterable[float | None] = (), signed: bool = False) -> str:
    """Return a score in percent, with the ends of its interval in brackets where they are known."""
    form = "{:+.2f}" if signed else "{:.2f}"
    inside = ", ".join(form.format(100 * end) for end in ends if end is not None)
    return form.format(100 * value) + (f" [{inside}]" if inside else "")


def _beside(figures: Mapping[str, float], paper: Mapping[str, float], key: str) -> str:
    if key not in paper or key not in figures:
        return "-"
    return f"{paper[key]:.1f} ({100 * figures[key] - paper[key]:+.2f})"


def write_table(path: Path, columns: Mapping[str, Any], parquet: bool | None) -> list[Path]:
    """Write columns as CSV, and as Parquet beside it; return what was written.

    Args:
        path: Of the CSV.
        columns: Of equal length.
        parquet: As for ``Results.write``.

    Raises:
        ImportError: If Parquet is asked for and pyarrow is not installed.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(map(harmless, row) for row in zip(*columns.values(), strict=True))
    if parquet is False:
        return [path]
    try:
        from pyarrow import parquet as files
        from pyarrow import table
    except ImportError as error:
        if parquet:
            raise ImportError("Parquet is written with pyarrow: pip install pyarrow.") from error
        return [path]
    files.write_table(table(dict(columns)), path.with_suffix(".parquet"))
    return [path, path.with_suffix(".parquet")]
