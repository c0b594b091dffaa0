"""Pictures and tables as files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sess_lightning.reporting.panels import Picture, curve_figure, sheet
from sess_lightning.reporting.run import RunReport, without_pictures
from sess_lightning.reporting.sink import Sink


class FileSink(Sink):
    """PNG and CSV files: a picture per validation run, a row per score, point of a curve, or sample."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Where the files are."""
        return f"files in {self._folder}"

    def write(self, report: RunReport) -> None:
        """Append to the tables, then write the pictures: numbers do not wait for them."""
        self._append(report, "scalars", ({"name": name, "value": v} for name, v in report.values.items()))
        self._append(report, "curves", _points(report))
        for name, rows in report.tables.items():
            self._append(report, name, map(without_pictures, rows))
        if report.panels:
            self._write(report, "panel", sheet(report.panels))
        if report.curves:
            self._write(report, "curves", curve_figure(report.labelled_curves(), report.title))

    def _write(self, report: RunReport, name: str, picture: Picture) -> None:
        folder = self._inside(report.key(name))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"epoch={report.epoch:03d}-step={report.step:06d}.png")

    def _inside(self, name: str) -> Path:
        path = self._folder / name
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise ValueError(
                f'"{name}" leads out of {self._folder}; use a prefix without ".." or leading "/".'
            )
        return path

    def _append(self, report: RunReport, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        whole = [{**report.when, **row} for row in rows]
        if not whole:
            return
        path = self._inside(report.key(f"{name}.csv"))
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, whole[0])
            if new:
                writer.writeheader()
            writer.writerows(whole)


def _points(report: RunReport) -> Iterable[dict[str, Any]]:
    for method, curves in report.curves.items():
        about = {"method": report.label(method), "n": report.count(method)}
        for i, (insertion, deletion) in enumerate(curves.T.tolist()):
            yield {**about, "step_of_curve": i, "insertion": insertion, "deletion": deletion}
