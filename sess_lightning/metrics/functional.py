"""How good a map is: insertion, deletion, the Pointing Game, relevance mass and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from sess_lightning.metrics.curves import (
    Ends,
    Ties,
    blurred_baseline,
    curve_auc,
    deletion_curve,
    insertion_and_deletion_curves,
    insertion_curve,
    pixel_steps,
    tied_share,
)
from sess_lightning.ops import ROUNDING, has_span, sent, size_of, upsample
from sess_lightning.regions import (
    Regions,
    box_masks,
    checked,
    has_region,
    have_areas,
    pad_boxes,
    read_regions,
)

__all__ = [
    "Ends",
    "Ties",
    "blurred_baseline",
    "class_mean",
    "curve_auc",
    "deletion_curve",
    "insertion_and_deletion_curves",
    "insertion_curve",
    "pixel_steps",
    "pointing_hits",
    "rank_correlation",
    "relevance_mass",
    "tied_share",
]


def pointing_hits(
    maps: Float[Tensor, "B h w"],
    regions: Regions,
    tolerance: float = 15.0,
    size: tuple[int, int] | None = None,
) -> Bool[Tensor, " B"]:
    """Return whether each map's highest point is on the region, or nearer to it than ``tolerance``.

    The point is the first maximum in raster order, where values within 1e-6 of the map's span of it count as
    maxima: an upsampled map has plateaus along its border, equal but for rounding. NaN counts as 0; a flat
    map and an empty region are misses.

    Args:
        maps: One map per image; resized bilinearly to the regions' resolution.
        regions: Per image a mask, or boxes (x0, y0, x1, y1), half-open pixels (``read_regions``).
        tolerance: Distance in px of the regions' resolution, exclusive; 15 at original resolution in the
            literature.
        size: (height, width) that the boxes refer to; None is the maps'. Masks bring their own.

    Raises:
        ValueError: If there is not one region per map, maps are not (B, h, w), the tolerance is not positive,
            or boxes are shares.

    Source: Zhang et al., "Excitation Backprop", IJCV 2018, with TorchRay's rules.

    >>> pointing_hits(torch.eye(32)[None], [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], tolerance=2.0)
    tensor([True])
    """
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}; 1 is the region itself.")
    maps, regions = _aligned(maps, regions, size)
    u, v, has_peak = _highest(maps)
    if isinstance(regions, Tensor):
        return _near_mask(regions, u, v, tolerance) & has_peak
    return _near_box(regions, u, v, tolerance) & has_peak


def _aligned(
    maps: Tensor, regions: Regions, size: tuple[int, int] | None
) -> tuple[Float[Tensor, "B H W"], Regions]:
    """Return maps at the regions' resolution, and the regions, read and checked."""
    maps = _as_maps(maps, regions)
    regions = checked(read_regions(regions, size=size_of(maps)), size or size_of(maps))
    target = size_of(regions) if isinstance(regions, Tensor) else size
    return upsample(maps, target or size_of(maps)), regions


def _as_maps(maps: Real[Tensor, "B h w"], regions: Regions) -> Float[Tensor, "B h w"]:
    """Return maps in float32 at least, with 0 for NaN; refuse those that are not one per region."""
    if maps.ndim != 3:
        raise ValueError(
            f"maps must be (B, h, w), got {tuple(maps.shape)}; use maps[:, 0] for maps with a channel, "
            "maps[None] for a single one."
        )
    if len(regions) != len(maps):
        raise ValueError(f"regions: got {len(regions)} for {len(maps)} maps; give one per map.")
    if not maps.is_floating_point() or maps.dtype.itemsize < 4:  # A sum over pixels exceeds float16.
        maps = maps.float()
    return maps.nan_to_num(0)


def _highest(maps: Float[Tensor, "B H W"]) -> tuple[Tensor, Tensor, Bool[Tensor, " B"]]:
    """Return column and row of each map's first maximum, and whether the map is not flat."""
    flat = maps.flatten(1)
    low, high = flat.aminmax(dim=1)
    highest = flat >= (high - (ROUNDING * high - ROUNDING * low))[:, None]
    point = highest.to(torch.uint8).argmax(1)
    return point % maps.shape[2], point // maps.shape[2], has_span(low, high)


