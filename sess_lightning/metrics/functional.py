"""How good a map is: insertion, deletion, the Pointing Game, relevance mass and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef

from sess_lightning.batching import batch_limit, blank_batch, by_image, in_batches
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs, score
from sess_lightning.ops import ROUNDING, blur, has_span, size_of, upsample
from sess_lightning.regions import Regions, box_masks, has_region, pad_boxes, read_regions
from sess_lightning.types import Activation

Ties: TypeAlias = Literal["first", "random"]
Ends: TypeAlias = "tuple[Float[Tensor, ' B'] | None, Float[Tensor, ' B'] | None]"


def blurred_baseline(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Return the evidence-free images insertion starts from: a heavy Gaussian blur.

    51 x 51 px with sigma 50 at a shorter side of 224 px (RISE, Group-CAM), in proportion for other sizes.
    """
    factor = min(images.shape[-2:]) / 224
    return blur(images, 2 * max(1, round(25 * factor)) + 1, 50 * factor).to(images.dtype)


def insertion_curve(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    maps: Float[Tensor, "B H W"],
    targets: Int[Tensor, " B"],
    *,
    steps: int = 28,
    baseline: Float[Tensor, "B C H W"] | None = None,
    ties: Ties = "first",
    activation: Activation = "softmax",
    batch_size: int | None = None,
    ends: Ends = (None, None),
) -> Float[Tensor, "B {steps}+1"]:
    """Return the target's probability as pixels are shown, most salient first.

    Args:
        model: Any classifier; given back as it was.
        images: As the model takes them.
        maps: One map per image, same height and width, higher is more salient.
        targets: The explained class of each image.
        steps: Number of equal steps; each shows ``ceil(H * W / steps)`` pixels (28: 3.57 %).
        baseline: What is seen before; None is ``blurred_baseline``.
        ties: Pixels of equal saliency are shown in raster order (``"first"``) or in a seeded random one.
        activation: How logits become probabilities.
        batch_size: Images that go through the model at once; None by the memory there is.
        ends: Scores of the baseline and of the image where they are known; each saves one forward per image.

    Raises:
        ValueError: If shapes do not fit.

    Source: Petsiuk et al., "RISE", BMVC 2018.
    """
    start = blurred_baseline(images) if baseline is None else _like(images, baseline)
    _check_maps(maps, images.shape[0], size_of(images))
    transition = _Transition(start, images, pixel_steps(borrowed(maps), steps, ties), targets, ends)
    return _draw(model, [transition], steps, activation, batch_size)[0]


def deletion_curve(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    maps: Float[Tensor, "B H W"],
    targets: Int[Tensor, " B"],
    *,
    steps: int = 28,
    baseline: Float[Tensor, "B C H W"] | None = None,
    ties: Ties = "first",
    activation: Activation = "softmax",
    batch_size: int | None = None,
    ends: Ends = (None, None),
) -> Float[Tensor, "B {steps}+1"]:
    """Return the target's probability as pixels are taken away, most salient first.

    As ``insertion_curve``, from the image to its baseline: None is zeros, the data set's mean in normalised
    space. ``ends`` are the scores of the image and of the baseline.
    """
    end = torch.zeros_like(images) if baseline is None else _like(images, baseline)
    _check_maps(maps, images.shape[0], size_of(images))
    transition = _Transition(images, end, pixel_steps(borrowed(maps), steps, ties), targets, ends)
    return _draw(model, [transition], steps, activation, batch_size)[0]


