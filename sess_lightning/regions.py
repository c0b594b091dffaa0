"""Where the objects are: masks and boxes in the forms that people have, read as booleans and pixels.

The callback, the metrics and the evaluation share this reader. Numbers are never summed: a mask is read by a
convention that decides what its values mean, or it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from sess_lightning.ops import sent

Regions: TypeAlias = Tensor | Sequence[Tensor]
"""Masks (B, h, w), or boxes (N, 4) per image: half-open (x0, y0, x1, y1) px."""
Labels: TypeAlias = Tensor | Sequence[int]
"""Class index of each image."""

VOID = 255
"""The value of pixels without a class in segmentations."""
IGNORED = (VOID, -1, -100)
TRIMAP = (1, 2, 3)
"""Values of the Oxford pets: the pet, the background, the border between them."""
MATTES = ((0, 127, 255), (0, 128, 255))
"""Values of matting: the background, the unknown, the object."""
LEAST_ON_SLOPES, MOST_FLAT = 0.5, 0.01
"""Shares of a resized mask's in-between pixels: beside both a lower and a higher one, and beside neither.

Measured on an ellipse and a rectangle of 48 to 500 px resized to 41 to 224 px: 0.56 at least (Lanczos, whose
rings are no slopes), and none.
"""
OVERSHOOT = 0.25
"""How far bicubic and Lanczos resizing overshoot a mask's own values, as a fraction of them."""


def read_regions(
    regions: Any, *, size: tuple[int, int] | None = None, labels: Labels | None = None
) -> Bool[Tensor, "B h w"] | list[Float[Tensor, "_ 4"]]:
    """Read the masks or boxes of a batch.

    Boxes are a tensor (B, 4) or (B, N, 4), or per image a tensor (N, 4) or (4,); masks are (B, h, w),
    (B, 1, h, w), or per image (h, w) or (N, h, w). Masks of numbers are read by ``read_masks``. Lists may
    also hold arrays, lists of numbers, and None for an image without regions.

    Args:
        regions: Masks or boxes.
        size: (height, width) of the images: distinguishes a mask that is 4 px wide from boxes.
        labels: Each image's class, to read masks of class indices.

    Raises:
        ValueError: If they are neither, or if nothing decides what a mask's values mean.
    """
    if isinstance(regions, Tensor):
        boxes = regions.ndim == 2 or (regions.ndim == 3 and _are_boxes(regions[0], size))
    else:
        regions = [as_tensor(region) for region in regions]
        boxes = all(region is None or _are_boxes(region, size) for region in regions)
    return read_boxes(regions) if boxes else read_masks(regions, labels)


def as_tensor(region: Any) -> Any:
    """Return an image's regions as a tensor; None for an image without any."""
    return region if region is None or isinstance(region, Tensor) else torch.as_tensor(region, device="cpu")


def _are_boxes(region: Tensor, size: tuple[int, int] | None) -> bool:
    if region.dtype == torch.bool or region.ndim > 2:
        return False
    return region.numel() == 0 or (region.shape[-1] == 4 and tuple(region.shape) != size)


def read_boxes(boxes: Any) -> list[Float[Tensor, "_ 4"]]:
    """Read the boxes of a batch: a tensor (B, 4) or (B, N, 4), or one tensor per image.

    The format of torchvision's ``BoundingBoxes`` is respected.

    Raises:
        ValueError: If an image's boxes are not (N, 4).
    """
    rows = list(_corners(boxes)) if isinstance(boxes, Tensor) else [_corners(of_image) for of_image in boxes]
    rows = [of_image.reshape(-1, 4) if of_image.numel() in (0, 4) else of_image for of_image in rows]
    _check_box_shapes(rows)
    return rows


def _corners(boxes: Any) -> Tensor:
    # BoundingBoxes lose their format when they are indexed or stacked.
    form = getattr(getattr(boxes, "format", None), "value", "XYXY")
    plain: Tensor = as_tensor([] if boxes is None else boxes).as_subclass(Tensor).float()
    return plain if form == "XYXY" else convert_boxes(plain, form)  # Their shape is checked later.


def convert_boxes(boxes: Float[Tensor, "*B 4"], form: str) -> Float[Tensor, "*B 4"]:
    """Return boxes as (x0, y0, x1, y1); ``form`` is torchvision's name, such as ``"XYWH"``."""
    if form == "XYXY":
        return boxes
    from torchvision.ops import box_convert

    converted: Tensor = box_convert(boxes, form.lower(), "xyxy")
    return converted


