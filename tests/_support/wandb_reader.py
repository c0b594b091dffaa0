"""Reads what W&B really wrote offline: ``.wandb`` is a LevelDB log of protobuf records."""

import json
import os
import time
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def offline(monkeypatch, tmp_path):
    """Keep W&B off the network and out of the home folder for one test: the body of a fixture."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")  # WandbLogger(offline=True) sets it for the whole process.
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")  # Reads what is installed, anew for every run.
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    yield
    wandb.finish()


def records(path):
    """Yield the records of a ``.wandb`` file; those that are half written are left out."""
    data, place, held = Path(path).read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # Too short for a header: filled up.
            place += left
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind, chunk = data[place + 6], data[place + HEADER : place + HEADER + length]
        if len(chunk) < length or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        place += HEADER + length
        held = chunk if kind in (FULL, FIRST) else held + chunk
        if kind in (FULL, LAST):
            yield Record.FromString(held)


def run_folder(folder, seconds=30.0):
    """Return the folder of the only run below ``folder``, once its file is complete."""
    end = time.monotonic() + seconds
    while True:
        (path,) = Path(folder).glob("**/run-*.wandb")
        if any(record.WhichOneof("record_type") == "exit" for record in records(path)):
            return path.parent
        if time.monotonic() > end:
            raise TimeoutError(f"{path} never came to an end.")
        time.sleep(0.05)


def history(folder):
    """Return every row that was logged, media as nested dicts."""
    (path,) = Path(folder).glob("run-*.wandb")
    return [_row(record.history) for record in records(path) if record.WhichOneof("record_type") == "history"]


def _row(logged):
    row = {}
    for item in logged.item:
        *path, last = item.nested_key or [item.key]
        place = row
        for name in path:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return row


def sections(folder):
    """Return the charts of W&B's automatic workspace, by section: the part of a key before its first "/".

    Every logged key has one unless its definition hides it, and so has every custom chart.
    """
    (path,) = Path(folder).glob("run-*.wandb")
    keys, hidden = {}, {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            keys |= dict.fromkeys((item.nested_key or [item.key])[0] for item in record.history.item)
        elif kind == "metric" and record.metric.name:
            hidden[record.metric.name] = record.metric.options.hidden
        elif kind == "config":
            paths = [list(item.nested_key) for item in record.config.update]
            keys |= dict.fromkeys(place[2] for place in paths if place[:2] == ["_wandb", "visualize"])
    charts = {}
    for key in keys:
        if not key.startswith("_") and not hidden.get(key):
            charts.setdefault(key.partition("/")[0] if "/" in key else "Charts", set()).add(key)
    return charts


def config(folder):
    """Return the run's configuration, without W&B's own part."""
    (path,) = Path(folder).glob("run-*.wandb")
    found = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        updates = {"config": record.config.update, "run": record.run.config.update}.get(kind, ())
        found |= {item.key: json.loads(item.value_json) for item in updates if item.key}
    return {key: value for key, value in found.items() if key != "_wandb"}
