"""Fuse and smooth: calibration, weights, equation 2 and the final blur. Pure functions.

Source: Tursun et al., "SESS: Saliency Enhancing with Scaling and Sliding", ECCV 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sess_lightning.engine.windows import Plan, chunked
from sess_lightning.ops import ROUNDING, blur, full_precision, resize_matrix, size_of

Fusion: TypeAlias = Literal["mean", "max", "average"]
AnyFusion: TypeAlias = Fusion | Literal["coverage"]
CPU_BYTES, DEVICE_BYTES = 16 * 4 * 224 * 224, 2**28
"""How much of canvases to draw at a time: larger leaves a CPU's caches; an accelerator waits for its host."""


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


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def coverage_strips(plan: Plan, grid: tuple[int, int], device: torch.device) -> tuple[Strips, Strips]:
    """Return ``canvas_strips`` divided by the number of a scale's windows that cover a pixel, and of scales.

    The plain sum of maps drawn with them is, at each pixel, the mean over scales of the mean over the windows
    that cover it. The windows of a scale are all pairs of a row and a column, so that their number at a pixel
    is the product of one number per axis.
    """

    def shared(axis: int, strips: Strips, scales: int) -> Strips:
        distinct, _ = _positions(plan, axis)
        drawn = strips.matrices.sum(1)
        parts = [torch.stack([one for (s, _), one in zip(distinct, drawn, strict=True) if s == scale]).sum(0)
                 for scale, _ in distinct]  # fmt: skip
        return strips._replace(matrices=strips.matrices / (scales * torch.stack(parts)[:, None]))

    rows, columns = canvas_strips(plan, grid, device)
    with torch.no_grad():
        return shared(0, rows, len(plan.scales)), shared(1, columns, 1)


# Only a few are kept: those of a full-size grid are as large as a batch of images.
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def canvas_strips(plan: Plan, grid: tuple[int, int], device: torch.device) -> tuple[Strips, Strips]:
    """Return the matrices that put a map of ``grid`` on its scale's canvas and resize that: rows, columns.

    Calibration in the paper is: upsample the map to the window, put it on zeros as large as the scaled image,
    resize that to the image. All three are linear and separable, so they are one small matrix per axis.
    """

    def strips(axis: int) -> Strips:
        distinct, index = _positions(plan, axis)
        draw = resize_matrix(grid[axis], plan.window_size[axis], device)
        canvas = [resize_matrix(scale[axis], plan.size[axis], device) for scale in plan.scales]
        matrices = [(canvas[s][:, start : start + plan.window_size[axis]] @ draw).T for s, start in distinct]
        return Strips(torch.stack(matrices), torch.tensor(index, device=device))

    with torch.no_grad(), full_precision(device):
        return strips(0), strips(1)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def crop_strips(plan: Plan, antialias: bool, device: torch.device) -> tuple[Strips, Strips]:
    """Return the matrices that cut windows directly out of the unscaled image: rows, columns."""

    def strips(axis: int) -> Strips:
        distinct, index = _positions(plan, axis)
        scaled = [resize_matrix(plan.size[axis], scale[axis], device, antialias) for scale in plan.scales]
        matrices = [scaled[s][start : start + plan.window_size[axis]] for s, start in distinct]
        return Strips(torch.stack(matrices), torch.tensor(index, device=device))

    return strips(0), strips(1)


def crop(
    image: Float[Tensor, "C H W"], rows: Strips, columns: Strips, which: Int[Tensor, " K"]
) -> Float[Tensor, "K C h w"]:
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


def channel_weights(log_scores: Float[Tensor, "*B P"]) -> Float[Tensor, "*B P"]:
    """Return each window's score as a share of the best window's.

    Computed from log-scores: probabilities far below float32's range would give 0 / 0.
    """
    known = log_scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    best = known.amax(-1, keepdim=True).nan_to_num(neginf=0)
    return torch.exp(known - best)


