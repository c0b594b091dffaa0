"""Where pictures and curves go: one sink per logger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sess_lightning.reporting.panels import Panel


class Sink(ABC):
    """Takes pictures and curves; scalars travel through Lightning's own logging."""

    name: str

    @abstractmethod
    def panels(self, key: str, panels: Sequence[Panel], when: Mapping[str, int]) -> None:
        """Show samples under one key.

        Args:
            key: Name of the panel, such as ``"sess/panel"``.
            panels: The same samples every time.
            when: ``epoch`` and ``step`` (optimiser steps so far).
        """

    @abstractmethod
    def curves(self, key: str, curves: Mapping[str, Float[Tensor, "2 T"]], when: Mapping[str, int]) -> None:
        """Show the mean insertion and deletion curves of each method."""

    def scalars(self, key: str, values: Mapping[str, float], when: Mapping[str, int]) -> None:  # noqa: B027
        """Keep the figures where the logger itself does not."""

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], when: Mapping[str, int]) -> None:  # noqa: B027
        """Show rows of plain values and pictures under one key; all have the same columns."""

    def settings(self, values: Mapping[str, Any], when: Mapping[str, int]) -> None:  # noqa: B027
        """Say how the figures are made, in words and numbers."""

    def close(self, metrics: Mapping[str, float], when: Mapping[str, int]) -> None:  # noqa: B027
        """End a validation run, once the user's own ``metrics`` are known as well."""

    def alert(self, title: str, text: str) -> None:  # noqa: B027
        """Tell the user now, where the logger can."""


def _without_pictures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not isinstance(value, np.ndarray)}


def _cell(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _title(when: Mapping[str, int]) -> str:
    return f"Mean curves after epoch {when['epoch']}, step {when['step']}"


def _names(logger: Any) -> set[str]:
    return {cls.__name__ for cls in type(logger).__mro__}


def _pretends(logger: Any) -> bool:
    return "DummyLogger" in _names(logger)
