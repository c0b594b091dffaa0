"""Where pictures and curves go: one sink per logger."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sess_lightning.reporting.panels import Panel
from sess_lightning.reporting.report.page import write_report
from sess_lightning.reporting.report.records import RunRecord, append, carry, keep_sample
from sess_lightning.reporting.sink import Sink, _pretends, _without_pictures


class ReportSink(Sink):
    """One page that replays the training offline, written anew after every validation run.

    Args:
        folder: ``report.html`` is written here, and what it is drawn from, append-only, into ``records``.
        history: Which training this is (``run``) and where its records are (``folder``). Filled at the first
            run if empty; a checkpoint that keeps it lets a resumed training go on with the same page.
    """

    def __init__(self, folder: str | Path, history: dict[str, str] | None = None) -> None:
        self._folder = Path(folder)
        self._history: dict[str, str] = {} if history is None else history
        self._pending: dict[str, Any] = {}

    @property
    def name(self) -> str:  # type: ignore[override]
        """Where the page is."""
        return str(self._folder / "report.html")

    def panels(self, key: str, panels: Sequence[Panel], when: Mapping[str, int]) -> None:  # noqa: ARG002
        """Keep the pictures."""
        self._keep(when, panel=[keep_sample(self._folder / "records", panel) for panel in panels])

    def curves(
        self,
        key: str,  # noqa: ARG002
        curves: Mapping[str, Float[Tensor, "2 T"]],
        when: Mapping[str, int],
    ) -> None:
        """Keep every point."""
        self._keep(when, curves={name: curve.tolist() for name, curve in curves.items()})

    def scalars(self, key: str, values: Mapping[str, float], when: Mapping[str, int]) -> None:  # noqa: ARG002
        """Keep the figures."""
        self._keep(when, scalars=dict(values))

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], when: Mapping[str, int]) -> None:
        """Keep the rows."""
        self._keep(when)
        self._pending.setdefault("tables", {})[key.rpartition("/")[2]] = [*map(_without_pictures, rows)]

    def settings(self, values: Mapping[str, Any], when: Mapping[str, int]) -> None:
        """Keep them."""
        self._keep(when, settings=dict(values))

    def alert(self, title: str, text: str) -> None:  # noqa: ARG002
        """Keep the text: the page shows it above all figures."""
        self._pending.setdefault("alerts", []).append(text)

    def close(self, metrics: Mapping[str, float], when: Mapping[str, int]) -> None:
        """Append the run to the records, and write the page."""
        self._keep(when, metrics=dict(metrics))
        records = (self._folder / "records").absolute()
        run, source = self._history.get("run") or uuid.uuid4().hex, self._history.get("folder")
        if source and Path(source) != records:
            carry(source, records, run)
        self._history.update(run=run, folder=str(records))
        append(records, RunRecord(run=run, **self._pending))
        self._pending = {}
        write_report(records, self.name)

    def _keep(self, when: Mapping[str, int], **values: Any) -> None:
        if {name: self._pending.get(name) for name in when} != dict(when):
            self._pending = dict(when)  # The run before was never closed: some part of it failed.
        self._pending |= values


def report_folder(loggers: Sequence[Any], default: str | Path) -> Path:
    """Return where the first logger keeps this run's files; for those that tell of none, its checkpoints."""
    logger = next((each for each in loggers if not _pretends(each)), None)
    if own := getattr(logger, "log_dir", None):
        return Path(own)
    name, version = getattr(logger, "name", None), getattr(logger, "version", None)
    folder = Path(getattr(logger, "save_dir", None) or default)
    return folder / str(name) / str(version) if name and version is not None else folder
