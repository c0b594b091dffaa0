"""Where a run goes: one sink per logger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from sess_lightning.reporting.run import Drawing, RunReport
from sess_lightning.scores import ENDS, SCORES, Key, split

SCORE_COLUMNS = ("value", *ENDS, "difference", *(f"difference_{end}" for end in ENDS))


class Sink(ABC):
    """Takes whole runs; scores are also logged by Lightning itself.

    Between two calls, a sink keeps nothing that a run could leave half-filled.
    """

    name: str

    @property
    def place(self) -> Hashable:
        """The sink's destination: of two sinks for one place, only the first is used."""
        return self.name

    @abstractmethod
    def write(self, report: RunReport) -> None:
        """Show a run when its scores are known; the user's metrics and the alerts follow later."""

    def close(self, report: RunReport) -> None:  # noqa: B027
        """End a run: ``report`` is that of ``write``, with the user's metrics and the alerts."""

    def alert(self, title: str, text: str) -> None:  # noqa: B027
        """Alert the user now, if the logger can."""


class LoggerSink(Sink):
    """Sends runs through a Lightning logger, under keys in the logger's own form."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    @property
    def place(self) -> Hashable:
        """The logger's folder, else its run, else the logger itself."""
        names = (getattr(self._logger, name, None) for name in ("log_dir", "version"))
        return self.name, next((name for name in names if name is not None), id(self._logger))

    @property
    def experiment(self) -> Any:
        """The client of the logger's package."""
        return self._logger.experiment

    def key(self, report: RunReport, name: str) -> str:
        """Return a key with the logger's own prefix: ``WandbLogger(prefix="a")`` puts ``"a-"`` before."""
        prefix = getattr(self._logger, "_prefix", None)
        return f"{prefix}-{report.key(name)}" if isinstance(prefix, str) and prefix else report.key(name)


def plain_tables(report: RunReport) -> dict[str, list[dict[str, Any]]]:
    """Return the tables that have rows, without images."""
    return {name: [*map(plain_row, rows)] for name, rows in report.tables.items() if rows}


def logged_tables(report: RunReport) -> dict[str, list[dict[str, Any]]]:
    """Return the tables that a logger gets: first the scores of every method, then the others."""
    return {"scores": score_rows(report), **plain_tables(report)}


def score_rows(report: RunReport) -> list[dict[str, Any]]:
    """Return a row per score and method, with its interval and the paired difference to the explained one.

    In the order of ``SCORES``, counts last. Loggers draw charts of the main scores only, so that these are
    found.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, value in report.values.items():
        key = split(name) or Key(name)
        row = rows.setdefault((key.score, key.method), {
            "score": key.score, "method": report.label(key.method), **dict.fromkeys(SCORE_COLUMNS),
        })  # fmt: skip
        row["_".join(filter(None, ("difference" if key.minus else "", key.end))) or "value"] = value
    places = {score: place for place, score in enumerate(SCORES)}
    return [rows[key] for key in sorted(rows, key=lambda key: places.get(key[0], len(places)))]


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without its images."""
    return {name: value for name, value in row.items() if not isinstance(value, Drawing)}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def cell(value: Any) -> str:
    """Return a value as text for a cell of a Markdown table."""
    text = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
