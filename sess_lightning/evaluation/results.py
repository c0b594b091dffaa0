"""What an evaluation found, as a table and as files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sess_lightning.metrics import SESSMetric
from sess_lightning.metrics.functional import curve_auc
from sess_lightning.reporting.panels import curve_figure

FIGURES = ("insertion", "deletion", "overall", "pointing_game", "pointing_game_difficult")
COUNTS = ("n", "images", "broken", "missing", "all_difficult", "skipped", "misclassified", "nan", "flat")
SECONDS = "seconds_per_image"


@dataclass(frozen=True)
class Results:
    """What came out.

    Attributes:
        method: The method, in words.
        others: Names of the methods beside it.
        figures: As ``SESSMetric.compute`` gives them, and how many images were scored, broken or are missing.
        curves: Mean insertion and deletion curve of each method.
        classes: Pointing Game, trials and hits by class.
        samples: Columns of a table with a row per trial, method (``"method"`` is the method itself) and
            figure; ``difficult`` is -1 where that is not known.
        seconds: What a picture's maps took, mean, by method (``""`` is the method itself); no figure, as it
            is another on another machine.
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
        prefixes = {"": self.method} | {f"{name}/": name for name in self.others}
        prefixes |= {f"minus_{name}/": f"{self.method} - {name}" for name in self.others}
        found = [
            _row(self.figures, paper or {}, prefix, label, figure)
            for prefix, label in prefixes.items()
            for figure in (*FIGURES, "insertion_normalised", "deletion_normalised", "flat", "curves_n")
            if prefix + figure in self.figures
        ]
        taken = {f"{name}/" if name else "": seconds for name, seconds in self.seconds.items()}
        for prefix, seconds in taken.items():
            found.append(_line(prefixes[prefix], SECONDS, seconds, (paper or {}).get(prefix + SECONDS)))
        counts = (*COUNTS, "pointing_game_n", "pointing_game_difficult_n")
        return found + [_row(self.figures, {}, "", "", figure) for figure in counts if figure in self.figures]

    def table(self, paper: Mapping[str, float] | None = None) -> str:
        """Return the figures in percent as text: a line per method, 95 % intervals in brackets."""
        shown = [figure for figure in FIGURES if figure in self.figures]
        lines = [["", *shown, SECONDS]]
        for name, label in (("", self.method), *((name, name) for name in self.others)):
            prefix, seconds = f"{name}/" if name else "", self.seconds.get(name)
            time = "-" if seconds is None else f"{seconds:.3g}"
            lines.append([label, *(_cell(self.figures, prefix + figure) for figure in shown), time])
            if any(prefix + figure in (paper or {}) for figure in (*shown, SECONDS)):
                printed = (paper or {}).get(prefix + SECONDS, "-")
                beside = (_beside(self.figures, paper, prefix + figure) for figure in shown)
                lines.append(["  in the paper", *beside, str(printed)])
        for name in self.others:
            paired = (_cell(self.figures, f"minus_{name}/{figure}", signed=True) for figure in shown)
            lines.append([f"less {name}", *paired, ""])
        counts = [f"{name} {self.figures[name]:.0f}" for name in COUNTS if name in self.figures]
        return "\n".join([*_aligned(lines), ", ".join(counts)])

    def write(
        self,
        folder: str | Path,
        paper: Mapping[str, float] | None = None,
        parquet: bool | None = None,
    ) -> list[Path]:
        """Write all tables and the curves, and return what was written.

        ``results.csv`` and ``.txt`` hold the figures, ``classes.csv`` the Pointing Game by class,
        ``samples.csv`` a row per trial, method and figure, ``curves.png`` the mean curves. With pyarrow,
        figures and samples are there as ``.parquet`` as well.

        Args:
            folder: Made if it is not there.
            paper: As for ``rows``.
            parquet: Write Parquet; None does if pyarrow is installed.

        Raises:
            ImportError: If Parquet is asked for and pyarrow is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "results.txt"]
        written[0].write_text(self.table(paper) + "\n")
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


def _class_name(names: Sequence[str], target: int) -> str:
    return names[target] if target < len(names) else str(target)


def per_class(metric: SESSMetric, names: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
    """Return the Pointing Game's trials and hits, a row per class.

    Args:
        metric: Holds the rows of all samples.
        names: Of the classes, as far as known.
        others: Names of the methods beside, in the metric's order.
    """
    targets = metric.rows("targets")
    table = []
    for target in targets.unique().tolist():
        row: dict[str, Any] = {"class": _class_name(names, target)}
        for place, name in enumerate(("method", *others)):
            hits = metric.rows(f"hits_{place}")[targets == target]
            row |= {"trials": int((hits >= 0).sum()), f"{name}_hits": int((hits == 1).sum())}
        table.append(row)
    return table


def per_sample(
    metric: SESSMetric,
    names: Sequence[str],
    others: Sequence[str],
    entries: Mapping[int, Mapping[str, Any]],
) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of a table with a row per trial, method and figure.

    Args:
        metric: Holds the rows of all samples.
        names: Of the classes, as far as known.
        others: Names of the methods beside, in the metric's order.
        entries: The records that the rows came from, by sample.
    """
    counts = [len(entry["rows"]["targets"]) for entry in entries.values()]
    targets = metric.rows("targets").numpy()
    known = {
        "sample": np.repeat(list(entries), counts),
        "id": np.repeat([str(entry["id"]) for entry in entries.values()], counts),
        "target": targets,
        "class": np.array([_class_name(names, target) for target in targets.tolist()]),
        "predicted": metric.rows("predicted").numpy(),
        "score": metric.rows("ends")[:, 0].double().numpy(),
        "difficult": metric.rows("difficult").numpy(),
    }
    parts = []
    for place, name in enumerate(("method", *others)):
        insertion, deletion = curve_auc(metric.rows(f"curves_{place}").double()).unbind(1)
        hits = metric.rows(f"hits_{place}").double()
        found = {
            "insertion": insertion,
            "deletion": deletion,
            "overall": insertion - deletion,
            "hit": hits.where(hits >= 0, torch.nan),
            "flat": metric.rows(f"flat_{place}").double(),
        }
        for figure, values in found.items():
            there = values.isfinite().numpy()
            own = {"method": name, "figure": figure}
            part = {column: each[there] for column, each in known.items()}
            part |= {column: np.repeat(told, there.sum()) for column, told in own.items()}
            parts.append({**part, "value": values.numpy()[there]})
    return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}