def fuse_maps(
    maps: Float[Tensor, "B K h w"] | Iterator[Float[Tensor, "h w"]],
    weights: Float[Tensor, "B K"],
    plan: Plan,
    which: Int[Tensor, "B K"],
    *,
    theta: float = 0.0,
    fusion: AnyFusion = "mean",
) -> Float[Tensor, "B H W"]:
    """Fuse the maps of some windows of a plan; see ``fuse``.

    Args:
        maps: All of them; or a stream, image by image, of which no more than are drawn at a time are held.
        weights: Channel-wise weights, the best window's being 1.
        plan: Where the windows lie.
        which: The window each map belongs to.
        theta: As for ``fuse``.
        fusion: As for ``fuse``, or ``"coverage"``: per scale over the windows that cover a pixel, then over
            scales.
    """
    # Divided by coverage, maps are summed; "average" divides by their number, which min-max undoes.
    kind: Fusion = "average" if fusion == "coverage" else fusion
    strips_of = coverage_strips if fusion == "coverage" else canvas_strips
    most = canvases(plan.size, weights.device)
    if isinstance(maps, Tensor):
        strips = strips_of(plan, size_of(maps), weights.device)
        return fuse(
            maps.split(max(1, most // len(maps)), 1), weights, strips, which, theta=theta, fusion=kind
        )
    first = next(maps)
    strips, maps = strips_of(plan, size_of(first), weights.device), chain([first], maps)
    fused = []
    for weight, places in zip(weights.split(1), which.split(1), strict=True):
        parts = (part[None] for part in chunked(islice(maps, places.shape[1]), most))
        fused.append(fuse(parts, weight, strips, places, theta=theta, fusion=kind))
    return torch.cat(fused)


def fuse(
    parts: Iterable[Float[Tensor, "B _ h w"]],
    weights: Float[Tensor, "B K"],
    strips: tuple[Strips, Strips],
    which: Int[Tensor, "B K"],
    *,
    theta: float = 0.0,
    fusion: Fusion = "mean",
) -> Float[Tensor, "B H W"]:
    """Lay weighted maps where their windows were; take the mean (or the maximum) of what exceeds ``theta``.

    Equation 2 of the paper, before its min-max. A running sum and a count are all that is kept, whatever the
    number of windows. A map that is all zeros, or weighs nothing, neither adds nor counts; ``_votes`` says
    what does.

    Args:
        parts: Each image's maps, on the grid that ``strips`` were made for, some windows at a time; for as
            many there is a canvas of the images' size at a time (``canvases`` says how many are worth it).
        weights: Channel-wise weights, the best window's being 1.
        strips: From ``canvas_strips``.
        which: The window each map belongs to.
        theta: Threshold, as a fraction of the top weight; 0 stands for 1e-6 of each window's own weight.
        fusion: ``"mean"`` (the paper), ``"max"``, or ``"average"``: the sum over all windows divided by their
            number, also where they do not lie and whatever ``theta`` (Figure 9's comparison).
    """
    totals: list[Tensor] = []
    counts: list[Tensor] = []
    done = 0
    for part in parts:
        some = slice(done, done := done + part.shape[1])
        drawn = _drawn(part * weights[:, some, None, None], strips, which[:, some])
        if fusion != "average":
            votes = _votes(drawn, weights[:, some], theta)
            drawn = drawn.mul_(votes)
            counts = _merged([*counts, votes.sum(1)])
        totals = _merged([*totals, drawn.amax(1) if fusion == "max" else drawn.sum(1)], fusion == "max")
    if fusion == "max":
        return totals[0]
    return totals[0] / (counts[0].clamp(min=1) if counts else done)


def _merged(values: list[Tensor], highest: bool = False) -> list[Tensor]:
    """Return one or two tensors as one, in place: the sum, or the highest values."""
    first, *others = values
    for other in others:
        first = torch.maximum(first, other, out=first) if highest else first.add_(other)
    return [first]


def _drawn(
    maps: Float[Tensor, "B k h w"], strips: tuple[Strips, Strips], which: Int[Tensor, "B k"]
) -> Float[Tensor, "B k H W"]:
    """Lay each map where its window was, on a canvas of the image's size."""
    rows, columns = (one.matrices[one.strip_of[which]] for one in strips)
    with full_precision(maps.device):
        return rows.mT @ maps @ columns


def _votes(
    drawn: Float[Tensor, "B k H W"], weights: Float[Tensor, "B k"], theta: float
) -> Bool[Tensor, "B k H W"]:
    """Return which values of each window count.

    The paper counts what exceeds 0. Min-max puts a pixel of every map at exactly 0 and a rectified map has
    whole areas of zeros, so rounding alone would decide which of them count, and a pixel that moves to the
    other side changes its mean by up to a k-th for k windows. Values must therefore exceed 1e-6 of their own
    window's weight as well. On MobileNetV2 (6 photographs, 8 scales, 301,056 pixels) a CPU without AVX2 moved
    17 pixels by up to 0.02 when all above 0 counted, and moves none by more than 2e-6 now; 68 pixels differ
    by more than 1e-3 from counting above 0. Measured against the top weight instead, that would be 5,230
    pixels: windows with a low weight would lose their votes. No count that jumps is the same everywhere: at
    12 scales, 44 of a million pixels still move. One that rises from 0 to 1 over 1e-3 of the weight moves
    none by more than 5e-5, but differs from equation 2 by more than 1e-3 in 7 % of the pixels.
    """
    least = (ROUNDING * weights)[..., None, None]
    return drawn > (least.clamp(min=theta) if theta > 0 else least)


def canvases(size: tuple[int, int], device: torch.device) -> int:
    """Return how many canvases of ``size`` to draw at a time: what a CPU's caches hold, or plenty."""
    return max(1, (CPU_BYTES if device.type == "cpu" else DEVICE_BYTES) // (4 * size[0] * size[1]))


def smooth(maps: Float[Tensor, "B H W"], kernel_size: int = 11, sigma: float = 5.0) -> Float[Tensor, "B H W"]:
    """Blur the seams between windows.

    Args:
        maps: Fused saliency, any range.
        kernel_size: Side of the square Gaussian kernel, px, odd.
        sigma: Standard deviation of the kernel, px.

    Raises:
        ValueError: If ``kernel_size`` is even.

    Source: Tursun et al. 2022, section 3, "Smoothing".
    """
    return blur(maps, kernel_size, sigma)