def _check_box_shapes(boxes: Sequence[Tensor]) -> None:
    for of_image in boxes:
        if of_image.ndim != 2 or of_image.shape[1] != 4:
            raise ValueError(
                f"boxes must be (N, 4) per image, (x0, y0, x1, y1), got {tuple(of_image.shape)}."
            )


PIXELS = (
    "boxes are (x0, y0, x1, y1) in pixels of the images as the model takes them: convert from (x, y, w, h) "
    "or from shares, and resize them with the images."
)
"""What boxes of a batch have to be."""


def check_boxes(boxes: Sequence[Float[Tensor, "_ 4"]], size: tuple[int, int], remedy: str = PIXELS) -> None:
    """Refuse boxes that are inverted, reach beyond the image, or look like fractions of its sides.

    Rows of zeros and of -1 are padding.

    Args:
        boxes: The boxes of each image. Their values are read: call this on the host.
        size: (height, width) of the image they refer to, px.
        remedy: The remedy to name in the error.

    Raises:
        ValueError: Naming the first such box.
    """
    height, width = size
    for i, rows in enumerate(boxes):
        for x0, y0, x1, y1 in rows.tolist():
            if (x0, y0, x1, y1) == (-1, -1, -1, -1):
                continue
            if not (0 <= x0 <= x1 <= width + 1 and 0 <= y0 <= y1 <= height + 1):
                raise ValueError(
                    f"boxes: ({x0:g}, {y0:g}, {x1:g}, {y1:g}) of image {i} does not lie in the "
                    f"{height}x{width} image; {remedy}"
                )
    _refuse_fractions(boxes, size, remedy)


def checked(regions: Regions, size: tuple[int, int]) -> Regions:
    """Return regions; refuse boxes of another form, where reading them waits for no device.

    Unlike ``check_boxes``, it lets boxes reach beyond the image, as some of data sets do.

    Raises:
        ValueError: If a box is inverted, or all look like fractions of the sides.
    """
    if isinstance(regions, Tensor) or not all(rows.is_cpu for rows in regions):
        return regions
    for i, rows in enumerate(regions):
        for x0, y0, x1, y1 in rows.tolist():
            if x1 < x0 or y1 < y0:
                raise ValueError(
                    f"boxes: ({x0:g}, {y0:g}, {x1:g}, {y1:g}) of image {i} is inverted; {PIXELS}"
                )
    if not all((rows == rows.round()).all() for rows in regions):  # A box may be a single pixel.
        _refuse_fractions(regions, size, PIXELS)
    return regions


def _refuse_fractions(boxes: Sequence[Tensor], size: tuple[int, int], remedy: str) -> None:
    height, width = size
    filled = [row for rows in boxes for row in rows.tolist() if row[2] > row[0] and row[3] > row[1]]
    if filled and max(map(max, filled)) <= 1:
        x0, y0, x1, y1 = filled[0]
        raise ValueError(
            f"boxes: ({x0:g}, {y0:g}, {x1:g}, {y1:g}) and all others lie within one pixel, like fractions of "
            f"the {height}x{width} image's sides; {remedy}"
        )


def read_masks(masks: Any, labels: Labels | None = None) -> Bool[Tensor, "B h w"]:
    """Read masks of any numbers as booleans.

    Conventions decide for 0 and one other value (beside them, 255, -1 and -100 mark pixels without a class),
    mattes (0, 128, 255), trimaps (1, 2, 3), class indices where each image contains its label's, and all of
    these divided by 255. Masks that were resized with interpolation are read at one half.

    Args:
        masks: A tensor (B, h, w) or (B, 1, h, w), or per image one (h, w) or (N, h, w). Several channels must
            agree, or only one may hold anything; the N masks of one image in a list are its objects'.
        labels: Each image's class, to read class indices.

    Raises:
        ValueError: If no convention decides.
    """
    if isinstance(masks, Tensor):
        stacked = masks.as_subclass(Tensor)
    else:
        masks = [None if mask is None else _union(mask.as_subclass(Tensor)) for mask in map(as_tensor, masks)]
        given = [mask for mask in masks if mask is not None]
        sizes = {tuple(mask.shape) for mask in given}
        if len(sizes) != 1:
            raise ValueError(f"masks have the sizes {sorted(sizes)}; resize them to one, or give boxes.")
        stacked = torch.stack([torch.zeros_like(given[0]) if mask is None else mask for mask in masks])
    if stacked.ndim == 4:
        stacked = _one_channel(stacked)
    if stacked.ndim != 3:
        raise ValueError(f"masks must be (B, h, w), got {tuple(stacked.shape)}; give one mask per image.")
    if stacked.dtype == torch.bool or stacked.is_meta:
        return stacked.bool()
    return _as_bool(stacked, labels)


