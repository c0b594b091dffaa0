"""Scale and slide: the sizes of scales, the places of windows, cutting and ranking them.

Source: Tursun et al., "SESS: Saliency Enhancing with Scaling and Sliding", ECCV 2022, section 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, islice
from typing import NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sess_lightning.batching import stacked
from sess_lightning.ops import resize

Box: TypeAlias = tuple[int, int, int, int]
WindowSize: TypeAlias = int | tuple[int, int]
"""(height, width), or the side of a square, px."""


class Plan(NamedTuple):
    """The places of all windows; they follow from the image's size and the hyper-parameters alone.

    Attributes:
        size: (height, width) of the image.
        window_size: (height, width) of a window, px.
        scales: (height, width) of each scaled image.
        boxes: Per scale, the windows' (x0, y0, x1, y1), half-open.
    """

    size: tuple[int, int]
    window_size: tuple[int, int]
    scales: tuple[tuple[int, int], ...]
    boxes: tuple[tuple[Box, ...], ...]

    def __len__(self) -> int:
        return sum(map(len, self.boxes))

    @property
    def window(self) -> int:
        """The shorter side of a window, px."""
        return min(self.window_size)

    @property
    def begins_whole(self) -> bool:
        """Whether the first window is the whole image, though it may have been resized."""
        return self.scales[0] == self.window_size

    def first(self, scales: int) -> Plan:
        """Return the plan of the first ``scales`` only; its windows come first in the whole plan, too."""
        return Plan(self.size, self.window_size, self.scales[:scales], self.boxes[:scales])


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


def least_side(size: tuple[int, int], window: tuple[int, int]) -> int:
    """Return the shorter side of the smallest scale that holds a window.

    Where window and image have one shape, that is the window's own.

    Args:
        size: (height, width) of the image.
        window: (height, width) of the window.
    """
    short = min(window)
    while any(side < least for side, least in zip(scaled_size(*size, short), window, strict=True)):
        short += 1
    return short


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the starts of windows along one axis; the last is pulled inside the border."""
    return [*range(0, length - window, stride), length - window]


def window_boxes(height: int, width: int, window: WindowSize, stride: WindowSize) -> Int[Tensor, "P 4"]:
    """Return all windows of an image, row by row, as (x0, y0, x1, y1), half-open.

    Args:
        height: Height of the image, px.
        width: Width of the image, px.
        window: (height, width), or the side of a square, px.
        stride: Likewise.

    Raises:
        ValueError: If a window does not fit the image, or the stride would leave gaps.
    """
    return torch.tensor(_boxes((height, width), both_sides(window), both_sides(stride)))


def both_sides(size: WindowSize) -> tuple[int, int]:
    """Return (height, width); a single number is the side of a square."""
    return (size, size) if isinstance(size, int) else size


def _in_words(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _boxes(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]) -> tuple[Box, ...]:
    sides = [*zip(size, window, stride, strict=True)]
    if not all(side >= 1 and 1 <= step <= side for _, side, step in sides):
        raise ValueError(
            f"SESS: stride {_in_words(stride)} with window {_in_words(window)}; use a window >= 1 and 1 <= "
            "stride <= window, or the windows do not cover the image."
        )
    if any(side > length for length, side, _ in sides):
        raise ValueError(
            f"SESS: window {_in_words(window)} exceeds the {size[0]}x{size[1]} scaled image; use scales >= "
            "window."
        )
    rows, columns = (window_starts(*one) for one in sides)
    return tuple((x, y, x + window[1], y + window[0]) for y in rows for x in columns)


@lru_cache(maxsize=256)
def plan_windows(
    size: tuple[int, int], window: WindowSize, stride: WindowSize, sides: tuple[int, ...]
) -> Plan:
    """Lay windows over every scale of an image of ``size``.

    Args:
        size: (height, width) of the image, px.
        window: (height, width), or the side of a square, px.
        stride: Likewise.
        sides: The scales' shorter sides, px.

    Raises:
        ValueError: If a window does not fit a scale, or the stride would leave gaps.
    """
    window, stride = both_sides(window), both_sides(stride)
    scales = tuple(scaled_size(*size, side) for side in sides)
    return Plan(size, window, scales, tuple(_boxes(scale, window, stride) for scale in scales))


def windows(
    images: Float[Tensor, "B C H W"], plan: Plan, antialias: bool = True
) -> Iterator[Float[Tensor, "C h w"]]:
    """Yield the windows image by image, scale by scale, row by row; only one scaled image lives at a time."""
    for image in images.split(1):
        for scale, boxes in zip(plan.scales, plan.boxes, strict=True):
            yield from _views(resize(image, scale, antialias), boxes)