def insertion_and_deletion_curves(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    maps: Sequence[Float[Tensor, "B H W"]],
    targets: Int[Tensor, " B"],
    *,
    steps: int = 28,
    activation: Activation = "softmax",
    batch_size: int | None = None,
    blurred: Float[Tensor, "B C H W"] | None = None,
    ends: tuple[Tensor, Tensor, Tensor] | None = None,
    which: Sequence[slice | Tensor] | None = None,
) -> list[tuple[Float[Tensor, "_ {steps}+1"], Float[Tensor, "_ {steps}+1"]]]:
    """Return both curves of several maps of each image, from one stream of full batches.

    Args:
        model: Any classifier; given back as it was.
        images: As the model takes them.
        maps: Each method's maps, one per image.
        targets: The explained class of each image.
        steps: Number of equal steps.
        activation: How logits become probabilities.
        batch_size: Images that go through the model at once; None by the memory there is.
        blurred: What insertion starts from; None is ``blurred_baseline``.
        ends: Scores of the images, the blurred images and zeros, which all curves share; None scores them.
        which: For each method, an index of the images whose curves are drawn; None draws all.

    Returns:
        For each method, the insertion and the deletion curves.

    Raises:
        ValueError: If shapes do not fit.
    """
    # Laid out once, for all methods.
    images, blurred = _last(images), _last(blurred_baseline(images) if blurred is None else blurred)
    zeros = torch.zeros_like(images)
    transitions = []
    for method, some in zip(maps, which or [slice(None)] * len(maps), strict=True):
        image, blurry, zero = (None, None, None) if ends is None else (end[some] for end in ends)
        _check_maps(method, len(images), size_of(images))
        step_of, target = pixel_steps(borrowed(method[some]), steps), targets[some]
        transitions += [
            _Transition(blurred[some], images[some], step_of, target, (blurry, image)),
            _Transition(images[some], zeros[some], step_of, target, (image, zero)),
        ]
    curves = _draw(model, transitions, steps, activation, batch_size)
    return list(zip(curves[::2], curves[1::2], strict=True))


class _Transition(NamedTuple):
    """Images that change into others pixel by pixel, in the order of their maps."""

    start: Float[Tensor, "B C H W"]
    end: Float[Tensor, "B C H W"]
    step_of: Int[Tensor, "B H W"]
    targets: Int[Tensor, " B"]
    ends: Ends

    def asked(self, steps: int) -> range:
        """Return the steps that have to be scored: the ends may be known."""
        return range(0 if self.ends[0] is None else 1, steps + 1 if self.ends[1] is None else steps)

    def paint(self, seen: Float[Tensor, "S C H W"], which: slice, asked: range) -> None:
        """Write states ``which``, image by image and step by step, into ``seen``."""
        for image, some, place in by_image(which, len(asked)):
            changed = _changed(self.step_of[image], asked[some], seen.shape[1])
            torch.where(changed, self.end[image], self.start[image], out=seen[place])


def _draw(
    model: nn.Module,
    transitions: Sequence[_Transition],
    steps: int,
    activation: Activation,
    batch_size: int | None,
) -> list[Float[Tensor, "B {steps}+1"]]:
    """Return the target's probability along every transition; batches run on from one into the next."""
    for one in transitions:
        if len(one.targets):
            check_inputs("Insertion and deletion", one.start, one.targets)
    asked = [one.asked(steps) for one in transitions]
    counts = [len(one.targets) * len(some) for one, some in zip(transitions, asked, strict=True)]
    first = [0, *accumulate(counts)]
    with explaining(model), torch.no_grad():
        laid = [one._replace(start=_last(one.start), end=_last(one.end)) for one in transitions]
        target_of = torch.cat([
            borrowed(one.targets).repeat_interleave(len(some))
            for one, some in zip(laid, asked, strict=True)
        ])  # fmt: skip

        def scored(_: Sequence[int], which: slice) -> Tensor:
            seen = blank_batch(which.stop - which.start, laid[0].start)
            for one, some, begin, end in zip(laid, asked, first, first[1:], strict=False):
                low, high = max(which.start, begin), min(which.stop, end)
                if low < high:
                    place = seen[low - which.start : high - which.start]
                    one.paint(place, slice(low - begin, high - begin), some)
            return score(model, seen, target_of[which], activation).exp()

        batches = in_batches(scored, range(first[-1]), batch_limit(batch_size, laid[0].start))
        none = torch.zeros(0, device=target_of.device)
        probabilities = torch.cat([none, *batches]).split(counts)
    return [
        _with_ends(inner.view(len(one.targets), len(some)), one.ends)
        for inner, some, one in zip(probabilities, asked, transitions, strict=True)
    ]


def _last(images: Tensor) -> Tensor:
    return images.detach().contiguous(memory_format=torch.channels_last)


def _with_ends(inner: Float[Tensor, "B S"], ends: Ends) -> Float[Tensor, "B T"]:
    known = [None if end is None else end[:, None].to(inner) for end in ends]
    return torch.cat([part for part in (known[0], inner, known[1]) if part is not None], 1)


