"""Hands one report to every sink; each may fail by itself."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sess_lightning.reporting.comet import CometSink
from sess_lightning.reporting.files import FileSink
from sess_lightning.reporting.loggers import is_dummy, kinds, report_folder, run_folder
from sess_lightning.reporting.mlflow import MLflowSink
from sess_lightning.reporting.paths import safe_name
from sess_lightning.reporting.remote import RemoteFolder, RemoteSink, is_remote, local_path
from sess_lightning.reporting.report.sink import ReportSink
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import Sink
from sess_lightning.reporting.tensorboard import TensorBoardSink
from sess_lightning.reporting.wandb import WandbSink

SINKS: dict[str, Callable[[Any], Sink]] = {
    "WandbLogger": WandbSink, "TensorBoardLogger": TensorBoardSink, "MLFlowLogger": MLflowSink,
    "CometLogger": CometSink,
}  # fmt: skip
"""Name of a logger's class -> its sink."""
PATIENCE = 3
"""Each of this many failures in a row is reported."""


class Publisher:
    """Hands every run to the sinks.

    A sink that fails costs a warning, and the other sinks go on. After three failures in a row it is still
    tried, but silently: a full disk may have room again.

    Args:
        protect: Returns a context that turns an error into a warning; its argument says what the error costs.
        warn: Warns the user.
    """

    def __init__(
        self, protect: Callable[[str], AbstractContextManager[None]], warn: Callable[[str], None]
    ) -> None:
        self._protect, self._warn = protect, warn
        self._sinks: list[Sink] = []
        self._page: Sink | None = None
        self._failures: Counter[tuple[Sink, str]] = Counter()
        self._training: dict[str, str] = {}
        self._report: RunReport | None = None
        self._alerts: list[str] = []

    @property
    def names(self) -> list[str]:
        """Names of the sinks; empty if nothing is shown."""
        return [sink.name for sink in self._sinks]

    @property
    def text(self) -> str:
        """Where a run goes, as text."""
        others = [sink.name for sink in self._sinks if sink is not self._page]
        page = self._page.name if self._page is not None else "none"
        return f"pictures: {', '.join(others) or 'none'}; report: {page}"

    def connect(
        self,
        loggers: Sequence[Any],
        log_dir: str | Path,
        *,
        prefix: str,
        stage: str = "fit",
        training: dict[str, str] | None = None,
        report: bool = True,
    ) -> None:
        """Create the sinks of a training; one that cannot be created costs a warning.

        Args:
            loggers: Lightning's loggers; without any, images and tables become files in ``log_dir``.
            log_dir: Folder for the files of loggers that have none of their own.
            prefix: First part of all keys and folders.
            stage: ``"fit"``; any other stage gets a page of its own, in a folder of that name.
            training: The training's name (``run``), and the folder of the page's records (``folder``). Filled
                in here if empty; a checkpoint that keeps it lets a resumed training continue the same page.
            report: Whether to write a page.
        """
        self.disconnect()
        self._training = {} if training is None or stage != "fit" else training
        self._training.setdefault("run", uuid.uuid4().hex)
        for logger in loggers or (None,):
            with self._protect(f"pictures are missing in {type(logger).__name__}"):
                sink = sink_for(logger, run_folder(logger, log_dir))
                if sink is not None and all(sink.place != other.place for other in self._sinks):
                    self._sinks.append(sink)
        if report:
            with self._protect("report is missing"):
                name = safe_name(prefix if stage == "fit" else f"{prefix}/{stage}")
                self._page = page_in(f"{report_folder(loggers, log_dir)}/{name}", self._training)
                self._sinks.append(self._page)

    def disconnect(self) -> None:
        """Drop all sinks: from now on nothing is published."""
        self._sinks, self._page, self._report, self._alerts = [], None, None, []
        self._failures.clear()

    def publish(self, report: RunReport) -> None:
        """Write a run to every sink."""
        self._report, self._alerts = replace(report, run=self._training.get("run", "")), []
        for sink in self._sinks:
            self._try(sink, "write", f"pictures are missing in {sink.name}", self._report)

    def alert(self, title: str, text: str) -> None:
        """Alert the user through every sink that can; the open run keeps the text."""
        self._alerts.append(text)
        for sink in self._sinks:
            self._try(sink, "alert", f"alert is missing in {sink.name}", title, text)

    def close(self, metrics: Mapping[str, float], accuracy: str = "") -> None:
        """End the run that was published last, if it is still open.

        Args:
            metrics: The user's own metrics.
            accuracy: Key of the accuracy among them, if there is one.
        """
        if self._report is None:
            return
        report = replace(self._report, metrics=metrics, accuracy=accuracy, alerts=tuple(self._alerts))
        self._report, self._alerts = None, []
        for sink in self._sinks:
            self._try(sink, "close", f"figures are missing in {sink.name}", report)

    def _try(self, sink: Sink, verb: str, lost: str, *args: Any) -> None:
        before = self._failures[sink, verb]
        with self._protect(lost):
            try:
                getattr(sink, verb)(*args)
                self._failures[sink, verb] = 0
            except Exception:
                self._failures[sink, verb] += 1
                if before < PATIENCE:
                    raise
        if before == PATIENCE - 1 and self._failures[sink, verb] == PATIENCE:
            self._warn(
                f"{sink.name} failed three times in a row; from now on it is tried without further warnings."
            )


def sink_for(logger: Any, folder: str | Path) -> Sink | None:
    """Return the sink for a Lightning logger: files below ``folder`` for None or one without images.

    Loggers are recognised by their classes' names, so that their packages need not be imported; the dummy
    logger of ``fast_dev_run`` gets no sink.
    """
    names = kinds(logger)
    if is_dummy(logger):
        return None
    for name, sink in SINKS.items():
        if name in names:
            return sink(logger)
    return files_in(str(folder))


def files_in(folder: str) -> Sink:
    """Return the sink for files in a folder, which may be remote (fsspec)."""
    if not is_remote(folder):
        return FileSink(local_path(folder))
    remote = RemoteFolder(folder, "*.csv")
    return RemoteSink(f"files in {folder}", remote, FileSink(remote.local))


def page_in(folder: str, training: dict[str, str]) -> Sink:
    """Return the sink for the page in a folder, which may be remote (fsspec)."""
    if not is_remote(folder):
        return ReportSink(local_path(folder), training)
    remote = RemoteFolder(folder, "records/*", "report*.html")
    return RemoteSink(f"{folder}/report.html", remote, ReportSink(remote.local, training, home=folder))
