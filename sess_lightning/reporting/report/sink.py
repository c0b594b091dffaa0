"""The report: a page that replays the training offline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sess_lightning.reporting.remote import RemoteFolder, is_remote
from sess_lightning.reporting.report.page import write_report
from sess_lightning.reporting.report.records import append, carry, record_of
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import Sink


class ReportSink(Sink):
    """A page that replays the training offline, rewritten after every validation run.

    Args:
        folder: Folder of ``report.html``; what it is drawn from is appended to files in ``records``.
        training: The folder of this training's records (``folder``); records in another folder are copied
            here. A checkpoint that keeps it lets a resumed training continue the same page.
        home: The remote folder that ``folder`` is a copy of; None if it is local.
    """

    def __init__(
        self, folder: str | Path, training: dict[str, str] | None = None, home: str | None = None
    ) -> None:
        self._folder, self._home = Path(folder), home
        self._training: dict[str, str] = {} if training is None else training

    @property
    def name(self) -> str:  # type: ignore[override]
        """Path of the page."""
        return str(self._folder / "report.html")

    def write(self, report: RunReport) -> None:
        """Do nothing yet: the page shows a run together with the user's metrics."""

    def close(self, report: RunReport) -> None:
        """Append the run to the records, and write the page."""
        records = (self._folder / "records").absolute()
        home = f"{self._home}/records" if self._home else str(records)
        source, self._training["folder"] = self._training.get("folder", home), home
        if source != home:
            report = _carried(source, records, report)
        append(records, record_of(records, report))
        write_report(records, self.name, run=report.run)


def _carried(source: str, records: Path, report: RunReport) -> RunReport:
    """Copy the records that a resumed training wrote elsewhere; if they cannot be read, the page says so."""
    try:
        if is_remote(source):
            copy = RemoteFolder(source, "*")
            carry(copy.local, records, report.run)
        else:
            carry(source, records, report.run)
    except OSError as error:
        lost = f"The runs before this one are missing: they are in {source}, which cannot be read ({error})."
        return replace(report, alerts=[*report.alerts, lost])
    return report
