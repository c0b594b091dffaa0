"""Scores of a batch's maps, for all methods at once, and as rows of a metric's states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sess_lightning.metrics.functional import pointing_hits, relevance_mass, tied_share
from sess_lightning.metrics.summary import NO_TRIAL
from sess_lightning.ops import has_span
from sess_lightning.regions import Regions, has_region


class Assessment(NamedTuple):
    """One method's maps of a batch, and their scores.

    Attributes:
        maps: Saliency in [0, 1].
        insertion: Curves; NaN for images beyond the method's limit.
        deletion: Curves; NaN for images beyond the method's limit.
        hits: Pointing Game: 1 hit, 0 miss, -1 no trial.
        mass: Share of the map inside the region; NaN without one.
        seconds: How long the maps took; NaN without a clock.
    """

    maps: Float[Tensor, "B H W"]
    insertion: Float[Tensor, "B T"]
    deletion: Float[Tensor, "B T"]
    hits: Int[Tensor, " B"]
    mass: Float[Tensor, " B"]
    seconds: float = float("nan")


class Scene(NamedTuple):
    """What all methods' maps of a batch are scored on; ``ends`` are the scores at the ends of all curves."""

    images: Float[Tensor, "B C H W"]
    blurred: Float[Tensor, "B C H W"]
    targets: Int[Tensor, " B"]
    predicted: Int[Tensor, " B"]
    ends: Float[Tensor, "B 3"]
    regions: Regions | None
    size: tuple[int, int] | None


def region_scores(
    maps: Sequence[Float[Tensor, "B H W"]], scene: Scene, tolerance: float
) -> tuple[list[Int[Tensor, " B"]], list[Float[Tensor, " B"]]]:
    """Return the Pointing Game's hits of each method's maps, and the share of each inside the regions.

    Without a region, these are -1 and NaN.
    """
    if scene.regions is None:
        unknown = torch.full_like(maps[0][:, 0, 0], torch.nan)
        return [torch.full_like(scene.targets, NO_TRIAL)] * len(maps), [unknown] * len(maps)
    # For all methods at once: on an accelerator, a small step costs as much for one map as for many.
    stacked, times, regions = torch.cat([*maps]), len(maps), scene.regions
    regions = regions.repeat(times, 1, 1) if isinstance(regions, Tensor) else [*regions] * times
    hit = pointing_hits(stacked, regions, tolerance, scene.size)
    hits: Tensor = torch.where(has_region(regions, stacked.device), hit, NO_TRIAL)
    mass = relevance_mass(stacked, regions, scene.size)
    return [*hits.split(len(scene.targets))], [*mass.split(len(scene.targets))]


def method_rows(assessments: Sequence[Assessment]) -> dict[str, Tensor]:
    """Return the rows of all methods, (B, M, ...)."""
    maps = torch.cat([one.maps for one in assessments])
    count = len(assessments[0].maps)
    curves = torch.stack([curve for one in assessments for curve in (one.insertion, one.deletion)], 1)
    columns = {
        "hits": [one.hits for one in assessments],
        "mass": [one.mass for one in assessments],
        "tied": tied_share(maps).split(count),
        "flat": _is_flat(maps).long().split(count),
    }
    rows = {name: torch.stack([*parts], 1) for name, parts in columns.items()}
    return rows | {"probabilities": curves.unflatten(1, (-1, 2))}


def _is_flat(maps: Tensor) -> Bool[Tensor, " B"]:
    low, high = maps.flatten(1).aminmax(dim=1)
    return ~(has_span(low, high) | high.isnan())
