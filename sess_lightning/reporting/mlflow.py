"""MLflow: images and tables below the logger's run."""

from __future__ import annotations

from sess_lightning.reporting.files import table
from sess_lightning.reporting.paths import safe_name
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import LoggerSink, logged_tables


class MLflowSink(LoggerSink):
    """MLflow: panel and curves as images with a step slider, tables as CSV artifacts, alerts as a tag."""

    name = "MLflow"

    def write(self, report: RunReport) -> None:
        """Log tables and images."""
        run = self._logger.run_id
        for name, rows in logged_tables(report).items():
            self.experiment.log_text(run, table(rows), f"{self.key(report, name)}/{report.stem}.csv")
        for name, drawing in report.drawings.items():
            self.experiment.log_image(run, drawing.picture, key=self.key(report, name), step=report.step)

    def close(self, report: RunReport) -> None:
        """Tag the run with the alert."""
        if report.alerts:
            text = "\n".join(report.alerts)
            self.experiment.set_tag(self._logger.run_id, self.key(report, "alert"), text)

    def key(self, report: RunReport, name: str) -> str:
        """Return a key that is a valid path."""
        return safe_name(super().key(report, name))
