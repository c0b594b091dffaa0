"""Rows of the tables: classes, and samples that stand out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sess_lightning.metrics.sess_metric import NO_TRIAL, Samples
from sess_lightning.scores import (
    DELETION,
    DRIFT_PREVIOUS,
    DRIFTS,
    ENDS,
    INSERTION,
    OVERALL,
    POINTING_GAME,
    REGION_SHARE,
    RELEVANCE_MASS,
)

MOST_CLASSES = 100


def class_rows(samples: Samples, name: Callable[[float], str]) -> list[dict[str, Any]]:
    """Return a row per class with trials, worst Pointing Game first, at most 100.

    Args:
        samples: A run's samples.
        name: Returns a class's name.
    """
    rows = []
    for target in samples.targets[samples.hits != NO_TRIAL].unique().tolist():
        of_class = (samples.targets == target) & (samples.hits != NO_TRIAL)
        hits, trials = int(samples.hits[of_class].sum()), int(of_class.sum())
        low, high = wilson(hits, trials)
        rows.append({
            "class": name(float(target)), "trials": trials, "hits": hits, POINTING_GAME: hits / trials,
            **dict(zip(ENDS, (low, high), strict=True)), RELEVANCE_MASS: _mean(samples.mass[of_class]),
            REGION_SHARE: _mean(samples.share[of_class]),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row[POINTING_GAME], row[RELEVANCE_MASS]))[:MOST_CLASSES]


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, which is valid even where all or none are hits."""
    z = 1.959964
    middle, spread = hits + z * z / 2, z * (hits * (trials - hits) / trials + z * z / 4) ** 0.5
    return (middle - spread) / (trials + z * z), (middle + spread) / (trials + z * z)


def standing_out(
    samples: Samples, drifts: Mapping[str, Float[Tensor, " N"]], count: int
) -> list[tuple[str, int]]:
    """Return the ``count`` samples with the lowest overall, then the ``count`` that have drifted most.

    Each comes with the reason; samples without the score are left out.
    """
    overall = samples.insertion - samples.deletion
    chosen = [("worst explained", overall), ("most drifted", drifts.get(DRIFT_PREVIOUS, overall[:0]))]
    return [
        (why, i)
        for why, figures in chosen
        for i in figures.nan_to_num(torch.inf).argsort(stable=True)[:count].tolist()
        if figures[i].isfinite()
    ]


def sample_row(
    samples: Samples, drifts: Mapping[str, Float[Tensor, " N"]], i: int, name: Callable[[float], str]
) -> dict[str, Any]:
    """Return one sample's row; None stands for a missing value."""
    hit = int(samples.hits[i])
    return {
        "target": name(float(samples.targets[i])),
        "prediction": name(float(samples.predicted[i])),
        "score": float(samples.scores[i]),
        OVERALL: _finite(samples.insertion[i] - samples.deletion[i]),
        INSERTION: _finite(samples.insertion[i]),
        DELETION: _finite(samples.deletion[i]),
        POINTING_GAME: None if hit == NO_TRIAL else "hit" if hit else "miss",
        RELEVANCE_MASS: _finite(samples.mass[i]),
        **{key: _finite(drifts[key][i]) if key in drifts else None for key in DRIFTS},
    }


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _mean(values: Tensor) -> float:
    return float(values.mean())