def _union(mask: Tensor) -> Tensor:
    if mask.ndim <= 2:
        return mask
    return mask.flatten(0, -3).amax(0) if mask.numel() else mask.new_zeros(mask.shape[-2:])  # No object.


def _one_channel(masks: Real[Tensor, "B K h w"] | Bool[Tensor, "B K h w"]) -> Tensor:
    if masks.shape[1] == 1 or (masks == masks[:, :1]).all():
        return masks[:, 0]
    if (masks != 0).flatten(2).any(2).sum(1).amax() <= 1:
        return masks.flatten(1, -3).amax(1)
    raise ValueError(
        f"masks are {tuple(masks.shape)}, and several channels hold something: nothing says whether these "
        "are objects or classes. Give masks.any(1) for objects, masks[range(len(labels)), labels] for "
        "classes."
    )


def _as_bool(masks: Real[Tensor, "B h w"], labels: Labels | None) -> Bool[Tensor, "B h w"]:
    values = masks.to(torch.float32)
    if not values.isfinite().all():
        raise ValueError("masks hold NaN or infinity; give bool masks, True on the object.")
    scaled = values * VOID
    if masks.is_floating_point() and values.amin() >= 0 and values.amax() <= 1:
        whole = scaled.round()
        # ToTensor divides by 255: 1/255 stands for 1, and 254/255 is not a yes.
        if (scaled - whole).abs().amax() < 1e-3 and not _is_binary(values):
            values = whole
    if _is_binary(values):
        return values > 0
    return _by_convention(values, values.unique(), labels)


def _is_binary(values: Tensor) -> bool:
    """Return whether a mask holds only 0 and one positive value, or only one of 0, 1 and 255."""
    top = values.amax()
    two_valued = ((values == 0) | (values == top)).all() and top >= 0
    return bool(two_valued and ((values == 0).any() or top in (1, VOID)))


def _by_convention(values: Tensor, named: Tensor, labels: Labels | None) -> Bool[Tensor, "B h w"]:
    present = tuple(named.tolist())
    if present == TRIMAP:
        return values == TRIMAP[0]
    if present in MATTES:
        return values == VOID
    classes: list[float] = [value for value in present if value not in (0, *IGNORED)]
    if all(value > 0 and value.is_integer() for value in classes):
        # One value beside 0 and void; in a resized 0/255 mask, no in-between value fills a block of pixels.
        if len(classes) == 1 and 0 in present and (classes[0] == 1 or _fills(values == classes[0])):
            return values == classes[0]
        if labels is not None and not _is_resized(values) and _are_classes(values, labels):
            return _labelled(values, labels)
    if _is_resized(values):
        return values > _top(values) / 2
    raise _undecided(named)


def _fills(mask: Bool[Tensor, "B h w"]) -> bool:
    """Return whether a mask contains a block of 3 x 3 px."""
    return bool((F.avg_pool2d(mask[:, None].float(), 3, 1) == 1).any())


def _labelled(values: Tensor, labels: Labels) -> Tensor:
    labelled: Tensor = values == torch.as_tensor(labels).to(values).view(-1, 1, 1)
    return labelled


def _are_classes(values: Tensor, labels: Labels) -> bool:
    """Return whether every image holds its label's index; indices counted up from 1 may be objects'."""
    counted_up = True
    for mask, label in zip(values, torch.as_tensor(labels).tolist(), strict=True):
        here = [int(value) for value in mask.unique().tolist() if value not in (0, *IGNORED)]
        if label <= 0 or (here and label not in here):
            return False
        counted_up &= here == list(range(1, len(here) + 1))
    return not counted_up and _fills(_labelled(values, labels))