def _views(image: Float[Tensor, "1 C _ _"], boxes: Sequence[Box]) -> list[Float[Tensor, "C h w"]]:
    return [image[0, :, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]


class WindowStream:
    """All windows of images, cut on demand and dropped when later ones are cut.

    On a CPU each image is scaled by itself and windows are views until they are batched. An accelerator waits
    for its host rather than for memory: there, a scale's windows of several images are cut by one kernel, so
    that they stream scale by scale within such a group of images.

    Args:
        images: The images to cut.
        plan: The places of the windows.
        antialias: Antialias when a scale is smaller than the image.
        limit: Windows in a batch; of a scale no more than twice as many are cut at a time, or one image's.
        together: Whether to cut a scale's windows by one kernel; None does on an accelerator.
    """

    def __init__(
        self,
        images: Float[Tensor, "B C H W"],
        plan: Plan,
        antialias: bool = True,
        limit: int = 1,
        together: bool | None = None,
    ) -> None:
        self._images, self._plan = images, plan
        self._together = not images.is_cpu if together is None else together
        self._group = max(1, 2 * limit // max(map(len, plan.boxes))) if self._together else 1
        self._source = _blocks(images, plan, antialias, self._group, self._together)
        self._end = 0
        self._held: deque[tuple[int, Sequence[Tensor] | Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._images) * len(self._plan)

    def take(self, which: slice) -> Float[Tensor, "K C h w"]:
        """Return a batch of windows, channels last, that the caller may write to.

        Windows before the beginning of ``which`` are no longer available afterwards.
        """
        while self._end < min(which.stop, len(self)):
            block = next(self._source)
            self._held.append((self._end, block))
            self._end += len(block)
        while self._held[0][0] + len(self._held[0][1]) <= which.start:
            self._held.popleft()
        parts = [
            block[max(0, which.start - begin) : which.stop - begin]
            for begin, block in self._held
            if begin < which.stop
        ]
        if self._together:
            return torch.cat(cast(list[Tensor], parts))
        return stacked([*chain.from_iterable(parts)])

    def spread(self, values: Shaped[Tensor, " B"]) -> Shaped[Tensor, " N"]:
        """Return each window's value, in the stream's order, from one value per image."""
        return values[self._order[0]] if len(self._images) > 1 else values.expand(len(self))

    def gathered(self, values: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "B P ..."]:
        """Return windows' results in the stream's order by image and in the plan's order."""
        # A single image's windows stream in the plan's order.
        values = values[self._order[1]] if len(self._images) > 1 else values
        in_order: Tensor = values.unflatten(0, (-1, len(self._plan)))
        return in_order

    @property
    def _order(self) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        counts = tuple(map(len, self._plan.boxes))
        return _stream_order(len(self._images), counts, self._group, self._images.device)


# No method: a generator that holds its owner is freed by the garbage collector only, and its images with it.
def _blocks(
    images: Tensor, plan: Plan, antialias: bool, group: int, together: bool
) -> Iterator[Sequence[Tensor] | Tensor]:
    for part in images.split(group):
        for scale, boxes in zip(plan.scales, plan.boxes, strict=True):
            scaled = resize(part, scale, antialias)
            if not together:
                yield _views(scaled, boxes)
                continue
            rows, columns = (_pixels(boxes, axis, scaled.device) for axis in (1, 0))
            cut = scaled.permute(0, 2, 3, 1)[:, rows[:, None, :, None], columns[:, None]]
            yield cut.flatten(0, 2).permute(0, 3, 1, 2)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _pixels(boxes: tuple[Box, ...], axis: int, device: torch.device) -> Int[Tensor, "S w"]:
    """Return the rows (axis 1) or columns (axis 0) of each distinct window position on that axis."""
    spans = sorted({(box[axis], box[axis + 2]) for box in boxes})
    return torch.tensor([[*range(start, stop)] for start, stop in spans], device=device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _stream_order(
    images: int, counts: tuple[int, ...], group: int, device: torch.device
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Return the image of each window in a stream, and each image's windows' places in it."""
    image_of: list[int] = []
    place_of: dict[tuple[int, int, int], int] = {}
    for first in range(0, images, group):
        for scale, count in enumerate(counts):
            for image in range(first, min(first + group, images)):
                for window in range(count):
                    place_of[image, scale, window] = len(image_of)
                    image_of.append(image)
    places = [place_of[key] for key in sorted(place_of)]
    return torch.tensor(image_of, device=device), torch.tensor(places, device=device)


def chunked(items: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """Stack items into full batches of ``chunk``; the last one may be smaller."""
    items = iter(items)
    for item in items:
        yield stacked([item, *islice(items, chunk - 1)])


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
    """Return how many of ``count`` windows the pre-filter keeps, computed in Python floats like the authors'.

    Raises:
        ValueError: If ``ratio`` is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"SESS: prefilter_ratio must be in [0, 1), got {ratio}.")
    return count - int(count * ratio)


def prefilter(scores: Float[Tensor, "*B P"], ratio: float) -> Int[Tensor, "*B K"]:
    """Return the indices of the windows with the highest scores; of ties, the earlier ones.

    Args:
        scores: Scores or log-scores; NaN ranks last.
        ratio: Share of windows to drop, in [0, 1).
    """
    return ranked(scores)[..., : kept_count(scores.shape[-1], ratio)]


def ranked(scores: Float[Tensor, "*B P"], rounding: float = 0.0) -> Int[Tensor, "*B P"]:
    """Return the indices of the windows by falling score; of equal ones the earlier first, NaN last.

    Args:
        scores: Any range.
        rounding: Neighbours in the ranking that differ by no more count as equal. Scores of windows with
            equal content differ by rounding, differently in every batch.
    """
    known = torch.where(scores.isnan(), -torch.inf, scores)
    falling = known.sort(dim=-1, descending=True, stable=True)
    if not rounding:
        return falling.indices
    rank = (falling.values.diff(prepend=falling.values[..., :1]) < -rounding).cumsum(-1)
    order = (rank * scores.shape[-1] + falling.indices).argsort(-1)
    return falling.indices.gather(-1, order)


def sides_of(scales: Sequence[int] | None, window: int, num_scales: int) -> tuple[int, ...]:
    """Return the scales' shorter sides: the given ones, else the paper's ``num_scales``.

    Raises:
        ValueError: If there is none.
    """
    if scales is not None and not scales:
        raise ValueError("SESS: scales is empty; give at least one shorter side in px, e.g. scales=(224,).")
    return tuple(scales) if scales is not None else tuple(scale_sides(window, num_scales))
