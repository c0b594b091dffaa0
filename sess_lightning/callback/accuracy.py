"""The validation accuracy that a training logs: under which key, and in which unit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from sess_lightning.scores import split

RIGHT = re.compile(r"accuracy|(^|[^a-z])(acc|top_?1)([^a-z]|$)")
WRONG = re.compile(
    r"inaccura|misclass|error_?rate|(^|[^a-z])(err|errors?|loss|losses|wrong|mistakes?)([^a-z]|$)"
)
LOADER = re.compile(r"/dataloader_idx_(\d+)$")
"""What Lightning adds to keys where there are several loaders."""
PERCENT = 100.0
ROUNDING = 1e-4


def find_accuracy(metrics: Mapping[str, object], prefix: str, loader: int = 0, named: str = "") -> str | None:
    """Return the key of a validation accuracy among what a training logs, None if there is none.

    Args:
        metrics: All that is logged, by key.
        prefix: First part of the callback's own keys.
        loader: The loader that is watched; what is logged of another one is left alone.
        named: The key that the user has named; else the shortest one is taken that names an accuracy
            (``acc``, ``accuracy``, ``top1``), and neither training nor errors.
    """
    keys = [key for key in metrics if of_loader(key, loader) and not key.startswith(f"{prefix}/")]
    if named:
        given = [key for key in keys if LOADER.sub("", key) == named]
        return max(given, key=len, default=named if named in metrics else None)
    spoken = [key for key in keys if is_accuracy(key) and "train" not in key.lower()]
    return min(
        spoken, key=lambda key: (LOADER.search(key) is None, "val" not in key.lower(), len(key), key),
        default=None,
    )  # fmt: skip


def is_accuracy(key: str) -> bool:
    """Return whether a key names an accuracy: the higher, the better."""
    return bool(RIGHT.search(key.lower())) and not WRONG.search(key.lower())


def is_error(key: str) -> bool:
    """Return whether a key names errors, and no accuracy as well."""
    spoken = WRONG.sub(" ", key.lower())
    return spoken != key.lower() and not re.search(r"accuracy|(^|[^a-z])acc([^a-z]|$)", spoken)


def of_loader(key: str, loader: int) -> bool:
    """Return whether a key may be of a loader: it says so, or names none."""
    suffix = LOADER.search(key)
    return suffix is None or int(suffix[1]) == loader


def is_percent(value: float) -> bool:
    """Return whether an accuracy, if it is one, can only be in percent."""
    return 1 + ROUNDING < value <= PERCENT * (1 + ROUNDING)


def doubt(key: str, named: str, metrics: Mapping[str, Tensor], prefix: str) -> str:
    """Return what is wrong with the accuracy that the user has named; empty if nothing is.

    Args:
        key: Under which the accuracy is; empty if under none.
        named: The key that the user has named; empty if none.
        metrics: All that is logged, by key.
        prefix: First part of the callback's own keys.
    """
    if named and is_error(named):
        return f"accuracy={named!r} names an error rate; the alarm and {prefix}/selection are off."
    if named and not key:
        logged = ", ".join(sorted(name for name in metrics if not _is_ours(name, prefix))) or "none"
        return f"accuracy={named!r} is not among the logged keys ({logged}); the alarm is off."
    value = float(metrics[key]) if key else 0.0
    if math.isfinite(value) and not -ROUNDING <= value <= PERCENT * (1 + ROUNDING):
        return f"{key} is {value:.4g}, which is neither a share nor a percentage; the alarm is off."
    return ""


def _is_ours(key: str, prefix: str) -> bool:
    """Return whether a key is this callback's, or that of another one with a prefix of its own."""
    parts = key.split("/")
    rests = ["/".join(parts[i:]) for i in range(1, len(parts))]
    return key.startswith(f"{prefix}/") or any(split(rest) is not None for rest in rests)