def _row(
    figures: Mapping[str, float], paper: Mapping[str, float], prefix: str, label: str, figure: str
) -> dict[str, Any]:
    key = prefix + figure
    line = _line(label, figure, figures[key], paper[key] / 100 if key in paper else None)
    return line | {end: figures.get(f"{key}_{end}") for end in ("ci_low", "ci_high")}


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
    form = "{:+.2f}" if signed else "{:.2f}"
    ends = [f"{key}_ci_low", f"{key}_ci_high"]
    inside = ", ".join(form.format(100 * figures[end]) for end in ends if end in figures)
    return form.format(100 * figures[key]) + (f" [{inside}]" if inside else "")


def _beside(figures: Mapping[str, float], paper: Mapping[str, float] | None, key: str) -> str:
    if not paper or key not in paper or key not in figures:
        return "-"
    return f"{paper[key]:.1f} ({100 * figures[key] - paper[key]:+.2f})"


def _aligned(lines: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def write_table(path: Path, columns: Mapping[str, Any], parquet: bool | None) -> list[Path]:
    """Write columns as CSV, and as Parquet beside it; return what was written.

    Args:
        path: Of the CSV.
        columns: Of equal length.
        parquet: As for ``Results.write``.

    Raises:
        ImportError: If Parquet is asked for and pyarrow is not installed.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
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
