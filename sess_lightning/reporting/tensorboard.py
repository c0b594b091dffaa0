"""TensorBoard: pictures and tables of a run at its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sess_lightning.reporting.loggers import prefixed
from sess_lightning.reporting.panels import curve_figure, sheet
from sess_lightning.reporting.run import RunReport, without_pictures
from sess_lightning.reporting.sink import Sink, cell


class TensorBoardSink(Sink):
    """TensorBoard: the samples as one captioned sheet, the curves as a figure, tables as text."""

    name = "TensorBoard"

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def write(self, report: RunReport) -> None:
        """Add pictures and tables."""
        add, step = self._logger.experiment, report.step
        for name, rows in report.tables.items():
            if rows:
                add.add_text(self._key(report, name), markdown(rows), step)
        if report.panels:
            add.add_image(self._key(report, "panel"), sheet(report.panels), step, dataformats="HWC")
        if report.curves:
            figure = curve_figure(report.labelled_curves(), report.title)
            add.add_image(self._key(report, "curves"), figure, step, dataformats="HWC")

    def close(self, report: RunReport) -> None:
        """Add what the user was warned of."""
        if report.alerts:
            self._logger.experiment.add_text(
                self._key(report, "alert"), "\n\n".join(report.alerts), report.step
            )

    def _key(self, report: RunReport, name: str) -> str:
        return prefixed(self._logger, report.key(name))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table, without pictures."""
    plain = [without_pictures(row) for row in rows]
    lines = [list(plain[0]), ["---"] * len(plain[0]), *(map(cell, row.values()) for row in plain)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
