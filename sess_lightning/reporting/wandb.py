"""Weights & Biases: a run in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sess_lightning.reporting.dashboard import difference, main_scores, thinned
from sess_lightning.reporting.panels import Panel
from sess_lightning.reporting.run import Drawing, RunReport
from sess_lightning.reporting.sink import LoggerSink, cell, plain_row, score_rows
from sess_lightning.scores import CURVES, FAILED, OVERALL, SCORES, SELECTION, column_label, split

FRONT = ("panel", "curves", "difference")
"""What is shown in the same section as the main scores; all else has a section of its own."""
OWNER = {"callback": "SESSCallback"}
"""Marks our part of a run's configuration."""


class WandbSink(LoggerSink):
    """Weights & Biases: one media key whose step slider replays the training, and a chart of the curves.

    W&B draws a chart of every key, in a section named by what stands before the first "/". In ``sess`` there
    are at most twelve: the main scores, the panel, the mean curves and the paired difference. Other scores
    are hidden (W&B offers them where panels are added); tables are in the section ``sess_more``.
    """

    name = "W&B"

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._defined: set[str] = set()
        self._is_configured = False

    def write(self, report: RunReport) -> None:
        """Add everything to W&B's open row, which Lightning completes with its own row of this validation."""
        self._define(report)
        row = {
            self.key(report, name) if name in FRONT else self._further(report, name): value
            for part in _parts(report)
            for name, value in part.items()
        }
        # Uncommitted and without step=: every committed row advances W&B's own step, and then rows that the
        # user logs with another step, such as trainer.global_step, are dropped.
        row |= {"trainer/global_step": report.step, "epoch": report.epoch}
        self.experiment.log(row, commit=False)
        self._configure(report)

    def alert(self, title: str, text: str) -> None:
        """Send W&B's alert, by mail or Slack as configured by the user."""
        self.experiment.alert(title=title, text=text, level="WARN")

    def _further(self, report: RunReport, name: str) -> str:
        """Return a key in a section of its own."""
        section, slash, rest = self.key(report, name).partition("/")
        return f"{section}_more{slash}{rest}"

    def _define(self, report: RunReport) -> None:
        """Hide all but the main scores, and make W&B's summary keep the best and the last of each score.

        Each key is defined by itself, before Lightning logs it for the first time: it may match the "*" that
        ``WandbLogger`` has defined.
        """
        shown = main_scores(report.values)
        for name in [*report.values, SELECTION, FAILED]:
            if name in self._defined:
                continue
            options: dict[str, Any] = {} if name in shown else {"hidden": True}
            if best := _best(name):
                options["summary"] = f"{best},last"
            if options:
                self.experiment.define_metric(
                    self.key(report, name), step_metric="trainer/global_step", step_sync=True, **options
                )
            self._defined.add(name)

    def _configure(self, report: RunReport) -> None:
        """Write the callback's settings into the run's configuration, once, beside the user's own keys."""
        if self._is_configured or not report.arguments:
            return
        self._is_configured = True
        config, name = self.experiment.config, report.prefix
        while name in config and not _is_ours(config[name]):
            name += "_callback"
        known = {key: value for key, value in report.settings.items() if key != "seconds"}
        config.update({name: {**report.arguments, **known, **OWNER}}, allow_val_change=True)


def _is_ours(entry: Any) -> bool:
    return isinstance(entry, Mapping) and OWNER.items() <= dict(entry).items()


def _best(name: str) -> str:
    """Return which value of a score W&B's summary keeps as the best, empty if none is."""
    known = split(name)
    if known is None or known.minus or known.end or known.score == SELECTION:
        return ""
    return {"higher": "max", "lower": "min", "": ""}[SCORES[known.score].better]


def _parts(report: RunReport) -> list[dict[str, Any]]:
    """Return what is logged, by name."""
    import wandb

    tables = {"scores": score_rows(report), **report.tables}
    parts: list[dict[str, Any]] = [_table(name, rows) for name, rows in tables.items() if rows]
    if report.panels:
        parts.append({"panel": [_strip(panel) for panel in report.panels]})
    if report.curves:
        # The chart shows the newest run; the image's step slider goes back to any run.
        picture = wandb.Image(report.drawings["curves"].picture, file_type="jpg")
        parts.append({"curves": _curves(report), "curves_by_epoch": [picture]})
    if report.differences and difference(report.values, report.epoch, report.step) is not None:
        parts.append({"difference": _differences(report)})
    return parts


def _strip(panel: Panel) -> Any:
    """Return image | base | SESS with caption and boxes."""
    import wandb

    return wandb.Image(
        panel.strip, caption=f"{panel.title}\n{panel.caption}", boxes=_boxes(panel), file_type="jpg"
    )


def _curves(report: RunReport) -> Any:
    """Return a line chart of all methods' curves."""
    lines = {
        f"{kind}, {name}": curve[row].tolist()
        for name, curve in report.labelled_curves().items()
        for row, kind in enumerate(CURVES)
    }
    share = np.linspace(0, 1, len(next(iter(lines.values())))).tolist()
    title = f"Mean curves, epoch {report.epoch}"
    return _chart(dict.fromkeys(lines, share), lines, title, "share of pixels changed, most salient first")


def _differences(report: RunReport) -> Any:
    """Return a line chart of the paired difference over the training, with its 95 % interval."""
    runs = thinned(report.differences)
    less = f"{report.method} − {report.label(runs[-1].method)}"
    x_name = "epoch" if len({run.epoch for run in runs}) == len(runs) else "step"
    lines = {less: "value", "95 % interval, upper end": "high", "95 % interval, lower end": "low"}
    points = {
        name: [(getattr(run, x_name), y) for run in runs if (y := getattr(run, end)) is not None]
        for name, end in lines.items()
    }
    xs, ys = ({name: [p[i] for p in line] for name, line in points.items() if line} for i in (0, 1))
    return _chart(xs, ys, f"{SCORES[OVERALL].label}: {less} on the same images, above 0 is better", x_name)


def _chart(
    xs: Mapping[str, Sequence[int | float]], ys: Mapping[str, Sequence[float]], title: str, x_name: str
) -> Any:
    """Return a line chart; the table behind it goes to W&B's section for such tables."""
    import wandb

    return wandb.plot.line_series(
        xs=list(xs.values()), ys=list(ys.values()), keys=list(ys), title=title, xname=x_name, split_table=True
    )


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a table, and the images of its rows under ``<name>_pictures``."""
    import wandb

    # In a table, images would become an artifact without a step slider.
    plain = [plain_row(row) for row in rows]
    table = wandb.Table(columns=list(plain[0]), data=[list(row.values()) for row in plain])
    pictures = [
        wandb.Image(
            value.picture,
            caption="\n".join(f"{column_label(k)}: {cell(v)}" for k, v in row.items()),
            file_type="jpg",
        )
        for row, whole in zip(plain, rows, strict=True)
        for value in whole.values()
        if isinstance(value, Drawing)
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
