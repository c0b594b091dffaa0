"""The report: a page that replays the training offline."""

from __future__ import annotations

from pathlib import Path

from sess_lightning.reporting.report.page import write_report
from sess_lightning.reporting.report.records import append, carry, record_of
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import Sink


class ReportSink(Sink):
    """One page that replays the training offline, written anew after every validation run.

    Args:
        folder: ``report.html`` is written here, and what it is drawn from, append-only, into ``records``.
        training: Where this training's records are (``folder``); another one's are carried here. A checkpoint
            that keeps it lets a resumed training go on with the same page.
    """

    def __init__(self, folder: str | Path, training: dict[str, str] | None = None) -> None:
        self._folder = Path(folder)
        self._training: dict[str, str] = {} if training is None else training

    @property
    def name(self) -> str:  # type: ignore[override]
        """Where the page is."""
        return str(self._folder / "report.html")

    def write(self, report: RunReport) -> None:
        """Wait: the page shows a run together with the user's metrics."""

    def close(self, report: RunReport) -> None:
        """Append the run to the records, and write the page."""
        records = (self._folder / "records").absolute()
        source = self._training.get("folder")
        if source and Path(source) != records:
            carry(source, records, report.run)
        self._training["folder"] = str(records)
        append(records, record_of(records, report))
        write_report(records, self.name)
