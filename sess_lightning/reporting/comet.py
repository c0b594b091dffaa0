"""Comet: images and tables of a run at its step."""

from __future__ import annotations

from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import LoggerSink, columns_of, logged_tables


class CometSink(LoggerSink):
    """Comet: panel and curves as images with a step slider, tables as CSV, alerts as text."""

    name = "Comet"

    def write(self, report: RunReport) -> None:
        """Log tables and images."""
        for name, rows in logged_tables(report).items():
            columns = columns_of(rows)
            cells = [[row.get(column) for column in columns] for row in rows]
            path = f"{self.key(report, name)}/{report.stem}.csv"
            self.experiment.log_table(path, tabular_data=cells, headers=columns)
        for name, drawing in report.drawings.items():
            self.experiment.log_image(drawing.picture, name=self.key(report, name), step=report.step)

    def close(self, report: RunReport) -> None:
        """Log the alert as text."""
        for text in report.alerts:
            self.experiment.log_text(text, step=report.step)