def _changed(step_of: Int[Tensor, "H W"], steps: range, channels: int) -> Bool[Tensor, "T C H W"]:
    """Return which values have changed by each of ``steps``."""
    by = torch.arange(steps.start, steps.stop, device=step_of.device)
    changed = step_of < by[:, None, None]
    # Laid out like the images: three times as fast as to have it broadcast over the channels.
    return changed[:, None].expand(-1, channels, -1, -1).contiguous(memory_format=torch.channels_last)


def pixel_steps(maps: Float[Tensor, "B H W"], steps: int, ties: Ties = "first") -> Int[Tensor, "B H W"]:
    """Return at which step, from 0, each pixel changes: most salient first."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    flat = maps.flatten(1).nan_to_num(0)
    order = torch.arange(flat.shape[1], device=flat.device)
    if ties == "random":
        order = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat.device)
    elif ties != "first":
        raise ValueError(f'ties must be "first" or "random", got {ties!r}.')
    ranked = order[flat[:, order].sort(dim=1, descending=True, stable=True).indices]
    step_of_rank = torch.arange(flat.shape[1], device=flat.device) // -(-flat.shape[1] // steps)
    return torch.empty_like(ranked).scatter_(1, ranked, step_of_rank.expand_as(ranked)).view(maps.shape)


def tied_share(maps: Float[Tensor, "B H W"]) -> Float[Tensor, " B"]:
    """Return the share of each map's pixels whose value another has too: tie order decides about those.

    NaN counts as 0, as in ``pixel_steps``.
    """
    ranked = maps.flatten(1).nan_to_num(0).sort(dim=1).values
    same = ranked[:, 1:] == ranked[:, :-1]
    edge = same.new_zeros(same.shape[0], 1)
    return (torch.cat([edge, same], 1) | torch.cat([same, edge], 1)).float().mean(1)


def curve_auc(curves: Float[Tensor, "*B T"]) -> Float[Tensor, "*B"]:
    """Return the area under curves over [0, 1], trapezoid rule."""
    return (curves.sum(-1) - (curves[..., 0] + curves[..., -1]) / 2) / (curves.shape[-1] - 1)


def pointing_hits(
    maps: Float[Tensor, "B h w"],
    regions: Regions,
    tolerance: float = 15.0,
    size: tuple[int, int] | None = None,
) -> Bool[Tensor, " B"]:
    """Return whether each map's highest point lies on, or nearer than ``tolerance`` to, the region.

    The point is the first maximum in raster order, values within 1e-6 of the map's span of it included: an
    upsampled map has plateaus along its border, equal but for rounding. NaN counts as 0; a flat map is a
    miss, and so is an empty region.

    Args:
        maps: One map per image; resized bilinearly to the regions' resolution.
        regions: Per image a mask, or boxes (x0, y0, x1, y1), half-open pixels (``read_regions``).
        tolerance: Distance in px of the regions' resolution, exclusive; 15 at original resolution in the
            literature.
        size: (height, width) that the boxes refer to; None is the maps'. Masks bring their own.

    Raises:
        ValueError: If there is not one region per map, or the tolerance is not positive.

    Source: Zhang et al., "Excitation Backprop", IJCV 2018, with TorchRay's rules.
    """
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}; 1 asks for the region itself.")
    if len(regions) != maps.shape[0]:
        raise ValueError(f"regions: got {len(regions)} for {maps.shape[0]} maps; give one per map.")
    regions = read_regions(regions, size=size_of(maps))
    target = size_of(regions) if isinstance(regions, Tensor) else size
    maps = maps.nan_to_num(0)
    maps = upsample(maps, target) if target is not None else maps
    flat = maps.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    highest = flat >= (high - (ROUNDING * high - ROUNDING * low))[:, None]
    point = highest.to(torch.uint8).argmax(1)
    u, v = point % maps.shape[2], point // maps.shape[2]
    if isinstance(regions, Tensor):
        near = _near_mask(regions, u, v, tolerance)
    else:
        near = _near_box(regions, u, v, tolerance)
    return near & has_span(low, high)


def relevance_mass(
    maps: Float[Tensor, "B h w"],
    regions: Regions,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, " B"]:
    """Return the share of each map's sum that lies inside its region: relevance mass accuracy.

    A map without preference scores the region's share of the picture. A flat map of zeros scores 0; an empty
    region, and a map with negative values, which has no share of its sum, NaN. NaN in a map counts as 0.

    Args:
        maps: Saliency, not negative; resized bilinearly to the regions' resolution.
        regions: Per image a mask, or boxes (x0, y0, x1, y1), half-open pixels (``read_regions``).
        size: (height, width) that the boxes refer to; None is the maps'. Masks bring their own.

    Source: Arras, Osman, Samek, "CLEVR-XAI", Information Fusion 2022.
    """
    regions = read_regions(regions, size=size_of(maps))
    target = (size_of(regions) if isinstance(regions, Tensor) else size) or size_of(maps)
    maps = upsample(maps.nan_to_num(0), target)
    masks = regions if isinstance(regions, Tensor) else box_masks(regions, target, maps.device)
    inside, all_of_it = (maps * masks).sum((1, 2)), maps.sum((1, 2))
    share = inside / torch.where(all_of_it > 0, all_of_it, 1)
    below = maps.amin((1, 2)) < -ROUNDING * maps.abs().amax((1, 2))
    no_share = ~has_region(regions, maps.device) | below
    return share.masked_fill(no_share, torch.nan)


def rank_correlation(first: Float[Tensor, "B N"], second: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Return Spearman's rank correlation of each pair of rows, ties sharing their mean rank.

    NaN where a row is constant.
    """
    constant = (first == first[:, :1]).all(1) | (second == second[:, :1]).all(1)
    # Two columns at least: torchmetrics reads a single one as one list of values.
    pairs = (torch.cat([rows, rows[:1]]).mT for rows in (first, second))
    return spearman_corrcoef(*pairs)[: len(first)].masked_fill(constant, torch.nan).to(first.dtype)


