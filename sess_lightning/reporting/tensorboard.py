"""TensorBoard: images and tables of a run at its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import LoggerSink, cell, columns_of, logged_tables, pictures
from sess_lightning.scores import column_label


class TensorBoardSink(LoggerSink):
    """TensorBoard: the samples as one captioned sheet, the curves as a figure, tables as text."""

    name = "TensorBoard"

    def write(self, report: RunReport) -> None:
        """Add images and tables."""
        for name, rows in logged_tables(report).items():
            self.experiment.add_text(self.key(report, name), markdown(rows), report.step)
        for name, picture in pictures(report):
            self.experiment.add_image(self.key(report, name), picture, report.step, dataformats="HWC")

    def close(self, report: RunReport) -> None:
        """Add the alert as text."""
        if report.alerts:
            text = "\n\n".join(report.alerts)
            self.experiment.add_text(self.key(report, "alert"), text, report.step)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table, with labels for the names of columns."""
    columns = columns_of(rows)
    cells = [[cell(row.get(name)) for name in columns] for row in rows]
    head = [*map(column_label, columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(columns), *cells])
