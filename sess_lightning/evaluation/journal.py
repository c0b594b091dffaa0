"""Records of an evaluation, a line per sample, from which a killed run continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sess_lightning import jsonl


def fingerprint(settings: Mapping[str, str]) -> str:
    """Return a short hash of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """An append-only file: a line with the settings, then one per sample.

    Args:
        path: The file; created with the first sample, so that a run that fails before leaves no settings.
        settings: What the figures depend on.

    Raises:
        ValueError: If the file was written under other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self._path, self._settings, self._begun = path, settings, False
        read_journal(path, settings)

    def append(self, sample: int, entry: Mapping[str, Any]) -> None:
        """Append a sample's scores.

        Raises:
            ValueError: If another run has begun the file under other settings meanwhile.
        """
        if not self._begun:
            read_journal(self._path, self._settings)
            if next(jsonl.read(self._path), None) is None:
                head = {"fingerprint": fingerprint(self._settings), "settings": self._settings}
                jsonl.append(self._path, head)
            self._begun = True
        jsonl.append(self._path, {"sample": sample, **entry})


def read_journal(path: Path, settings: Mapping[str, str]) -> dict[int, dict[str, Any]]:
    """Return a file's records by sample, without a last line that was cut short.

    Raises:
        ValueError: If the file was written under other settings, or is damaged.
    """
    values = [value for _, value in jsonl.read(path)]
    if not values:
        return {}
    try:
        written, before = values[0]["fingerprint"], values[0]["settings"]
        entries = {entry["sample"]: entry for entry in values[1:]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: is damaged ({error}); delete it, or use another folder.") from error
    if written != fingerprint(settings):
        differing = [key for key in {*before, *settings} if before.get(key) != settings.get(key)]
        changes = (f"{key} was {before.get(key)}, is {settings.get(key)}" for key in sorted(differing))
        raise ValueError(
            f"{path}: was written with other settings ({'; '.join(changes)}); use another folder."
        )
    return entries


def read_settings(folder: Path) -> dict[str, str]:
    """Return the settings that a folder's records were written under.

    Raises:
        FileNotFoundError: If there are no records.
    """
    for path in sorted(folder.glob("records-*.jsonl")):
        if head := jsonl.read_at(path, 0):
            return dict(head["settings"])
    raise FileNotFoundError(f"{folder}: no records-*.jsonl; give the folder of an evaluation.")


def read_journals(folder: Path, settings: Mapping[str, str]) -> dict[int, dict[str, Any]]:
    """Return all processes' records by sample, in rising order; a readable one replaces a broken one."""
    entries: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("records-*.jsonl")):
        for sample, entry in read_journal(path, settings).items():
            if "broken" in entries.setdefault(sample, entry):
                entries[sample] = entry
    return dict(sorted(entries.items()))