def _near_mask(masks: Tensor, u: Tensor, v: Tensor, tolerance: float) -> Tensor:
    reach = int(tolerance)
    offsets = [
        (dx, dy)
        for dy in range(-reach, reach + 1)
        for dx in range(-reach, reach + 1)
        if dx * dx + dy * dy < tolerance * tolerance
    ]
    disc = torch.tensor(offsets, device=masks.device)
    x, y = u[:, None] + disc[:, 0], v[:, None] + disc[:, 1]
    height, width = masks.shape[-2:]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = (y * width + x).clamp(0, height * width - 1)
    return (masks.flatten(1).gather(1, index) & inside).any(1)


def _near_box(boxes: Sequence[Tensor], u: Tensor, v: Tensor, tolerance: float) -> Tensor:
    padded = pad_boxes(boxes, u.device)
    x0, y0, x1, y1 = padded.unbind(-1)
    u, v = u[:, None].to(padded), v[:, None].to(padded)
    dx = torch.maximum(x0 - u, u - (x1 - 1)).clamp(min=0)
    dy = torch.maximum(y0 - v, v - (y1 - 1)).clamp(min=0)
    real = (x1 > x0) & (y1 > y0)
    return ((dx * dx + dy * dy < tolerance * tolerance) & real).any(1)


def class_mean(
    hits: Real[Tensor, "*B K"], trials: Real[Tensor, "*B K"], unseen_as_zero: bool = False
) -> Float[Tensor, "*B"]:
    """Return the mean of hits / trials over the classes seen, or over all with the unseen as 0 (TorchRay)."""
    accuracy = hits / trials.clamp(min=1)
    seen = trials.shape[-1] if unseen_as_zero else (trials > 0).sum(-1)
    return accuracy.sum(-1) / seen


def _like(images: Tensor, baseline: Tensor) -> Tensor:
    if baseline.shape != images.shape:
        raise ValueError(
            f"baseline has shape {tuple(baseline.shape)}; it must be that of images, {tuple(images.shape)}."
        )
    return baseline


def _check_maps(maps: Tensor, count: int, size: tuple[int, int]) -> None:
    if tuple(maps.shape) != (count, *size):
        raise ValueError(
            f"maps must be (B, H, W) like the images, {(count, *size)}, got {tuple(maps.shape)}; resize them."
        )
