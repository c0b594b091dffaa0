"""What sinks ask a Lightning logger, without importing its package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sess_lightning.reporting.paths import safe_name


def kinds(logger: Any) -> set[str]:
    """Return the names of a logger's class and of all it derives from."""
    return {cls.__name__ for cls in type(logger).__mro__}


def is_dummy(logger: Any) -> bool:
    """Tell whether this is the stand-in of ``fast_dev_run``, which keeps nothing."""
    return "DummyLogger" in kinds(logger)


def run_folder(logger: Any, default: str | Path) -> str:
    """Return where a logger keeps the files of its run; for one that tells of none, below ``default``."""
    if folder := getattr(logger, "log_dir", None):
        return str(folder)
    name, version = getattr(logger, "name", None), getattr(logger, "version", None)
    folder = str(getattr(logger, "save_dir", None) or default)
    return folder if name is None or version is None else f"{folder}/{safe_name(f'{name}/{version}')}"


def report_folder(loggers: Sequence[Any], default: str | Path) -> str:
    """Return where the first logger that keeps anything keeps the files of its run."""
    return run_folder(next((logger for logger in loggers if not is_dummy(logger)), None), default)
