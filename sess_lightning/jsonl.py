"""Append-only files of JSON lines: a killed process loses at most the line it was writing."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sess_lightning.locks import held


def append(path: str | Path, value: Any, digits: int | None = None) -> None:
    """Add a line that holds ``value``, and drop a last line that was cut short.

    Args:
        path: The file; it and its folder are made if they are not there.
        value: As for ``plain``.
        digits: As for ``plain``.
    """
    path = Path(path)
    line = json.dumps(plain(value, digits), allow_nan=False) + "\n"
    with held(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, io.SEEK_END)
            if file.read() != b"\n":  # The last writer was killed half-way.
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())


def read(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield where each whole line begins, in bytes, and its value; None for a line that is no JSON.

    A last line that was cut short is left out, and a file that is not there has no lines.
    """
    path, place = Path(path), 0
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield place, _parsed(line)
            place += len(line)


def read_at(path: str | Path, place: int) -> Any:
    """Return the value of the line that begins at byte ``place``; None if none does."""
    with Path(path).open("rb") as file:
        file.seek(place)
        return _parsed(file.readline())


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # Recursion: a line of brackets only.
        return None


def plain(value: Any, digits: int | None = None) -> Any:
    """Return what JSON can say of a value: tensors and arrays as lists, None for what is not finite.

    Args:
        value: Mappings, sequences, arrays, tensors, numbers and text; of anything else its text.
        digits: Significant digits of floats; None keeps all.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(part, digits) for key, part in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(part, digits) for part in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist(), digits)
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return None
    return value if digits is None else float(f"{value:.{digits}g}")
