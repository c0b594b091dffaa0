"""The records of validation runs, in append-only files: the report is drawn from them."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from sess_lightning import jsonl
from sess_lightning.reporting.panels import Panel, Picture
from sess_lightning.reporting.paths import write_whole
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import plain_tables

RUNS = "runs.jsonl"
PICTURE = re.compile(r"[0-9a-f]{16}\.jpg")
SIDE = 256
"""Longest side of a stored image, px."""
PICTURE_BYTES = 16_000
"""Largest size of a stored image, bytes: 8 samples with two maps over 20 epochs stay below 10 MB as text."""
DIGITS = 6
"""Significant digits of stored numbers."""


@dataclass(frozen=True)
class Sample:
    """A panel's sample.

    Attributes:
        title: Short name.
        caption: Caption, a line per item.
        label: The label's name.
        boxes: (x0, y0, x1, y1) as fractions of width and height.
        size: (height, width) of the image, px.
        images: Column (``image``, then methods) -> name of the JPEG file beside the records.
    """

    title: str
    caption: str
    label: str
    boxes: Sequence[Sequence[float]]
    size: Sequence[int]
    pictures: Mapping[str, str]


@dataclass(frozen=True)
class RunRecord:
    """One validation run.

    Attributes:
        run: Name of the training; a resumed one keeps its name.
        epoch: Epochs finished before it.
        step: Optimiser steps so far.
        scalars: The callback's figures, without its prefix.
        metrics: The user's own figures.
        curves: Key of a method -> mean insertion curve, mean deletion curve.
        panel: The samples that are shown.
        tables: Name -> rows.
        settings: How the scores were measured, as text.
        alerts: Texts of the alarms that were raised.
        method: Display name of the explained method.
        names: Key of a compared method -> display name.
        accuracy: Key of the accuracy among ``metrics``, empty if there is none; None in older records.
    """

    run: str
    epoch: int
    step: int
    scalars: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Sequence[float | None]]] = field(default_factory=dict)
    panel: Sequence[Sample] = field(default=())
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    alerts: Sequence[str] = field(default_factory=list)
    method: str = "method"
    names: Mapping[str, str] = field(default_factory=dict)
    accuracy: str | None = None


def record_of(folder: str | Path, report: RunReport) -> RunRecord:
    """Write a run's images into ``folder``, and return its record."""
    return RunRecord(
        run=report.run, epoch=report.epoch, step=report.step, scalars=report.values, metrics=report.metrics,
        curves={method: curves.tolist() for method, curves in report.curves.items()},
        panel=[keep_sample(folder, panel) for panel in report.panels], tables=plain_tables(report),
        settings=report.settings, alerts=list(report.alerts), method=report.method, names=report.names,
        accuracy=report.accuracy,
    )  # fmt: skip


def append(folder: str | Path, record: RunRecord) -> None:
    """Add a run to the records in ``folder``."""
    jsonl.append(Path(folder) / RUNS, asdict(record), DIGITS)


def read(folder: str | Path, run: str | None = None) -> list[RunRecord]:
    """Return the runs of a training, in order.

    A run replaces all earlier ones from its own epoch and step on: they are left over from before the
    training was resumed from an earlier checkpoint. Lines that are not runs are skipped.

    Args:
        folder: Where the records are.
        run: Name of the training; None is the one that wrote last.
    """
    return [whole(folder, place) for _, place in outlines(folder, run)]


def outlines(folder: str | Path, run: str | None = None) -> list[tuple[RunRecord, int]]:
    """Return the runs of ``read`` without curves, panel and tables, and where in the file each begins."""
    trainings: dict[str, list[tuple[RunRecord, int]]] = {}
    names: dict[str, str] = {}  # All runs share the names of their figures.
    for place, values in jsonl.read(Path(folder) / RUNS):
        record = _parsed(values, names, outline=True)
        if record is None or record.run != (run or record.run):
            continue
        newest, runs = record.run, trainings.setdefault(record.run, [])
        while runs and (runs[-1][0].epoch, runs[-1][0].step) >= (record.epoch, record.step):
            runs.pop()
        runs.append((record, place))
    return trainings[run or newest] if trainings else []


