"""What each validation run left, in append-only files: the report is drawn from them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sess_lightning.reporting.panels import Panel, Picture
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import plain_tables

RUNS = "runs.jsonl"
PICTURE = re.compile(r"[0-9a-f]{16}\.jpg")
SIDE = 256
"""Longest side of a kept picture, px."""
PICTURE_BYTES = 16_000
"""Most that a kept picture weighs: 8 samples with two maps each over 20 epochs stay below 10 MB as text."""


@dataclass(frozen=True)
class Sample:
    """A panel's sample.

    Attributes:
        title: A short name.
        caption: What is said of it, a line per item.
        label: The label's name.
        boxes: (x0, y0, x1, y1) as shares of width and height.
        size: (height, width) of the picture, px.
        pictures: Column (``image``, ``base``, ``SESS``) -> name of the JPEG file beside the records.
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
        run: Which training this belongs to; a resumed one keeps its name.
        epoch: Epochs finished before it.
        step: Optimiser steps so far.
        scalars: The callback's figures, without its prefix.
        metrics: The user's own figures.
        curves: Key of a method -> mean insertion curve, mean deletion curve.
        panel: The samples that are shown.
        tables: Name -> rows.
        settings: How all this was made, in words.
        alerts: What the user was warned of.
        method: Display name of the explained method.
        names: Key of a compared method -> display name.
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


def record_of(folder: str | Path, report: RunReport) -> RunRecord:
    """Return what is kept of a run, once its pictures have been written into ``folder``."""
    return RunRecord(
        run=report.run, epoch=report.epoch, step=report.step, scalars=report.values, metrics=report.metrics,
        curves={method: curves.tolist() for method, curves in report.curves.items()},
        panel=[keep_sample(folder, panel) for panel in report.panels],
        tables=plain_tables(report),
        settings=report.settings, alerts=list(report.alerts), method=report.method, names=report.names,
    )  # fmt: skip


def append(folder: str | Path, record: RunRecord) -> None:
    """Add a run to the records in ``folder``."""
    path = Path(folder) / RUNS
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_plain(asdict(record)), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, io.SEEK_END)
            if file.read() != b"\n":  # The last writer was killed half-way.
                line = "\n" + line
        file.write(line.encode())


def read(folder: str | Path) -> list[RunRecord]:
    """Return the runs of the training that wrote last, in order.

    A run supersedes those of its own epoch and step, and after: they come from a branch that was left when
    the training was resumed from an earlier checkpoint. What a killed process wrote half is skipped.
    """
    return [whole(folder, place) for _, place in outlines(folder)]


def outlines(folder: str | Path) -> list[tuple[RunRecord, int]]:
    """Return the runs of ``read`` without curves, panel and tables, and where in the file each begins."""
    path, found, place = Path(folder) / RUNS, list[tuple[RunRecord, int]](), 0
    names: dict[str, str] = {}  # All runs share the names of their figures.
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if record := _parsed(line, names):
                    run, when = record.run, (record.epoch, record.step)
                    found = [(r, at) for r, at in found if r.run == run and (r.epoch, r.step) < when]
                    found.append((replace(record, curves={}, panel=(), tables={}), place))
                place += len(line)
    return found


def whole(folder: str | Path, place: int) -> RunRecord:
    """Return the run that begins at byte ``place`` of the records."""
    with (Path(folder) / RUNS).open("rb") as file:
        file.seek(place)
        record = _parsed(file.readline(), {})
    if record is None:
        raise ValueError(f"whole: no run begins at byte {place} of {folder}.")
    return record


def carry(source: str | Path, folder: str | Path, run: str) -> None:
    """Copy the records of a resumed training, and the pictures they name, to where it goes on."""
    for record in read(source):
        if record.run == run:
            for name in {name for sample in record.panel for name in sample.pictures.values()}:
                if data := picture(source, name):
                    Path(folder).mkdir(parents=True, exist_ok=True)
                    (Path(folder) / name).write_bytes(data)
            append(folder, record)


def picture(folder: str | Path, name: str) -> bytes:
    """Return a kept JPEG; empty where it is gone."""
    if not PICTURE.fullmatch(name):
        return b""  # Whatever a record says, nothing outside the folder is read.
    try:
        with open(f"{folder}/{name}", "rb") as file:  # noqa: PTH123  # A Path would intern every name.
            return file.read()
    except FileNotFoundError:
        return b""


def keep_sample(folder: str | Path, panel: Panel) -> Sample:
    """Write a panel's pictures into ``folder`` and return what the record says of it."""
    height, width = panel.image.shape[:2]
    return Sample(
        panel.title,
        panel.caption,
        panel.label,
        [[x0 / width, y0 / height, x1 / width, y1 / height] for x0, y0, x1, y1 in panel.boxes],
        [height, width],
        {name: keep_picture(folder, each) for name, each in {"image": panel.image, **panel.overlays}.items()},
    )


def keep_picture(folder: str | Path, picture: Picture) -> str:
    """Write a picture, once, under a name made of what it holds."""
    data = jpeg(picture)
    path = Path(folder) / f"{hashlib.sha256(data).hexdigest()[:16]}.jpg"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return path.name


def jpeg(picture: Picture, side: int = SIDE, limit: int = PICTURE_BYTES) -> bytes:
    """Return a picture as JPEG of at most ``side`` px and ``limit`` bytes, as good as that allows."""
    image = Image.fromarray(picture)
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (85, 75, 60, 45):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
            if file.tell() <= limit or side <= 32:
                return file.getvalue()
        side = side * 3 // 4


def _parsed(line: bytes, names: dict[str, str]) -> RunRecord | None:
    try:
        values = json.loads(line)
        for name in ("scalars", "metrics"):  # What was not finite is None there.
            values[name] = {
                names.setdefault(key, key): value for key, value in values[name].items() if value is not None
            }
        values |= {"epoch": int(values["epoch"]), "step": int(values["step"])}
        return RunRecord(**{**values, "panel": [Sample(**each) for each in values["panel"]]})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _plain(value: Any) -> Any:
    """Return what JSON can say: floats of 6 digits, None for those that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return str(value)
