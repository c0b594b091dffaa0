"""Append-only records, one line a sample: a killed run loses nothing that was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


def fingerprint(settings: Mapping[str, str]) -> str:
    """Return a short hash of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """An append-only file: a line with the settings, then one per sample. Use it as a context.

    Lines reach the operating system one by one, so a killed process loses at most the one it was writing,
    which is dropped when the file is opened again.

    Args:
        path: The file; made if it is not there.
        settings: What figures depend on.

    Raises:
        ValueError: If the file was written under other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self._path, self._settings = path, settings

    def __enter__(self) -> Journal:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = _whole_lines(self._path)
        read_journal(self._path, self._settings)
        self._file = self._path.open("ab")
        self._file.truncate(len(whole))
        if not whole:
            self._write({"fingerprint": fingerprint(self._settings), "settings": dict(self._settings)})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, sample: int, entry: Mapping[str, Any]) -> None:
        """Write down what a sample scored."""
        self._write({"sample": sample, **entry})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


def _whole_lines(path: Path) -> bytes:
    written = path.read_bytes() if path.exists() else b""
    return written[: written.rfind(b"\n") + 1]


def read_journal(path: Path, settings: Mapping[str, str]) -> dict[int, dict[str, Any]]:
    """Return what a file holds, by sample; a last line that was cut short is left out.

    Raises:
        ValueError: If the file was written under other settings, or is damaged.
    """
    head, *lines = _whole_lines(path).splitlines() or [b""]
    if not head:
        return {}
    try:
        start, entries = json.loads(head), [json.loads(line) for line in lines]
        found = {entry["sample"]: entry for entry in entries}
        before = start["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is damaged ({error}); delete it, or use another folder.") from error
    if start["fingerprint"] != fingerprint(settings):
        differing = [key for key in {*before, *settings} if before.get(key) != settings.get(key)]
        told = "; ".join(f"{key} was {before.get(key)}, is {settings.get(key)}" for key in sorted(differing))
        raise ValueError(f"{path}: was written under other settings ({told}); use another folder.")
    return found


def read_settings(folder: Path) -> dict[str, str]:
    """Return the settings that a folder's records were written under.

    Raises:
        FileNotFoundError: If there are no records.
    """
    for path in sorted(folder.glob("records-*.jsonl")):
        with path.open() as file:
            settings: dict[str, str] = json.loads(file.readline())["settings"]
        return settings
    raise FileNotFoundError(f"{folder}: no records-*.jsonl; give the folder of an evaluation.")


def read_journals(folder: Path, settings: Mapping[str, str]) -> dict[int, dict[str, Any]]:
    """Return what all processes wrote, by sample, in rising order."""
    entries: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("records-*.jsonl")):
        entries |= read_journal(path, settings)
    return dict(sorted(entries.items()))
