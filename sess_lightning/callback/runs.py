"""What is remembered of a validation run, to compare later runs on the same samples with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import Trainer
from torch import Tensor

from sess_lightning.metrics.functional import rank_correlation
from sess_lightning.metrics.sess_metric import NO_TRIAL, OWN, Samples, Summary
from sess_lightning.reporting.panels import Panel
from sess_lightning.reporting.run import RunReport
from sess_lightning.scores import (
    DRIFT_INITIAL,
    DRIFT_PREVIOUS,
    OVERALL,
    POINTING_GAME,
    REGION_SHARE,
    RELEVANCE_MASS,
)

FIGURES = (RELEVANCE_MASS, POINTING_GAME, OVERALL)


@dataclass(frozen=True)
class Run:
    """One validation run, in tensors and plain values that a checkpoint can hold.

    Attributes:
        epoch: Epoch of the run.
        step: Optimiser steps so far.
        samples: Identifies the images and the classes explained; runs with the same value are compared.
        figures: Per sample, the figures of ``FIGURES`` and ``region_share``, NaN where there is none, and
            whether it is classified ``right`` and its map ``flat``.
        small: Each sample's map on a small grid.
        accuracy: The model's accuracy on the whole validation set; NaN if unknown.
        guess: Accuracy of always naming the most frequent of the classes explained; NaN if unknown.
    """

    epoch: int
    step: int
    samples: tuple[int, ...]
    figures: dict[str, Float[Tensor, " N"]]
    small: Float[Tensor, "N G G"]
    accuracy: float = float("nan")
    guess: float = float("nan")

    @property
    def is_whole(self) -> bool:
        """Whether all fields are what they should be: a checkpoint of another version may hold others."""
        numbers = (self.epoch, self.step, self.accuracy, self.guess)
        if not all(isinstance(number, (int, float)) for number in numbers):
            return False
        if not (isinstance(self.small, Tensor) and self.small.ndim == 3 and isinstance(self.samples, tuple)):
            return False
        columns = self.figures if isinstance(self.figures, dict) else {}
        return {*FIGURES, REGION_SHARE} <= columns.keys() and all(
            isinstance(column, Tensor) and column.shape == self.small.shape[:1] for column in columns.values()
        )

    def mean(self, figure: str) -> float:
        """Return a figure's mean over the samples that have it."""
        return float(self.figures[figure].nanmean())

    @property
    def is_right(self) -> Bool[Tensor, " N"]:
        """Which samples the model classified correctly; none in records of an older version."""
        return self.figures.get("right", torch.zeros(len(self.small))) > 0

    @property
    def is_flat(self) -> Bool[Tensor, " N"]:
        """Which samples' maps are flat."""
        return self.figures.get("flat", torch.zeros(len(self.small))) > 0

    @property
    def quality(self) -> float:
        """How well the model is explained, in [0, 1]: relevance mass, overall where there are no regions."""
        mass = self.mean(RELEVANCE_MASS)
        return mass if mass == mass else (self.mean(OVERALL) + 1) / 2


class Outcome:
    """What a run measured on all ranks, as it is logged and shown.

    Attributes:
        values: The scores that are finite, the mean drifts among them.
        curves: As ``SESSMetric.curves`` gives them.
        samples: As ``SESSMetric.samples`` gives them.
        drifts: How similar each sample's map is to that of earlier runs, by name.
    """

    def __init__(self, summary: Summary, drifts: Mapping[str, Float[Tensor, " N"]]) -> None:
        means = {name: float(drift.nanmean()) for name, drift in drifts.items()}
        every = {**summary.values, **means}
        self.values = {name: value for name, value in every.items() if math.isfinite(value)}
        self.curves, self.samples, self.drifts = summary.curves, summary.samples, drifts

    def report(
        self,
        prefix: str,
        when: Mapping[str, int],
        names: Mapping[str, str],
        panels: Sequence[Panel],
        tables: Mapping[str, Sequence[Mapping[str, Any]]],
        settings: Mapping[str, Any],
    ) -> RunReport:
        """Return what the sinks get; arguments as for ``RunReport``."""
        return RunReport(
            prefix, when["epoch"], when["step"], method=names[OWN], values=self.values, names=names,
            curves=self.curves, panels=panels, tables=tables, settings=settings,
        )  # fmt: skip


def moment(trainer: Trainer, loaded: dict[str, int] | None = None) -> dict[str, int]:
    """Return epoch and step as in Lightning's own validation rows, so that images appear beside them.

    Args:
        trainer: The Trainer.
        loaded: Epoch and step of the checkpoint that ``validate`` or ``test`` was given.
    """
    if loaded is not None and trainer.state.fn != "fit":
        return loaded  # Lightning's would be 0.
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    step = int(getattr(loop, "_batches_that_stepped", trainer.global_step))
    return {"epoch": trainer.current_epoch, "step": step}


def age(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """Return epoch and step of a checkpoint's weights."""
    # One less: Lightning's rows at the end of an epoch have the step of its last batch.
    return {"epoch": int(checkpoint["epoch"]), "step": max(0, int(checkpoint["global_step"]) - 1)}


def record(when: Mapping[str, int], samples: Samples, predicted: bool = False) -> Run:
    """Return what is remembered of a run.

    Args:
        when: Epoch and step.
        samples: The samples that were explained.
        predicted: Whether the classes are the model's predictions, which change while the samples do not.
    """
    figures = {
        RELEVANCE_MASS: samples.mass,
        POINTING_GAME: samples.hits.float().masked_fill(samples.hits == NO_TRIAL, torch.nan),
        OVERALL: samples.insertion - samples.deletion,
        REGION_SHARE: samples.share,
        "right": (samples.predicted == samples.targets).float(),
        "flat": samples.flat.float(),
    }
    targets = [] if predicted else samples.targets.tolist()
    known = (*samples.digests.tolist(), *targets)
    guess = constant_guess(targets) if targets else float("nan")
    return Run(when["epoch"], when["step"], known, figures, samples.small.half(), guess=guess)


def constant_guess(targets: Sequence[int]) -> float:
    """Return the accuracy of always naming the most frequent class."""
    return max(Counter(targets).values()) / len(targets)


def comparable(runs: Sequence[Run], now: Run) -> list[Run]:
    """Return the runs on the same samples as ``now``."""
    return [run for run in runs if run.samples == now.samples and run.small.shape == now.small.shape]


def remembered(runs: Sequence[Run], now: Run) -> list[Run]:
    """Return, in order, the runs to keep: the first, the best in each figure, and this one."""
    every = [*comparable(runs, now), now]
    best = [max(every, key=lambda run: _known(run.mean(figure))) for figure in FIGURES]
    return [run for run in every if any(run is kept for kept in (every[0], *best, now))]


def _known(value: float) -> float:
    return value if value == value else -torch.inf


def drift(runs: Sequence[Run], now: Run) -> dict[str, Float[Tensor, " N"]]:
    """Return how similar each sample's map is to that of the previous and of the first run.

    Spearman's rank correlation of the small maps: 1 for the same order, 0 for an unrelated one, NaN for flat
    maps. Empty if there is no earlier run on the same samples.
    """
    earlier = comparable(runs, now)
    if not earlier:
        return {}
    return {
        name: rank_correlation(now.small.float().flatten(1), run.small.float().flatten(1))
        for name, run in ((DRIFT_PREVIOUS, earlier[-1]), (DRIFT_INITIAL, earlier[0]))
    }
