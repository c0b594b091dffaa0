"""Which epoch to keep: the best explained one among those as accurate as the best."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Selection:
    """The selection so far, as plain numbers that a checkpoint can hold.

    Attributes:
        value: The last run's value for a monitor: ``level`` + quality, or below 0 if its accuracy is lower
            than the best by more than a standard error.
        level: Grows by 1 when the selected run falls behind in accuracy: then a new one is selected, however
            well it is explained.
        best: The highest accuracy so far.
        accuracy: The selected run's accuracy.
        quality: The selected run's quality.
    """

    value: float = -1.0
    level: int = 0
    best: float = 0.0
    accuracy: float = -1.0
    quality: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether all fields are what they should be: a checkpoint of another version may hold others."""
        return all(isinstance(value, (int, float)) for value in vars(self).values())


def select(before: Selection, accuracy: float, quality: float, count: float) -> Selection:
    """Take in one more run: its ``value`` is the largest so far exactly if it is now the one to keep.

    It is, if its accuracy is within one standard error of the best so far, and if it is explained better than
    the selected run or that run is no longer within. Every run is measured on the same samples, so the
    standard error of one accuracy is a generous tolerance for the difference of two.

    Args:
        before: The selection so far.
        accuracy: This run's accuracy, in [0, 1].
        quality: How well it is explained, in [0, 1].
        count: Number of samples behind the accuracy; infinity leaves no tolerance.

    Source: the one-standard-error rule of Breiman et al. 1984, section 3.4.3.
    """
    if not (math.isfinite(accuracy) and math.isfinite(quality)):
        return replace(before, value=-1.0)
    best = max(before.best, accuracy)
    least = best - standard_error(best, count)
    if accuracy < least:
        return replace(before, value=accuracy - 1)
    level = before.level + (before.accuracy < least)
    value = level + min(max(quality, 0.0), 1 - 1e-6)
    if level == before.level and quality <= before.quality:
        return replace(before, value=value, best=best)
    return Selection(value, level, best, accuracy, quality)


def standard_error(accuracy: float, count: float) -> float:
    """Return the standard error of a share of ``count``; it is not 0 where all or none are right.

    Source: Agresti, Coull 1998: two successes and two failures are added.
    """
    if math.isinf(count):
        return 0.0
    share = (accuracy * count + 2) / (count + 4)
    return math.sqrt(share * (1 - share) / (count + 4))
