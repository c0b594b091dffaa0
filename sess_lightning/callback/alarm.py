"""The Clever-Hans alarm: the model gets better while it looks elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sess_lightning.callback.runs import FIGURES, Run, comparable
from sess_lightning.metrics.bootstrap import Mean, resample

LEAST_RISE = 0.02
"""How much accuracy must have risen for a fall of the explanations to be told."""
LEAST_FALL = 0.05
"""How deep a figure must have fallen: maps of a healthy training move a little from run to run."""
LEARNT = 0.5
"""How far accuracy must be on its way from a constant guess to 1 for maps beside the object to be told."""
LEAST_SAMPLES = 8
"""With fewer samples that can be compared, a bootstrap interval says next to nothing: the alarm is silent."""
LEVEL = 0.99
"""Of the paired interval: three figures are looked at, in every run."""
TOLD = 5
"""How many samples an alarm names."""


@dataclass(frozen=True)
class Finding:
    """A figure that is lower than it should be.

    Attributes:
        figure: Which.
        before: Its mean in the earlier run, or what a map without preference scores.
        now: Its mean in this run.
        low: Lower end of the paired difference's interval, now less before.
        high: Its upper end, below 0.
        samples: How many samples the difference is a mean of: classified right and with a map that is not
            flat, in both runs.
        flat: How many were left out for a flat map.
        since: The earlier run; None where the figure is below that of a map without preference.
        worst: The places of the samples with the largest difference, worst first.
    """

    figure: str
    before: float
    now: float
    low: float
    high: float
    samples: int
    flat: int
    since: Run | None
    worst: tuple[int, ...]


def findings(runs: Sequence[Run], now: Run) -> list[Finding]:
    """Return what there is to be alarmed about, empty if nothing.

    Two things are tested, each on the same samples in pairs: those that are classified right and have a map
    that is not flat, in both runs. Each is told only if there are at least 8 of them, and if the 99 %
    bootstrap interval of the paired mean difference lies below 0:

    * *Fall.* Against the best earlier run of each figure, and against the first: accuracy has risen by at
      least 0.02 since, and relevance mass, Pointing Game or overall has fallen by at least 0.05.
    * *Beside the object.* Accuracy is at least half way from a constant guess to 1, and the maps hold less of
      their mass inside the regions than maps without preference do. This needs no earlier run that was
      good: a watermark learnt from the first step on leaves none.

    Neither says that the model is wrong: it may rightly use what lies around the object. It says to look.

    Args:
        runs: Earlier runs, as ``remembered`` keeps them.
        now: This run, with its accuracy.
    """
    found = []
    for figure in FIGURES:
        before = [run for run in comparable(runs, now) if now.accuracy - run.accuracy >= LEAST_RISE]
        each = [_lower(figure, now, run.figures[figure], LEAST_FALL, run) for run in before]
        found += sorted((one for one in each if one is not None), key=lambda one: one.high)[:1]
    if now.accuracy - now.guess >= LEARNT * (1 - now.guess):
        beside = _lower("relevance_mass", now, now.figures["region_share"], 0.0, None)
        found += [beside] if beside is not None else []
    return found


def _lower(
    figure: str, now: Run, before: Float[Tensor, " N"], least: float, since: Run | None
) -> Finding | None:
    difference = (now.figures[figure] - before).double()
    runs = [now] if since is None else [now, since]
    known = difference.isfinite() & torch.stack([run.is_right for run in runs]).all(0)
    flat = torch.stack([run.is_flat for run in runs]).any(0)
    both = known & ~flat
    count = int(both.sum())
    if count < LEAST_SAMPLES:
        return None
    resampled = resample({"mean": Mean(difference[both], torch.arange(count))}, count)["mean"]
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(resampled, ends).tolist()
    if high >= 0 or difference[both].mean() > -least:
        return None
    difference = difference.where(both, 0.0)
    order = difference.argsort(stable=True)[:TOLD]
    return Finding(
        figure=figure,
        before=float(before[both].mean()),
        now=float(now.figures[figure][both].mean()),
        low=low,
        high=high,
        samples=count,
        flat=int((known & flat).sum()),
        since=since,
        worst=tuple(i for i in order.tolist() if difference[i] < 0),
    )


def describe(found: Sequence[Finding], now: Run, key: str, names: Sequence[str]) -> str:
    """Return the alarm's text; ``key`` is the accuracy's, ``names`` the samples'."""
    lines = []
    for each in found:
        figure = each.figure.replace("_", " ")
        difference = f"{LEVEL:.0%} interval of the paired difference [{each.low:.3f}, {each.high:.3f}]"
        samples = f"{each.samples} samples classified right"
        samples += f", {each.flat} flat maps aside" * (each.flat > 0)
        if each.since is None:
            lines.append(
                f"{figure} is {each.now:.3f}, less than the {each.before:.3f} of a map without preference "
                f"({difference}, {samples})"
            )
        else:
            lines.append(
                f"{figure} fell from {each.before:.3f} (step {each.since.step}, {key} "
                f"{each.since.accuracy:.3f}) to {each.now:.3f} ({difference}, {samples})"
            )
    worst = ", ".join(names[i] for i in found[0].worst)
    return (
        f"Clever Hans? {key} is {now.accuracy:.3f} at step {now.step}, yet {'; '.join(lines)}. "
        f"The model may be right for a reason that lies outside the object. Look at: {worst}."
    )
