"""Logging a run's figures through the module."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule
from torch import Tensor

from sess_lightning.scores import split


def log_scores(pl_module: LightningModule, prefix: str, values: Mapping[str, float]) -> None:
    """Log scores below ``prefix``; intervals of the method and its base only, to keep dashboards readable."""
    for name, value in values.items():
        key = split(name)
        if key is None or not key.end or key.method in ("", "base"):
            log(pl_module, f"{prefix}/{name}", value)


def log(pl_module: LightningModule, key: str, value: float) -> None:
    """Log a value that is the same on every rank."""
    # Lightning synchronises nothing here (rank_zero_only); sync_dist keeps it from advising to, for every
    # key.
    pl_module.log(key, value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True, rank_zero_only=True)


def of_others(metrics: Mapping[str, Tensor], prefix: str) -> dict[str, float]:
    """Return what others have logged: all keys that do not begin with ``prefix``."""
    return {name: float(value) for name, value in metrics.items() if not name.startswith(prefix)}
