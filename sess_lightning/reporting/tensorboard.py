"""Where pictures and curves go: one sink per logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sess_lightning.reporting.panels import Panel, curve_figure, sheet
from sess_lightning.reporting.sink import Sink, _cell, _title, _without_pictures


class TensorBoardSink(Sink):
    """TensorBoard: the samples as one captioned sheet, the curves as a figure."""

    name = "TensorBoard"

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def panels(self, key: str, panels: Sequence[Panel], when: Mapping[str, int]) -> None:
        """Add the sheet as an image."""
        self._logger.experiment.add_image(key, sheet(panels), when["step"], dataformats="HWC")

    def curves(self, key: str, curves: Mapping[str, Float[Tensor, "2 T"]], when: Mapping[str, int]) -> None:
        """Add the figure as an image."""
        self._logger.experiment.add_image(
            key, curve_figure(curves, _title(when)), when["step"], dataformats="HWC"
        )

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], when: Mapping[str, int]) -> None:
        """Add the table as text, without pictures."""
        told = [_without_pictures(row) for row in rows]
        lines = [list(told[0]), ["---"] * len(told[0]), *(map(_cell, row.values()) for row in told)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self._logger.experiment.add_text(key, text, when["step"])

    def alert(self, title: str, text: str) -> None:
        """Add the text."""
        self._logger.experiment.add_text(title, text)
