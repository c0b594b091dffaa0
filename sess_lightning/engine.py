"""SESS in the paper's order: scale, slide, pre-filter, fuse, smooth. Pure functions.

Source: Tursun et al., "SESS: Saliency Enhancing with Scaling and Sliding", ECCV 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from sess_lightning.batching import stacked
from sess_lightning.ops import blur, full_precision, resize, resize_matrix

Fusion: TypeAlias = Literal["mean", "max", "average"]


class Plan(NamedTuple):
    """Where every window lies; follows from the image's size and the hyper-parameters alone.

    Attributes:
        size: (height, width) of the image.
        window: Side of a window, px.
        scales: (height, width) of each scaled image.
        boxes: Per scale, the windows' (x0, y0, x1, y1), half-open.
    """

    size: tuple[int, int]
    window: int
    scales: tuple[tuple[int, int], ...]
    boxes: tuple[tuple[tuple[int, int, int, int], ...], ...]

    def __len__(self) -> int:
        return sum(map(len, self.boxes))

    def first(self, scales: int) -> Plan:
        """Return the part that the first ``scales`` are; its windows come first in the whole as well."""
        return Plan(self.size, self.window, self.scales[:scales], self.boxes[:scales])


def scale_sides(window: int, num_scales: int) -> list[int]:
    """Return the shorter sides the paper uses: 224, 288, ..., in proportion for other windows.

    Raises:
        ValueError: If ``num_scales`` is below 1.
    """
    if num_scales < 1:
        raise ValueError(f"SESS: num_scales must be at least 1, got {num_scales}.")
    return [window + round(64 * window / 224) * i for i in range(num_scales)]


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return (height, width) once the shorter side is ``short_side``; the longer one is floored."""
    if height <= width:
        return short_side, short_side * width // height
    return short_side * height // width, short_side


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along one axis; the last is pulled inside the border."""
    return [*range(0, length - window, stride), length - window]


def window_boxes(height: int, width: int, window: int, stride: int) -> Int[Tensor, "P 4"]:
    """Return all windows of an image, row by row, as (x0, y0, x1, y1), half-open.

    Raises:
        ValueError: If a window does not fit the image, or the stride would leave gaps.
    """
    return torch.tensor(_boxes(height, width, window, stride))


def _boxes(height: int, width: int, window: int, stride: int) -> tuple[tuple[int, int, int, int], ...]:
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(
            f"SESS: stride {stride} with window {window}; use a window >= 1 and 1 <= stride <= window, "
            "or the windows do not cover the image."
        )
    if window > min(height, width):
        raise ValueError(
            f"SESS: window {window} exceeds the {height}x{width} scaled image; use scales >= window."
        )
    return tuple(
        (x, y, x + window, y + window)
        for y in window_starts(height, window, stride)
        for x in window_starts(width, window, stride)
    )


@lru_cache(maxsize=256)
def plan_windows(size: tuple[int, int], window: int, stride: int, sides: tuple[int, ...]) -> Plan:
    """Lay windows over every scale of an image of ``size``.

    Raises:
        ValueError: If a window does not fit a scale, or the stride would leave gaps.
    """
    scales = tuple(scaled_size(*size, side) for side in sides)
    return Plan(size, window, scales, tuple(_boxes(*scale, window, stride) for scale in scales))


@lru_cache(maxsize=256)
def shrunk(plan: Plan, window: int) -> Plan:
    """Return the plan of the same windows, each drawn ``window`` px large; borders rounded to whole px."""
    factor = window / plan.window

    def length(side: int) -> int:
        return max(window, round(side * factor))

    def start(place: int, side: int) -> int:
        return min(round(place * factor), length(side) - window)

    starts = [
        [(start(x0, width), start(y0, height)) for x0, y0, _, _ in boxes]
        for (height, width), boxes in zip(plan.scales, plan.boxes, strict=True)
    ]
    return Plan(
        plan.size,
        window,
        tuple((length(height), length(width)) for height, width in plan.scales),
        tuple(tuple((x, y, x + window, y + window) for x, y in each) for each in starts),
    )


def windows(
    images: Float[Tensor, "B C H W"], plan: Plan, antialias: bool = True
) -> Iterator[Float[Tensor, "C w w"]]:
    """Yield the windows image by image, scale by scale, row by row; only one scaled image lives at a time."""
    for image in images:
        for scale, boxes in zip(plan.scales, plan.boxes, strict=True):
            scaled = resize(image[None], scale, antialias)[0]
            for x0, y0, x1, y1 in boxes:
                yield scaled[:, y0:y1, x0:x1]


def chunked(items: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """Stack what comes into full batches of ``chunk``; the last one may be smaller."""
    items = iter(items)
    for item in items:
        yield stacked([item, *islice(items, chunk - 1)])


class Strips(NamedTuple):
    """The rows of one axis that each window touches, for every distinct window position on that axis.

    Windows share positions (all windows of a row begin at the same y), so there are far fewer strips than
    windows, and a window is a pair of strip numbers. Numbers may come from the device: nothing is read back.

    Attributes:
        matrices: For each position, what maps a window's axis to the image's (or back).
        strip_of: For each window of the plan, its strip.
    """

    matrices: Float[Tensor, "S w n"]
    strip_of: Int[Tensor, " P"]


def _positions(plan: Plan, axis: int) -> tuple[list[tuple[int, int]], list[int]]:
    start = 1 - axis  # Boxes are (x0, y0, ...), sizes are (height, width).
    where = [(scale, box[start]) for scale, boxes in enumerate(plan.boxes) for box in boxes]
    distinct = sorted(set(where))
    number = {position: i for i, position in enumerate(distinct)}
    return distinct, [number[position] for position in where]


# Few are kept: those of a full-size grid are the size of a batch of images.
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def canvas_strips(plan: Plan, grid: tuple[int, int], device: torch.device) -> tuple[Strips, Strips]:
    """Return what lays a map of ``grid`` on its scale's canvas and resizes that to the image: rows, columns.

    Calibration in the paper is: upsample the map to the window, put it on zeros as large as the scaled image,
    resize that to the image. All three are linear and separable, so they are one small matrix per axis.
    """

    def strips(axis: int) -> Strips:
        distinct, index = _positions(plan, axis)
        draw = resize_matrix(grid[axis], plan.window, device)
        canvas = [resize_matrix(scale[axis], plan.size[axis], device) for scale in plan.scales]
        matrices = [(canvas[s][:, start : start + plan.window] @ draw).T for s, start in distinct]
        return Strips(torch.stack(matrices), torch.tensor(index, device=device))

    with torch.no_grad(), full_precision(device):
        return strips(0), strips(1)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def crop_strips(plan: Plan, antialias: bool, device: torch.device) -> tuple[Strips, Strips]:
    """Return what cuts windows straight out of the unscaled image: rows, columns."""

    def strips(axis: int) -> Strips:
        distinct, index = _positions(plan, axis)
        scaled = [resize_matrix(plan.size[axis], scale[axis], device, antialias) for scale in plan.scales]
        matrices = [scaled[s][start : start + plan.window] for s, start in distinct]
        return Strips(torch.stack(matrices), torch.tensor(index, device=device))

    return strips(0), strips(1)


def crop(
    image: Float[Tensor, "C H W"], rows: Strips, columns: Strips, which: Int[Tensor, " K"]
) -> Float[Tensor, "K C w w"]:
    """Cut windows ``which`` out of an image; their numbers may live on the device.

    Agrees with ``windows`` to the rounding of the resize kernel.
    """
    with full_precision(image.device):
        cut = rows.matrices[rows.strip_of[which]][:, None] @ image.to(torch.float32)
        return (cut @ columns.matrices[columns.strip_of[which]][:, None].mT).to(image.dtype)


def window_means(maps: Float[Tensor, "B H W"], rows: Strips, columns: Strips) -> Float[Tensor, "B P"]:
    """Return the mean of each map over each window that ``crop`` would cut out of it."""
    with full_precision(maps.device):
        across = rows.matrices.mean(1)[rows.strip_of] @ maps
        return (across * columns.matrices.mean(1)[columns.strip_of]).sum(-1)


def descent(plan: Plan, share: float) -> tuple[int, int]:
    """Return how many scales are scored whole, and how many windows of the others, if ``share`` of all are.

    At least the first scale, and as many more as take three fifths of those windows; scales rise.
    """
    total, counts = max(1, round(share * len(plan))), [*accumulate(map(len, plan.boxes))]
    if total == counts[-1]:
        return len(counts), 0
    scales = max(1, sum(count <= 0.6 * total for count in counts))
    return scales, max(0, total - counts[scales - 1])


def kept_count(count: int, ratio: float) -> int:
    """Return how many of ``count`` windows the pre-filter keeps, in Python floats as the authors do.

    Raises:
        ValueError: If ``ratio`` is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"SESS: prefilter_ratio must be in [0, 1), got {ratio}.")
    return count - int(count * ratio)


