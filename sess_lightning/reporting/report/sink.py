"""The report: a page that replays the training offline."""

from __future__ import annotations

from dataclasses import replace
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
        source, self._training["folder"] = self._training.get("folder"), str(records)
        if source and Path(source) != records:
            report = _carried(source, records, report)
        append(records, record_of(records, report))
        write_report(records, self.name, run=report.run)


def _carried(source: str, records: Path, report: RunReport) -> RunReport:
    """Bring along what a resumed training wrote elsewhere; the page says so if that cannot be read."""
    try:
        carry(source, records, report.run)
    except OSError as error:
        lost = f"The runs before this one are missing: they are in {source}, which cannot be read ({error})."
        return replace(report, alerts=[*report.alerts, lost])
    return report
