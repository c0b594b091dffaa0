"""Coarse to fine: of the finer scales, only the windows where the coarser maps are high are scored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.engine.extraction import Extracted, WindowExtractor
from sess_lightning.engine.fusion import crop_strips, window_means
from sess_lightning.engine.windows import Plan, descent, ranked
from sess_lightning.ops import ROUNDING
from sess_lightning.types import SaliencyMethod


def descend(
    extractor: WindowExtractor,
    model: nn.Module,
    guide: SaliencyMethod,
    share: float,
    fuse: Callable[[Tensor, Tensor, Tensor, Plan], Float[Tensor, "T H W"]],
) -> Extracted:
    """Score the coarser scales, and those of the other windows over which the fused map is highest.

    Where it is flat, the first of them are taken.

    Args:
        extractor: Of all windows.
        model: What is explained.
        guide: Makes the maps that are followed.
        share: Of all windows, how many are scored, in (0, 1].
        fuse: Fuses the maps of some windows, from (maps, log-scores, their numbers, plan).

    Raises:
        ValueError: If ``guide`` cannot read the model.
    """
    scales, fine = descent(extractor.plan, share)
    coarse = extractor.first(scales)
    scored = coarse.extract(model, guide)
    if not fine:
        return scored
    fused = fuse(scored.maps, scored.logs, scored.which, coarse.plan)
    chosen = _promising(fused, extractor, len(coarse.plan), fine)
    extractions = [*extractor.extract_some(model, guide, chosen)]
    maps = torch.cat([extractor.maps_of(part) for part in extractions]).unflatten(0, chosen.shape)
    logs = torch.cat([part.log_scores for part in extractions]).view_as(chosen)
    return Extracted(
        torch.cat([scored.which, chosen], 1),
        torch.cat([scored.logs, logs], 1),
        torch.cat([scored.maps, maps], 1),
    )


def _promising(
    fused: Float[Tensor, "T H W"], extractor: WindowExtractor, start: int, count: int
) -> Int[Tensor, "T K"]:
    """Return the numbers of the ``count`` windows from ``start`` on over which maps are highest, rising."""
    means = window_means(fused, *crop_strips(extractor.plan, extractor.antialias, fused.device))
    means = means[:, start:] / means.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return start + ranked(means, ROUNDING)[:, :count].sort(dim=-1).values
