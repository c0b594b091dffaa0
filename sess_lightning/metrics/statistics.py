"""How sure a mean is: bootstrap intervals over images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 2000


def bootstrap_counts(samples: int, resamples: int = RESAMPLES, seed: int = 0) -> Float[Tensor, "R N"]:
    """Return how often each sample is drawn in each bootstrap resample, from an own generator.

    A resample's sum is then one matrix product, and all figures of a run share the same resamples, so that
    differences between methods are paired.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(samples, (resamples, samples), generator=generator)
    counts = torch.zeros(resamples, samples, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand_as(drawn))


def interval(name: str, resampled: Float[Tensor, " R"]) -> dict[str, float]:
    """Return the 95 % percentile interval of a resampled figure, or nothing if it never was finite."""
    finite = resampled[resampled.isfinite()]
    if not len(finite):
        return {}
    low, high = torch.quantile(finite, torch.tensor([0.025, 0.975], dtype=finite.dtype)).tolist()
    return {f"{name}_ci_low": low, f"{name}_ci_high": high}
