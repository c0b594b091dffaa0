"""Where pictures and curves go: one sink per logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sess_lightning.reporting.files import FileSink
from sess_lightning.reporting.sink import Sink, _names, _pretends
from sess_lightning.reporting.tensorboard import TensorBoardSink
from sess_lightning.reporting.wandb import WandbSink


def sink_for(logger: Any, folder: str | Path) -> Sink | None:
    """Return the sink for a Lightning logger: files below ``folder`` for None or one without pictures.

    Loggers are told apart by their classes' names, so that none of their packages is imported; the stand-in
    logger of ``fast_dev_run`` gets nothing.
    """
    names = _names(logger)
    if _pretends(logger):
        return None
    if "WandbLogger" in names:
        return WandbSink(logger)
    if "TensorBoardLogger" in names:
        return TensorBoardSink(logger)
    return FileSink(folder)
