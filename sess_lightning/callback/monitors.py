"""Whatever monitors scores, and what it finds before a run has measured any.

EarlyStopping, ModelCheckpoint and ReduceLROnPlateau end a training when the key they monitor is missing. The
value that stands in for it ranks below every measured score, and costs EarlyStopping no patience.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from lightning.pytorch import Trainer

from sess_lightning.reporting.loggers import kinds
from sess_lightning.scores import DRIFTS, OF_REGIONS, SCORES, SELECTION, Key, split

NEEDS = {SELECTION: "a validation accuracy: log one, or name its key in accuracy="} | dict.fromkeys(
    OF_REGIONS, "boxes or masks in the batches"
)
"""Score -> what it needs to be measured."""
UNBOUNDED = 1e6
"""Magnitude of the value that stands in for a score without bounds."""


def monitors(trainer: Trainer, prefix: str) -> dict[str, list[Any]]:
    """Return what stops, saves or plans by a key below ``prefix``: rest of the key -> these."""
    by_key: dict[str, list[Any]] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        key = getattr(callback, "monitor", None)
        if isinstance(key, str) and key.startswith(f"{prefix}/") and (_stops(callback) or _saves(callback)):
            by_key.setdefault(key.removeprefix(f"{prefix}/"), []).append(callback)
    for plan in _plans(trainer, prefix):
        if plan.strict:  # Otherwise it does nothing where the key is missing.
            by_key.setdefault(str(plan.monitor).removeprefix(f"{prefix}/"), []).append(plan.scheduler)
    return by_key


def stand_in(trainer: Trainer, prefix: str, known: Mapping[str, float]) -> None:
    """Put a value under each monitored key until a run has measured one.

    It is the last measured value, or one worse than any. A ModelCheckpoint that keeps several epochs would
    take the last value for another epoch's, so it always gets the worse one.

    Args:
        trainer: The Trainer with the callbacks.
        prefix: First part of the keys.
        known: The scores that were measured last.
    """
    for name, callbacks in monitors(trainer, prefix).items():
        ranked = any(_saves(callback) and callback.save_top_k not in (0, 1) for callback in callbacks)
        mode = getattr(callbacks[0], "mode", "min")  # A schedule may be the user's own.
        value = known[name] if name in known and not ranked else _worse_than_any(name, mode)
        for limit in (getattr(callback, "divergence_threshold", None) for callback in callbacks):
            if limit is not None:  # EarlyStopping ends the training beyond it.
                value = max(value, limit) if mode == "max" else min(value, limit)
        trainer.callback_metrics[f"{prefix}/{name}"] = torch.tensor(value)


def unmeasured(trainer: Trainer, prefix: str, known: Mapping[str, float]) -> list[str]:
    """Return a text about each monitored key that a successful run did not measure."""
    texts = []
    for name, callbacks in monitors(trainer, prefix).items():
        if known and name not in known and name not in DRIFTS:  # The first run has no drift.
            kinds = " and ".join(sorted({type(callback).__name__ for callback in callbacks}))
            needs = NEEDS.get(name.rpartition("/")[2], "another monitor")
            texts.append(f"{kinds} waits for {prefix}/{name}, which no run measures; it needs {needs}.")
    return texts


def spare_patience(trainer: Trainer, prefix: str, measured: Iterable[str]) -> None:
    """Keep EarlyStopping from counting a validation in which its key was not measured.

    Call it once in each validation, before EarlyStopping's turn, which adds back the one subtracted here.
    """
    for name, callbacks in monitors(trainer, prefix).items():
        for callback in callbacks if name not in measured else ():
            if _stops(callback) and not _is_spared(callback, trainer):
                callback.wait_count -= 1


_SPARED: WeakKeyDictionary[Any, tuple[ref[Trainer], int]] = WeakKeyDictionary()
"""Trainer and epoch in which an EarlyStopping was spared last that has one turn an epoch."""


def _is_spared(callback: Any, trainer: Trainer) -> bool:
    """Return whether an EarlyStopping was spared in this epoch, and has no turn but at its end."""
    if not getattr(callback, "_check_on_train_epoch_end", False):
        return False
    before, now = _SPARED.get(callback), (ref(trainer), trainer.current_epoch)
    _SPARED[callback] = now
    return before == now


def advice(trainer: Trainer, prefix: str, every_n_epochs: int) -> list[str]:
    """Return, before a training, a text about each monitor that will not work as intended."""
    texts = []
    epochs, between = trainer.max_epochs or -1, trainer.check_val_every_n_epoch or 1
    runs = -(-epochs // max(every_n_epochs, between)) if epochs > 0 else float("inf")
    for name, callbacks in monitors(trainer, prefix).items():
        texts += _against(f"{prefix}/{name}", split(name), callbacks)
        texts += [
            f"ModelCheckpoint(monitor='{prefix}/{name}', save_top_k={callback.save_top_k}) will also keep "
            f"epochs that were never explained: there are to be {runs} runs. Use a smaller every_n_epochs "
            "or save_top_k."
            for callback in callbacks
            if _saves(callback) and callback.save_top_k > runs
        ]
    texts += [
        f"ReduceLROnPlateau counts validations without a run as ones without progress on {plan.monitor!r}: "
        f"multiply its patience by {every_n_epochs}."
        for plan in (_plans(trainer, prefix) if every_n_epochs > 1 else ())
    ]
    if not trainer.enable_validation:
        texts.append(
            "this training has no validation, and models are explained during validation: give the module a "
            "validation_step, and fit() a validation loader with limit_val_batches above 0."
        )
    return texts


def _against(key: str, parts: Key | None, callbacks: Iterable[Any]) -> list[str]:
    """Return a text about each monitor that takes the worst end of a score for the best."""
    better = SCORES[parts.score].better if parts is not None else ""
    mode = {"higher": "max", "lower": "min"}.get(better)
    return [
        f"{type(callback).__name__} follows {key!r} with mode={callback.mode!r}, but {better} is better: "
        f"use mode={mode!r}."
        for callback in callbacks
        if mode is not None and getattr(callback, "mode", mode) != mode
    ]


def _plans(trainer: Trainer, prefix: str) -> list[Any]:
    """Return the schedules of learning rates that follow a key below ``prefix``."""
    plans = trainer.lr_scheduler_configs
    return [plan for plan in plans if plan.reduce_on_plateau and str(plan.monitor).startswith(f"{prefix}/")]


def _stops(callback: Any) -> bool:
    return "EarlyStopping" in kinds(callback)


def _saves(callback: Any) -> bool:
    return "ModelCheckpoint" in kinds(callback)


def _worse_than_any(name: str, mode: str) -> float:
    key = split(name)
    bounds = SCORES[key.score].bounds if key is not None else None
    if key is None or bounds is None:
        return -UNBOUNDED if mode == "max" else UNBOUNDED
    low, high = (bounds[0] - bounds[1], bounds[1] - bounds[0]) if key.minus else bounds
    return low - 1 if mode == "max" else high + 1
