"""Which samples a run explains, the same on however many processes, and how many it can pay for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sess_lightning.types import SaliencyMethod

SHARED = 3
"""Forwards of a run that no sample pays for: the picture of zeros, and finding layers on image and window."""


FLOOR_SAMPLES = 4
"""How many samples at least the floors are scored on, when that costs other samples."""


FURTHER = 2 * (28 - 1)
"""Forwards of the two curves of one more map, their ends being known."""


@dataclass(frozen=True)
class Budget:
    """What a validation run will do, on one process or, where the order is known, on all together.

    Attributes:
        samples: That are explained.
        floors: Of these, on which the floors' curves are drawn.
        forwards: Of single images, over all processes.
    """

    samples: int
    floors: int
    forwards: int


def afford(
    method: SaliencyMethod,
    compare: Mapping[str, SaliencyMethod],
    model: nn.Module,
    size: tuple[int, int],
    *,
    num_samples: int,
    available: float,
    max_forwards: int,
    fixed: int = 1,
    shares: int = 1,
    classes: int = 1,
) -> Budget:
    """Return how many samples ``max_forwards`` pays for.

    Args:
        method: What explains.
        compare: What is scored beside it; the floors are those that need no forward.
        model: What is explained.
        size: (height, width) of the images.
        num_samples: Wanted on all processes.
        available: Samples that there are, in one share.
        max_forwards: On all processes.
        fixed: Forwards of each sample before it is explained.
        shares: Processes that each explain their own number of samples.
        classes: Classes that are explained of each sample, at most.

    Raises:
        ValueError: If it does not pay for a single sample.
    """
    price, floors = _prices(method, compare, model, size, fixed, classes)
    here = max_forwards // shares - SHARED
    samples = int(min(-(-num_samples // shares), available, (here - FLOOR_SAMPLES * floors) // price))
    if samples < 1:
        raise ValueError(
            f"max_forwards={max_forwards} does not pay for a single sample, which costs {price} "
            f"forwards of {size[0]}x{size[1]} px; raise it, or use fewer scales."
        )
    on_floors = min(samples, (here - samples * price) // floors) if floors else 0
    return Budget(samples, on_floors, shares * (SHARED + samples * price + on_floors * floors))


def _prices(
    method: SaliencyMethod,
    compare: Mapping[str, SaliencyMethod],
    model: nn.Module,
    size: tuple[int, int],
    fixed: int,
    classes: int,
) -> tuple[int, int]:
    """Return the forwards of a sample without the floors' curves, and those of these curves."""
    models = [other for other in compare.values() if other.forwards > 0]
    beside = [other for other in models if not method.gives(other, model, size)]
    curves = classes * (fixed + 1 + FURTHER * (1 + len(models)))
    maps = sum(
        one.count_forwards(model, size) * (1 if one.shares_classes else classes) for one in (method, *beside)
    )
    return curves + maps, classes * FURTHER * (len(compare) - len(models))