def _is_resized(values: Float[Tensor, "B h w"]) -> bool:
    """Return whether values between no and yes are on a slope between them, as interpolation makes it."""
    top = _top(values)
    nearly = (1 - OVERSHOOT) * top
    if not -OVERSHOOT * top <= values.amin() <= nearly <= values.amax() <= (1 + OVERSHOOT) * top:
        return False
    between = (values > 0) & (values < nearly)
    higher = F.max_pool2d(values[:, None], 3, 1, 1)[:, 0] > values
    lower = -F.max_pool2d(-values[:, None], 3, 1, 1)[:, 0] < values
    on_slopes, flat = (higher & lower & between).sum(), (~higher & ~lower & between).sum()
    count = between.sum().clamp(min=1)
    return bool((on_slopes >= LEAST_ON_SLOPES * count) & (flat <= MOST_FLAT * count))


def _top(values: Tensor) -> float:
    """Return the value of a yes: 1 or 255."""
    return 1.0 if values.amax() <= 1 + OVERSHOOT else float(VOID)


def _undecided(named: Tensor) -> ValueError:
    shown = ", ".join(f"{value:g}" for value in named[:6].tolist()) + (", ..." if len(named) > 6 else "")
    return ValueError(
        f"masks hold the values {shown}: no convention says which of them are the object. Give bool masks, "
        "True on the object, such as masks == value, or masks == labels[:, None, None] for class indices."
    )


def box_masks(
    boxes: Sequence[Float[Tensor, "_ 4"]], size: tuple[int, int], device: torch.device
) -> Bool[Tensor, "B H W"]:
    """Return which pixels have their centre in one of their image's boxes (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = pad_boxes(boxes, device).unsqueeze(-1).unbind(-2)
    y, x = (_centres(n, device) for n in size)
    rows, columns = (y0 <= y) & (y < y1), (x0 <= x) & (x < x1)
    return rows.float().mT @ columns.float() > 0


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _centres(count: int, device: torch.device) -> Float[Tensor, " N"]:
    return torch.arange(count, device=device, dtype=torch.float32) + 0.5


def pad_boxes(boxes: Sequence[Float[Tensor, "_ 4"]], device: torch.device) -> Float[Tensor, "B N 4"]:
    """Return boxes as one tensor, with short lists filled up by empty boxes.

    Raises:
        ValueError: If an entry is not (N, 4).
    """
    _check_box_shapes(boxes)
    rows = [of_image.to(device, torch.float32) for of_image in boxes]
    if len(set(map(len, rows))) == 1:
        return torch.stack(rows)
    rows.append(torch.zeros(1, 4, device=device))
    return torch.cat(rows)[_padding(tuple(map(len, boxes)), device)]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _padding(counts: tuple[int, ...], device: torch.device) -> Int[Tensor, "B N"]:
    """Return where in the rows of all images each image's rows are; the row behind them all fills up."""
    most, ends = max(counts, default=0), [*accumulate(counts)]
    filled = [
        [*range(end - count, end), *[sum(counts)] * (most - count)]
        for count, end in zip(counts, ends, strict=True)
    ]
    return sent(filled, device).reshape(len(counts), most)


def has_region(regions: Regions, device: torch.device) -> Bool[Tensor, " B"]:
    """Return which images have a region at all, from masks or boxes as read; the others are not counted."""
    if isinstance(regions, Tensor):
        return regions.bool().flatten(1).any(1)
    return have_areas(pad_boxes(regions, device)).any(1)


def have_areas(boxes: Float[Tensor, "*B 4"]) -> Bool[Tensor, "*B"]:
    """Return which boxes are not empty."""
    start, end = boxes.split(2, -1)
    filled: Tensor = (end > start).all(-1)
    return filled


def describe_regions(regions: Regions | None) -> str:
    """Describe the regions by their kind and the median size: ``"boxes 20 x 20 px"``.

    The median shows at a glance what cannot be proven, such as boxes that were meant as (x, y, w, h). Reads
    values: call this on the host.
    """
    if regions is None:
        return "no boxes or masks"
    if isinstance(regions, Tensor):
        covered = regions.flatten(1).float().mean(1)
        if not (covered > 0).any():
            return "empty masks"
        return f"masks over {covered[covered > 0].median():.0%} of the image"
    boxes = torch.cat([*(of_image.cpu() for of_image in regions), torch.zeros(0, 4)])
    boxes = boxes[have_areas(boxes)]
    if not len(boxes):
        return "no box with an area"
    width, height = (boxes[:, 2:] - boxes[:, :2]).median(0).values.tolist()
    return f"boxes {width:.3g} x {height:.3g} px"
