"""Where pictures and curves go: one sink per logger."""

from __future__ import annotations

import csv
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sess_lightning.reporting.html import write_report
from sess_lightning.reporting.panels import Panel, Picture, curve_figure, sheet
from sess_lightning.reporting.records import RunRecord, append, carry, keep_sample

BEST = {
    "insertion": "max", "overall": "max", "pointing_game": "max", "relevance_mass": "max", "deletion": "min",
}  # fmt: skip
"""Which end of a figure is the good one, by the last part of its name."""


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


class FileSink(Sink):
    """PNG and CSV files, one picture per validation run, one row per figure set."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Where the files are."""
        return f"files in {self._folder}"

    def panels(self, key: str, panels: Sequence[Panel], when: Mapping[str, int]) -> None:
        """Write the sheet."""
        self._write(key, sheet(panels), when)

    def curves(self, key: str, curves: Mapping[str, Float[Tensor, "2 T"]], when: Mapping[str, int]) -> None:
        """Write the figure, and append every point to ``curves.csv``."""
        self._write(key, curve_figure(curves, _title(when)), when)
        self._append(f"{key}.csv", (
            {**when, "method": name, "step_of_curve": i, "insertion": pair[0], "deletion": pair[1]}
            for name, curve in curves.items()
            for i, pair in enumerate(curve.T.tolist())
        ))  # fmt: skip

    def scalars(self, key: str, values: Mapping[str, float], when: Mapping[str, int]) -> None:
        """Append every figure to a CSV of (epoch, step, name, value)."""
        self._append(f"{key}.csv", ({**when, "name": name, "value": value} for name, value in values.items()))

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], when: Mapping[str, int]) -> None:
        """Append the rows to a CSV, without pictures."""
        self._append(f"{key}.csv", ({**when, **_without_pictures(row)} for row in rows))

    def _write(self, key: str, picture: Picture, when: Mapping[str, int]) -> None:
        folder = self._inside(key)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"epoch={when['epoch']:03d}-step={when['step']:06d}.png")

    def _inside(self, name: str) -> Path:
        path = self._folder / name
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise ValueError(
                f'"{name}" leads out of {self._folder}; use a prefix without ".." or leading "/".'
            )
        return path

    def _append(self, name: str, rows: Any) -> None:
        rows = list(rows)
        path = self._inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)


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


def _without_pictures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not isinstance(value, np.ndarray)}


def _cell(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _title(when: Mapping[str, int]) -> str:
    return f"Mean curves after epoch {when['epoch']}, step {when['step']}"


def report_folder(loggers: Sequence[Any], default: str | Path) -> Path:
    """Return where the first logger keeps this run's files; for those that tell of none, its checkpoints."""
    logger = next((each for each in loggers if not _pretends(each)), None)
    if own := getattr(logger, "log_dir", None):
        return Path(own)
    name, version = getattr(logger, "name", None), getattr(logger, "version", None)
    folder = Path(getattr(logger, "save_dir", None) or default)
    return folder / str(name) / str(version) if name and version is not None else folder


def sink_for(logger: Any, folder: str | Path) -> Sink | None:
    """Return the sink for a Lightning logger: files below ``folder`` for None or one without pictures.

    Loggers are told apart by their classes' names, so that none of their packages is imported; the stand-in
    logger of ``fast_dev_run`` gets nothing.
    """
    names = _names(logger)
    if _pretends(logger):
        return None
    if "WandbLogger" in names:
        return WandbSink(logger)
    if "TensorBoardLogger" in names:
        return TensorBoardSink(logger)
    return FileSink(folder)


def _names(logger: Any) -> set[str]:
    return {cls.__name__ for cls in type(logger).__mro__}


def _pretends(logger: Any) -> bool:
    return "DummyLogger" in _names(logger)
