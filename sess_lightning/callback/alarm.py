"""The Clever-Hans alarm: the model gets better while its maps leave the object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sess_lightning.callback.runs import FIGURES, Run, comparable
from sess_lightning.metrics.bootstrap import Mean, resample
from sess_lightning.scores import REGION_SHARE, RELEVANCE_MASS

LEAST_RISE = 0.02
"""How much accuracy must have risen for a fall of the explanations to be reported."""
LEAST_FALL = 0.05
"""How far a figure must have fallen: maps of a healthy training change a little from run to run."""
LEARNT = 0.5
"""How far accuracy must be between a constant guess and 1 for maps beside the object to be reported."""
LEAST_SAMPLES = 8
"""With fewer comparable samples, a bootstrap interval means little, and the alarm stays silent."""
LEVEL = 0.99
"""Level of the paired interval: three figures are tested in every run."""
TOLD = 5
"""How many samples an alarm names."""


@dataclass(frozen=True)
class Finding:
    """A figure that is lower than it should be.

    Attributes:
        figure: Its key.
        before: Its mean in the earlier run, or the score of a uniform map.
        now: Its mean in this run.
        low: Lower end of the paired difference's interval, now minus before.
        high: Its upper end, below 0.
        samples: Number of samples behind the difference: those classified correctly and with a map that is
            not flat, in both runs.
        flat: Number of samples left out for a flat map.
        since: The earlier run; None if the figure is compared with a uniform map.
        worst: The indices of the samples with the largest difference, worst first.
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
    """Return the reasons for an alarm; empty if there are none.

    Two tests are made, on pairs of the same samples: those that are classified correctly and have a map that
    is not flat, in both runs. A finding needs at least 8 of them, and a 99 % bootstrap interval of the paired
    mean difference that lies below 0:

    * *Fall.* Against the best earlier run of each figure, and against the first: accuracy has risen by at
      least 0.02 since, and relevance mass, Pointing Game or overall has fallen by at least 0.05.
    * *Beside the object.* Accuracy is at least half way from a constant guess to 1, and the maps have less of
    their mass inside the regions than uniform maps. This needs no good earlier run: a watermark learnt from
    the first step on leaves none.

    Neither proves the model wrong: it may rightly use the surroundings of the object. It is a reason to look.

    Args:
        runs: Earlier runs, from ``remembered``.
        now: This run, with its accuracy.
    """
    lower = []
    for figure in FIGURES:
        before = [run for run in comparable(runs, now) if now.accuracy - run.accuracy >= LEAST_RISE]
        falls = [_lower(figure, now, run.figures[figure], LEAST_FALL, run) for run in before]
        lower += sorted((one for one in falls if one is not None), key=lambda one: one.high)[:1]
    if now.accuracy - now.guess >= LEARNT * (1 - now.guess):
        beside = _lower(RELEVANCE_MASS, now, now.figures[REGION_SHARE], 0.0, None)
        lower += [beside] if beside is not None else []
    return lower


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
    for reason in found:
        figure = reason.figure.replace("_", " ")
        difference = f"{LEVEL:.0%} interval of the paired difference [{reason.low:.3f}, {reason.high:.3f}]"
        samples = f"{reason.samples} samples classified right"
        samples += f", {reason.flat} flat maps aside" * (reason.flat > 0)
        if reason.since is None:
            lines.append(
                f"{figure} is {reason.now:.3f}, less than the {reason.before:.3f} of a map without "
                f"preference ({difference}, {samples})"
            )
        else:
            lines.append(
                f"{figure} fell from {reason.before:.3f} (step {reason.since.step}, {key} "
                f"{reason.since.accuracy:.3f}) to {reason.now:.3f} ({difference}, {samples})"
            )
    worst = ", ".join(names[i] for i in found[0].worst)
    return (
        f"Clever Hans? {key} is {now.accuracy:.3f} at step {now.step}, yet {'; '.join(lines)}. "
        f"The model may be right for a reason that lies outside the object. Look at: {worst}."
    )