def whole(folder: str | Path, place: int) -> RunRecord:
    """Return the run that begins at byte ``place`` of the records."""
    record = _parsed(jsonl.read_at(Path(folder) / RUNS, place), {})
    if record is None:
        raise ValueError(f"whole: no run begins at byte {place} of {folder}.")
    return record


def carry(source: str | Path, folder: str | Path, run: str) -> None:
    """Copy the records of a resumed training, with their images, to its new folder."""
    for record in read(source, run):
        for name in {name for sample in record.panel for name in sample.pictures.values()}:
            if data := picture(source, name):
                write_whole(Path(folder) / name, [data])
        append(folder, record)


def picture(folder: str | Path, name: str) -> bytes:
    """Return a stored JPEG; empty if it is missing."""
    if not PICTURE.fullmatch(name):
        return b""  # Nothing outside the folder is read, whatever a record says.
    try:
        with open(f"{folder}/{name}", "rb") as file:  # noqa: PTH123  # A Path would intern every name.
            return file.read()
    except FileNotFoundError:
        return b""


def keep_sample(folder: str | Path, panel: Panel) -> Sample:
    """Write a panel's images into ``folder``, and return its record."""
    height, width = panel.image.shape[:2]
    return Sample(
        panel.title,
        panel.caption,
        panel.label,
        [[x0 / width, y0 / height, x1 / width, y1 / height] for x0, y0, x1, y1 in panel.boxes],
        [height, width],
        {name: keep_picture(folder, part) for name, part in {"image": panel.image, **panel.overlays}.items()},
    )


def keep_picture(folder: str | Path, picture: Picture) -> str:
    """Write an image once, under a name made from its content."""
    data = jpeg(picture)
    path = Path(folder) / f"{hashlib.sha256(data).hexdigest()[:16]}.jpg"
    if not path.exists() or path.stat().st_size != len(data):  # A full disk leaves empty files behind.
        write_whole(path, [data])
    return path.name


def jpeg(picture: Picture, side: int = SIDE, limit: int = PICTURE_BYTES) -> bytes:
    """Return an image as JPEG of at most ``side`` px and ``limit`` bytes, in the best quality that allows."""
    image = Image.fromarray(picture)
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (85, 75, 60, 45):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
            if file.tell() <= limit or side <= 32:
                return file.getvalue()
        side = side * 3 // 4


def _parsed(values: Any, names: dict[str, str], *, outline: bool = False) -> RunRecord | None:
    """Return the run in a line, with the fields that this version knows; None if it is not a run."""
    try:
        known = {
            part.name: READERS[part.name](values[part.name])
            for part in fields(RunRecord)
            if part.name in values
        }
        for name in ("scalars", "metrics"):
            known[name] = {names.setdefault(key, key): value for key, value in known.get(name, {}).items()}
        return RunRecord(**known | ({"curves": {}, "panel": (), "tables": {}} if outline else {}))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers; values that were not finite are None in the file."""
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _curves(values: Mapping[str, Any]) -> dict[str, list[list[float | None]]]:
    curves: dict[str, list[list[float | None]]] = {}
    for method, lines in values.items():
        insertion, deletion = ([None if y is None else float(y) for y in line] for line in lines)
        if len(insertion) != len(deletion) or len(insertion) < 2:
            raise ValueError(f"{method}: curves of {len(insertion)} and {len(deletion)} points")
        curves[method] = [insertion, deletion]
    return curves


def _sample(values: Mapping[str, Any]) -> Sample:
    height, width = (int(side) for side in values["size"])
    return Sample(
        title=str(values["title"]),
        caption=str(values["caption"]),
        label=str(values["label"]),
        boxes=[[float(x) for x in box] for box in values["boxes"] if len(box) == 4],
        size=[height, width],
        pictures={str(column): str(name) for column, name in values["pictures"].items()},
    )


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a name")
    return value


READERS: dict[str, Callable[[Any], Any]] = {
    "run": _text, "epoch": int, "step": int, "scalars": _finite, "metrics": _finite, "curves": _curves,
    "panel": lambda samples: [_sample(sample) for sample in samples],
    "tables": lambda tables: {name: [dict(row) for row in rows] for name, rows in tables.items()},
    "settings": dict, "alerts": lambda texts: [str(text) for text in texts], "method": str, "names": _texts,
    "accuracy": lambda key: None if key is None else str(key),
}  # fmt: skip
"""Field of a run -> how it is read from an untrusted line."""
