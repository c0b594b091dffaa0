"""File names that are safe, and files that are whole or absent."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from pathlib import Path


def safe_name(name: str) -> str:
    """Return a name, or several joined by "/", without characters that some file system refuses."""
    return re.sub(r'[<>:"\\|?*\x00-\x1f]', "_", name)


def inside(folder: Path, name: str) -> Path:
    """Return the path of ``name``, made safe, below ``folder``.

    Raises:
        ValueError: If it leads out of the folder.
    """
    path = folder / safe_name(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f'"{name}" leads out of {folder}; use a prefix without ".." or leading "/".')
    return path


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file atomically: readers see the old one or the new one, never a part.

    Args:
        path: The file; its folder is created if it does not exist.
        parts: Its content. If producing them fails, nothing is changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        with draft.open("wb") as file:
            file.writelines(parts)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
