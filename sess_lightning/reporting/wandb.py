"""Weights & Biases: a run in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sess_lightning.reporting.panels import Panel, curve_figure
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import LoggerSink, cell, plain_row, score_rows
from sess_lightning.scores import CURVES, SCORES, split


class WandbSink(LoggerSink):
    """Weights & Biases: one media key whose step slider replays the training, and a chart of the curves."""

    name = "W&B"

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._defined: set[str] = set()

    def write(self, report: RunReport) -> None:
        """Add everything to W&B's open row, which Lightning completes with its own row of this validation."""
        self._define(report)
        row = {self.key(report, name): value for part in _parts(report) for name, value in part.items()}
        # Uncommitted and without step=: every committed row advances W&B's own step, and then rows that the
        # user logs with another step, such as trainer.global_step, are dropped.
        row |= {"trainer/global_step": report.step, "epoch": report.epoch}
        self.experiment.log(row, commit=False)

    def alert(self, title: str, text: str) -> None:
        """Send W&B's alert, by mail or Slack as configured by the user."""
        self.experiment.alert(title=title, text=text, level="WARN")

    def _define(self, report: RunReport) -> None:
        """Make W&B's summary keep the best and the last value of the scores that Lightning logs."""
        for name in report.values.keys() - self._defined:
            known = split(name)
            if known is None or known.minus or known.end or not SCORES[known.score].better:
                continue
            best = {"higher": "max", "lower": "min"}[SCORES[known.score].better]
            self.experiment.define_metric(
                self.key(report, name), step_metric="trainer/global_step", step_sync=True,
                summary=f"{best},last",
            )  # fmt: skip
            self._defined.add(name)


def _parts(report: RunReport) -> list[dict[str, Any]]:
    """Return what is logged, by name."""
    import wandb

    tables = {"scores": score_rows(report), **report.tables}
    parts: list[dict[str, Any]] = [_table(name, rows) for name, rows in tables.items() if rows]
    if report.panels:
        parts.append({"panel": [_strip(panel) for panel in report.panels]})
    if report.curves:
        # The chart shows the newest run; the image's step slider goes back to any run.
        picture = wandb.Image(curve_figure(report.labelled_curves(), report.title), file_type="jpg")
        parts.append({"curves": _chart(report), "curves_by_epoch": [picture]})
    return parts


def _strip(panel: Panel) -> Any:
    """Return image | base | SESS with caption and boxes."""
    import wandb

    return wandb.Image(
        panel.strip, caption=f"{panel.title}\n{panel.caption}", boxes=_boxes(panel), file_type="jpg"
    )


def _chart(report: RunReport) -> Any:
    """Return a line chart of all methods' curves."""
    import wandb

    lines = {
        f"{kind}, {name}": curve[row].tolist()
        for name, curve in report.labelled_curves().items()
        for row, kind in enumerate(CURVES)
    }
    share = np.linspace(0, 1, len(next(iter(lines.values())))).tolist()
    return wandb.plot.line_series(
        xs=share, ys=list(lines.values()), keys=list(lines), title=f"Mean curves, epoch {report.epoch}",
        xname="share of pixels changed, most salient first",
    )  # fmt: skip


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a table, and the images of its rows under ``<name>_pictures``."""
    import wandb

    # In a table, images would become an artifact without a step slider.
    plain = [plain_row(row) for row in rows]
    table = wandb.Table(columns=list(plain[0]), data=[list(row.values()) for row in plain])
    pictures = [
        wandb.Image(value, caption="\n".join(f"{k}: {cell(v)}" for k, v in row.items()), file_type="jpg")
        for row, whole in zip(plain, rows, strict=True)
        for value in whole.values()
        if isinstance(value, np.ndarray)
    ]
    return {name: table, **({f"{name}_pictures": pictures} if pictures else {})}


def _boxes(panel: Panel) -> dict[str, Any] | None:
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
