"""What sinks need to know of a Lightning logger, without importing its package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sess_lightning.reporting.paths import safe_name


def kinds(thing: object) -> set[str]:
    """Return the names of an object's class and its base classes, the same in ``pytorch_lightning``."""
    return {cls.__name__ for cls in type(thing).__mro__}


def is_dummy(logger: Any) -> bool:
    """Return whether this is the dummy logger of ``fast_dev_run``."""
    return "DummyLogger" in kinds(logger)


def run_folder(logger: Any, default: str | Path) -> str:
    """Return the folder of a logger's run; for a logger without one, a folder below ``default``."""
    if folder := getattr(logger, "log_dir", None):
        return str(folder)
    name, version = getattr(logger, "name", None), getattr(logger, "version", None)
    folder = str(getattr(logger, "save_dir", None) or default)
    return folder if name is None or version is None else f"{folder}/{safe_name(f'{name}/{version}')}"


def report_folder(loggers: Sequence[Any], default: str | Path) -> str:
    """Return the folder of the first logger that keeps anything."""
    return run_folder(next((logger for logger in loggers if not is_dummy(logger)), None), default)
