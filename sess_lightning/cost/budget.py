"""How many samples a validation run can pay for, in forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sess_lightning.types import SaliencyMethod

SHARED = 3
"""Forward passes that belong to no sample: the image of zeros, and finding layers on image and window."""
CONTROL_SAMPLES = 4
"""The controls are scored on this many samples, even if fewer samples are then explained."""
FURTHER = 2 * (28 - 1)
"""Forward passes of the two curves of one more map, whose ends are known."""
NO_SAMPLE = (
    "max_forwards={} does not pay for a single sample, which costs {} forwards of {}x{} px; raise it to {} "
    "or more, or use fewer scales, masks or steps."
)
"""Why there are no samples."""


@dataclass(frozen=True)
class Budget:
    """What a validation run will do: on all ranks together where the loader's order is known, else on each.

    Attributes:
        samples: How many samples are explained.
        controls: On how many of these the controls' curves are drawn.
        forwards: Forward passes of single images, over all ranks.
    """

    samples: int
    controls: int
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
        compare: The methods scored beside it; those that need no forward pass are the controls.
        model: What is explained.
        size: (height, width) of the images.
        num_samples: Samples asked for over all ranks.
        available: Samples that exist in one share.
        max_forwards: Upper bound over all ranks.
        fixed: Forward passes of a sample before it is explained.
        shares: Ranks that each choose samples of their own; 1 where they share one choice.
        classes: The most classes that are explained on a sample.

    Raises:
        ValueError: If it does not pay for a single sample.
    """
    price, controls = _prices(method, compare, model, size, fixed, classes)
    here = max_forwards // shares - SHARED
    samples = int(min(-(-num_samples // shares), available, (here - CONTROL_SAMPLES * controls) // price))
    if samples < 1:
        least = shares * (SHARED + price + CONTROL_SAMPLES * controls)
        raise ValueError(NO_SAMPLE.format(max_forwards, price, *size, least))
    on_controls = min(samples, (here - samples * price) // controls) if controls else 0
    return Budget(samples, on_controls, shares * (SHARED + samples * price + on_controls * controls))


def _prices(
    method: SaliencyMethod,
    compare: Mapping[str, SaliencyMethod],
    model: nn.Module,
    size: tuple[int, int],
    fixed: int,
    classes: int,
) -> tuple[int, int]:
    """Return the forward passes of a sample: all but the controls' curves, and the controls' curves."""
    models = [other for other in compare.values() if other.forwards > 0]
    beside = [other for other in models if not method.gives(other, model, size)]
    curves = classes * (fixed + 1 + FURTHER * (1 + len(models)))
    maps = sum(
        one.count_forwards(model, size) * (1 if one.shares_classes else classes) for one in (method, *beside)
    )
    return curves + maps, classes * FURTHER * (len(compare) - len(models))
