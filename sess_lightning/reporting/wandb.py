"""Where pictures and curves go: one sink per logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sess_lightning.reporting.panels import Panel, curve_figure
from sess_lightning.reporting.sink import Sink, _cell, _title, _without_pictures

BEST = {
    "insertion": "max", "overall": "max", "pointing_game": "max", "relevance_mass": "max", "deletion": "min",
}  # fmt: skip
"""Which end of a figure is the good one, by the last part of its name."""


class WandbSink(Sink):
    """Weights & Biases: one media key whose step slider replays the training, and a chart of the curves."""

    name = "W&B"

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._defined: set[str] = set()

    def panels(self, key: str, panels: Sequence[Panel], when: Mapping[str, int]) -> None:
        """Log image | base | SESS strips with their captions and boxes."""
        import wandb

        pictures = [
            wandb.Image(
                panel.strip,
                caption=f"{panel.title}\n{panel.caption}",
                boxes=_wandb_boxes(panel),
                file_type="jpg",
            )
            for panel in panels
        ]
        self._log({key: pictures}, when)

    def curves(self, key: str, curves: Mapping[str, Float[Tensor, "2 T"]], when: Mapping[str, int]) -> None:
        """Log a line chart of all methods."""
        import wandb

        lines = {
            f"{kind}, {name}": curve[row].tolist()
            for name, curve in curves.items()
            for row, kind in enumerate(("insertion", "deletion"))
        }
        share = np.linspace(0, 1, len(next(iter(lines.values())))).tolist()
        chart = wandb.plot.line_series(
            xs=share, ys=list(lines.values()), keys=list(lines), title=f"Mean curves, epoch {when['epoch']}",
            xname="share of pixels changed, most salient first",
        )  # fmt: skip
        # The chart shows the newest run; the picture's step slider goes back to any.
        picture = wandb.Image(curve_figure(curves, _title(when)), file_type="jpg")
        self._log({key: chart, f"{key}_by_epoch": [picture]}, when)

    def scalars(self, key: str, values: Mapping[str, float], when: Mapping[str, int]) -> None:  # noqa: ARG002
        """Have W&B's summary keep the best and the last value of the figures that Lightning logs."""
        prefix = key.rsplit("/", 1)[0]
        for name in set(values) - self._defined:
            best = BEST.get(name.rsplit("/", 1)[-1])
            if best is not None and not name.startswith("minus_"):
                self._logger.experiment.define_metric(
                    f"{prefix}/{name}", step_metric="trainer/global_step", step_sync=True,
                    summary=f"{best},last",
                )  # fmt: skip
        self._defined |= set(values)

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], when: Mapping[str, int]) -> None:
        """Log a table, and beside it the pictures of its rows under ``<key>_pictures``."""
        import wandb

        # In a table, pictures would become an artifact, which has no step slider.
        told = [_without_pictures(row) for row in rows]
        table = wandb.Table(columns=list(told[0]), data=[list(row.values()) for row in told])
        pictures = [
            wandb.Image(value, caption="\n".join(f"{k}: {_cell(v)}" for k, v in row.items()), file_type="jpg")
            for row, whole in zip(told, rows, strict=True)
            for value in whole.values()
            if isinstance(value, np.ndarray)
        ]
        self._log({key: table, **({f"{key}_pictures": pictures} if pictures else {})}, when)

    def alert(self, title: str, text: str) -> None:
        """Send W&B's alert, by mail or Slack as the user has set."""
        self._logger.experiment.alert(title=title, text=text, level="WARN")

    def _log(self, values: dict[str, Any], when: Mapping[str, int]) -> None:
        # No step=: W&B drops rows whose step is not the newest. Lightning's own rows carry the same key.
        self._logger.experiment.log({**values, "trainer/global_step": when["step"], "epoch": when["epoch"]})


def _wandb_boxes(panel: Panel) -> dict[str, Any] | None:
    if not panel.boxes:
        return None
    data = [
        {
            "position": {"minX": float(x0), "minY": float(y0), "maxX": float(x1), "maxY": float(y1)},
            "domain": "pixel",
            "class_id": 0,
            "box_caption": panel.label,
        }
        for x0, y0, x1, y1 in panel.boxes
    ]
    return {"ground_truth": {"box_data": data, "class_labels": {0: panel.label or "target"}}}
