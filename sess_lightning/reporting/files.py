"""Images and tables as files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sess_lightning.locks import held
from sess_lightning.reporting.paths import inside, write_whole
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import Sink, columns_of, plain_tables
from sess_lightning.scores import CURVES

TAIL = 1 << 16
"""An upper bound of a table's line, bytes."""


class FileSink(Sink):
    """JPEG and CSV files: an image per validation run, a row per score, point of a curve, or sample.

    Several trainings may write into one folder: rows have the training's name in the column ``run``, images
    in their file name.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Where the files are."""
        return f"files in {self._folder}"

    def write(self, report: RunReport) -> None:
        """Append to the tables, then write the images, which take longer."""
        tables: dict[str, Iterable[Mapping[str, Any]]] = {
            "scalars": ({"name": name, "value": value} for name, value in report.values.items()),
            "curves": _points(report),
            **plain_tables(report),
        }
        for name, rows in tables.items():
            whole = [{"run": report.run, **report.when, **row} for row in rows]
            if whole:
                append_rows(inside(self._folder, report.key(f"{name}.csv")), whole)
        for name, drawing in report.drawings.items():
            write_whole(inside(self._folder, report.key(f"{name}/{report.stem}.jpg")), [drawing.jpeg])


def _points(report: RunReport) -> Iterator[dict[str, Any]]:
    for method, curves in report.curves.items():
        about = {"method": report.label(method), "n": report.count(method)}
        for i, values in enumerate(curves.T.tolist()):
            yield {**about, "step_of_curve": i, **dict(zip(CURVES, values, strict=True))}


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append one run's rows to a CSV.

    A last line that was cut short is dropped. So are rows of the same training from this epoch and step on:
    they are left over from before it was resumed from an earlier checkpoint.

    Args:
        path: The table; it and its folder are created if they do not exist.
        rows: Rows with the same columns, among them ``run``, ``epoch`` and ``step``.
    """
    columns = list(rows[0])
    with held(path):
        old = _header(path)
        if old and (old != columns or not _follows(path, columns, rows[0])):
            columns = list(dict.fromkeys([*old, *columns]))
            _keep(path, columns, lambda row: _is_before(row, rows[0]))
        text = table(rows, columns, header=not old)
        with path.open("ab") as file:
            file.write(text.encode())


def _header(path: Path) -> list[str]:
    """Return the columns of a table; none if it does not exist or has no whole line."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        line = file.readline()
        if not line.endswith(b"\n"):
            os.truncate(path, 0)
            return []
    return next(csv.reader([line.decode(errors="replace")]))


def _follows(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> bool:
    """Return whether a table ends with a whole line that ``row`` may follow, as it usually does."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        end = file.read()
    last = end[:-1].rpartition(b"\n")[2].decode(errors="replace")
    if not end.endswith(b"\n"):
        return False
    values = next(csv.reader([last]))
    if values == list(columns):
        return True
    last_row = dict(zip(columns, values, strict=False))
    return last_row.get("run") == row["run"] and _is_before(last_row, row)


def _is_before(old: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Return whether a row of the table belongs to another training, or to an earlier run of the same one."""
    if old.get("run") != row["run"]:
        return True
    try:
        return (int(old["epoch"]), int(old["step"])) < (row["epoch"], row["step"])
    except (ValueError, TypeError, KeyError):
        return False


def _keep(path: Path, columns: Sequence[str], kept: Callable[[Mapping[str, str]], bool]) -> None:
    """Rewrite a table with ``columns`` and the rows to keep, if that changes anything."""
    text = path.read_bytes().decode(errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    rows = [row for row in csv.DictReader(lines) if kept(row)]
    whole = table(rows, columns)
    if whole != text:
        write_whole(path, [whole.encode()])


def table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, *, header: bool = True
) -> str:
    """Return rows as CSV, one a line, without cells that a spreadsheet takes for formulas."""
    file, columns = io.StringIO(newline=""), columns_of(rows) if columns is None else columns
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({key: harmless(row.get(key)) for key in columns} for row in rows)
    return file.getvalue()


def harmless(value: Any) -> Any:
    """Return a value as a CSV cell, on one line, that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = " ".join(value.splitlines())
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