def prefilter(scores: Float[Tensor, "*B P"], ratio: float) -> Int[Tensor, "*B K"]:
    """Return the numbers of the windows with the highest scores; ties keep the earlier window.

    Args:
        scores: Scores or log-scores; NaN ranks last.
        ratio: Share of windows to drop, in [0, 1).
    """
    return ranked(scores)[..., : kept_count(scores.shape[-1], ratio)]


def ranked(scores: Float[Tensor, "*B P"]) -> Int[Tensor, "*B P"]:
    """Return the numbers of the windows by falling score; of equal ones the earlier first, NaN last."""
    known = torch.where(scores.isnan(), -torch.inf, scores)
    return known.sort(dim=-1, descending=True, stable=True).indices


def channel_weights(log_scores: Float[Tensor, "*B P"]) -> Float[Tensor, "*B P"]:
    """Return each window's score as a share of the best window's.

    Taken from log-scores: probabilities far below float32's range would end in 0 / 0.
    """
    known = torch.where(log_scores.isnan(), -torch.inf, log_scores)
    best = known.amax(-1, keepdim=True)
    return torch.exp(known - torch.where(best.isneginf(), 0, best))


def fuse(
    maps: Iterable[Float[Tensor, "h w"]],
    weights: Float[Tensor, " K"],
    strips: tuple[Strips, Strips],
    which: Int[Tensor, " K"],
    *,
    theta: float = 0.0,
    fusion: Fusion = "mean",
    chunk: int = 16,
) -> Float[Tensor, "H W"]:
    """Lay weighted maps where their windows were; take the mean (or the maximum) of what exceeds ``theta``.

    Equation 2 of the paper, before its min-max. A running sum and a count are all that is kept, whatever the
    number of windows. A map that is all zeros, or weighs nothing, neither adds nor counts.

    Args:
        maps: One map per window, on the grid that ``strips`` were made for: a tensor (K, h, w), or a stream.
        weights: Channel-wise weights, the best window's being 1.
        strips: From ``canvas_strips``.
        which: The window each map belongs to.
        theta: Threshold, as a fraction of the top weight.
        fusion: ``"mean"`` (the paper), ``"max"``, or ``"average"``: the sum over all windows divided by their
            number, also where they do not lie and whatever ``theta`` (Figure 9's comparison).
        chunk: How many canvases exist at a time.
    """
    rows, columns = strips
    size = rows.matrices.shape[-1], columns.matrices.shape[-1]
    total = weights.new_zeros(size, dtype=torch.float32)
    count = torch.zeros_like(total)
    parts = zip(chunked(maps, chunk), weights.split(chunk), which.split(chunk), strict=True)
    for part, weight, window in parts:
        with full_precision(total.device):
            weighted = part.to(torch.float32) * weight[:, None, None]
            drawn = (
                rows.matrices[rows.strip_of[window]].mT
                @ weighted
                @ columns.matrices[columns.strip_of[window]]
            )
        voting = drawn if fusion == "average" else F.threshold(drawn, theta, 0, inplace=True)
        if fusion == "max":
            total = torch.maximum(total, voting.amax(0))
        else:
            total += voting.sum(0)
            count += len(part) if fusion == "average" else voting.ne_(0).sum(0)
    return total if fusion == "max" else total / count.clamp(min=1)


def smooth(maps: Float[Tensor, "B H W"], kernel_size: int = 11, sigma: float = 5.0) -> Float[Tensor, "B H W"]:
    """Blur away the seams that windows leave behind.

    Args:
        maps: Fused saliency, any range.
        kernel_size: Side of the square Gaussian kernel, px, odd.
        sigma: Standard deviation of the kernel, px.

    Raises:
        ValueError: If ``kernel_size`` is even.

    Source: Tursun et al. 2022, section 3, "Smoothing".
    """
    return blur(maps, kernel_size, sigma)


def sides_of(scales: Sequence[int] | None, window: int, num_scales: int) -> tuple[int, ...]:
    """Return the shorter sides: those given, else the paper's ``num_scales``.

    Raises:
        ValueError: If there is none.
    """
    if scales is not None and not scales:
        raise ValueError("SESS: scales is empty; give at least one shorter side in px, e.g. scales=(224,).")
    return tuple(scales) if scales is not None else tuple(scale_sides(window, num_scales))
