"""Where a run goes: one sink per logger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from sess_lightning.reporting.run import RunReport


class Sink(ABC):
    """Takes whole runs; scores travel through Lightning's own logging as well.

    A sink keeps nothing between two calls that a run could leave half-filled.
    """

    name: str

    @abstractmethod
    def write(self, report: RunReport) -> None:
        """Show a run whose scores are known; the user's metrics and the alerts are still to come."""

    def close(self, report: RunReport) -> None:  # noqa: B027
        """End a run: ``report`` is that of ``write`` with the user's metrics and the alerts."""

    def alert(self, title: str, text: str) -> None:  # noqa: B027
        """Tell the user now, where the logger can."""


def cell(value: Any) -> str:
    """Return a value as text for a cell of a Markdown table."""
    text = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
