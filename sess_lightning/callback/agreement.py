"""Whether the explained samples are classified correctly as often as the logged accuracy says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor

LEVEL = 0.999
"""Two-sided level: of a thousand trainings that agree, one gets a warning."""
CERTAIN = 0.01
"""An accuracy is kept this far from 0 and 1, since rounding may decide an image."""


def disagrees(accuracy: float, right: Bool[Tensor, " N"], targets: Sequence[int]) -> bool:
    """Return whether samples are classified correctly more or less often than chance allows.

    The accuracy may be the share of all images, or the mean of the classes' shares: it must agree with one of
    them. Samples are drawn without replacement, which makes the test cautious.

    Args:
        accuracy: Accuracy on the whole validation set, as a fraction; NaN if unknown.
        right: Which samples the explained model classifies correctly.
        targets: Their classes.
    """
    if accuracy != accuracy or not len(right):
        return False
    chance = min(max(accuracy, CERTAIN), 1 - CERTAIN)
    plain = _two_sided(int(right.sum()), len(right), chance)
    return plain < 1 - LEVEL and not _is_balanced(chance, right, targets)


def _two_sided(hits: int, count: int, chance: float) -> float:
    """Return the probability of a number of hits that is at least as unlikely (exact binomial test)."""
    # By logarithms: of thousands of samples the coefficients exceed any float.
    places = math.lgamma(count + 1)
    masses = [
        math.exp(
            places - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            + k * math.log(chance) + (count - k) * math.log1p(-chance)
        )
        for k in range(count + 1)
    ]  # fmt: skip
    return sum(mass for mass in masses if mass <= masses[hits] * (1 + 1e-9))


def _is_balanced(chance: float, right: Bool[Tensor, " N"], targets: Sequence[int]) -> bool:
    """Return whether the mean of the classes' shares may be ``chance``."""
    counts = Counter(targets)
    hits = Counter(target for target, is_right in zip(targets, right.tolist(), strict=True) if is_right)
    mean = sum(hits[target] / count for target, count in counts.items()) / len(counts)
    variance = chance * (1 - chance) * sum(1 / count for count in counts.values()) / len(counts) ** 2
    return abs(mean - chance) < 3.29 * math.sqrt(variance)