def relevance_mass(
    maps: Float[Tensor, "B h w"],
    regions: Regions,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, " B"]:
    """Return the share of each map's sum inside its region: relevance mass accuracy.

    A uniform map scores the region's share of the image, and a map of zeros 0. The score is NaN for an empty
    region and for maps with negative values, of which shares are undefined. NaN in a map counts as 0.

    Args:
        maps: Non-negative saliency; resized bilinearly to the regions' resolution.
        regions: Per image a mask, or boxes (x0, y0, x1, y1), half-open pixels (``read_regions``).
        size: (height, width) that the boxes refer to; None is the maps'. Masks bring their own.

    Raises:
        ValueError: If there is not one region per map, maps are not (B, h, w), or boxes on the CPU are of
            another form.

    Source: Arras, Osman, Samek, "CLEVR-XAI", Information Fusion 2022.

    >>> relevance_mass(torch.ones(1, 32, 32), [torch.tensor([[0.0, 0.0, 16.0, 32.0]])])
    tensor([0.5000])
    """
    maps, regions = _aligned(maps, regions, size)
    masks = regions if isinstance(regions, Tensor) else box_masks(regions, size_of(maps), maps.device)
    inside, all_of_it = (maps * masks).sum((1, 2)), maps.sum((1, 2))
    low, high = maps.flatten(1).aminmax(dim=1)
    has_share = has_region(regions, maps.device) & (low >= -ROUNDING * high)
    return (inside / all_of_it).nan_to_num(0).masked_fill(~has_share, torch.nan)


def rank_correlation(first: Float[Tensor, "B N"], second: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Return Spearman's rank correlation of each pair of rows, ties sharing their mean rank.

    NaN where a row is constant.

    >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[9.0, 4.0, 1.0]])).round(decimals=4)
    tensor([-1.])
    """
    constant = (first == first[:, :1]).all(1) | (second == second[:, :1]).all(1)
    # At least two columns: torchmetrics reads a single one as a vector.
    pairs = (torch.cat([rows, rows[:1]]).mT for rows in (first, second))
    return spearman_corrcoef(*pairs)[: len(first)].masked_fill(constant, torch.nan).to(first.dtype)


def _near_mask(masks: Tensor, u: Tensor, v: Tensor, tolerance: float) -> Tensor:
    disc = _disc(tolerance, masks.device)
    x, y = u[:, None] + disc[:, 0], v[:, None] + disc[:, 1]
    height, width = masks.shape[-2:]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = (y * width + x).clamp(0, height * width - 1)
    near: Tensor = masks.flatten(1).gather(1, index) & inside
    return near.any(1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _disc(tolerance: float, device: torch.device) -> Int[Tensor, "K 2"]:
    """Return the (x, y) offsets that are nearer than ``tolerance``."""
    reach = [*range(-int(tolerance), int(tolerance) + 1)]
    return sent([(x, y) for y in reach for x in reach if x * x + y * y < tolerance * tolerance], device)


def _near_box(boxes: Sequence[Tensor], u: Tensor, v: Tensor, tolerance: float) -> Tensor:
    padded = pad_boxes(boxes, u.device)
    start, end = padded.split(2, -1)
    point = torch.stack([u, v], 1)[:, None].to(padded)
    away = torch.maximum(start - point, point - (end - 1)).clamp(min=0)
    near: Tensor = (away * away).sum(-1) < tolerance * tolerance
    return (near & have_areas(padded)).any(1)


def class_mean(
    hits: Real[Tensor, "*B K"], trials: Real[Tensor, "*B K"], unseen_as_zero: bool = False
) -> Float[Tensor, "*B"]:
    """Return the mean of hits / trials over classes with trials, or over all, the others as 0 (TorchRay).

    >>> class_mean(torch.tensor([1, 1, 0]), torch.tensor([2, 1, 0]))
    tensor(0.7500)
    """
    accuracy = hits / trials.clamp(min=1)
    seen = trials.shape[-1] if unseen_as_zero else (trials > 0).sum(-1)
    return accuracy.sum(-1) / seen
