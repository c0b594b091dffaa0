"""Names of files, and files that are whole or not there."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from pathlib import Path


def safe_name(name: str) -> str:
    """Return a name, or several with "/" between them, without what some file system refuses."""
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
    """Write a file in one stroke: whoever reads it finds the old one or the new one, never a part.

    Args:
        path: The file; its folder is made if it is not there.
        parts: What it holds. Nothing is changed if making them fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        with draft.open("wb") as file:
            file.writelines(parts)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
