"""Insertion and deletion: the target's probability as pixels are shown or removed, most salient first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sess_lightning.batching import batch_limit, blank_batch, in_batches
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.logits import TargetScores, check_inputs, classify
from sess_lightning.ops import blur, sent, size_of
from sess_lightning.types import Activation

Ties: TypeAlias = Literal["first", "random"]
Ends: TypeAlias = "tuple[Float[Tensor, ' B'] | None, Float[Tensor, ' B'] | None]"


def blurred_baseline(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Return the images without evidence that insertion starts from: a heavy Gaussian blur.

    51 x 51 px with sigma 50 at a shorter side of 224 px (RISE, Group-CAM), in proportion for other sizes.

    >>> blurred_baseline(torch.ones(1, 3, 64, 64)).std() < 1e-5
    tensor(True)
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
        baseline: What is shown before the pixels; None is ``blurred_baseline``.
        ties: Order of pixels of equal saliency: raster order (``"first"``) or a seeded random one.
        activation: How logits become probabilities.
        batch_size: Images that go through the model at once; None takes what memory allows.
        ends: Scores of baseline and image, where known; each saves one forward pass per image.

    Raises:
        ValueError: If shapes do not fit.

    Source: Petsiuk et al., "RISE", BMVC 2018.

    >>> insertion_curve(model, images, maps, targets, steps=4).shape
    torch.Size([1, 5])
    """
    start = blurred_baseline(images) if baseline is None else _checked(baseline, images)
    scenes = _Scenes((start, images), ends, targets, ((0, 1),))
    return _draw(model, scenes, [maps], steps, ties, activation, batch_size)[0, 0]


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
    """Return the target's probability as pixels are removed, most salient first.

    Like ``insertion_curve``, from the image to its baseline: None is zeros, the data set's mean in normalised
    space. ``ends`` are the scores of the image and of the baseline.

    >>> deletion_curve(model, images, maps, targets, steps=4).shape
    torch.Size([1, 5])
    """
    end = torch.zeros_like(images) if baseline is None else _checked(baseline, images)
    scenes = _Scenes((images, end), ends, targets, ((0, 1),))
    return _draw(model, scenes, [maps], steps, ties, activation, batch_size)[0, 0]


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
    which: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, "M 2 B {steps}+1"]:
    """Return the insertion and deletion curves of each method's maps, from one stream of full batches.

    Raises ``ValueError`` if shapes do not fit.

    Args:
        model: Any classifier; given back as it was.
        images: As the model takes them.
        maps: Each method's maps, one per image.
        targets: The explained class of each image.
        steps: Number of equal steps.
        activation: How logits become probabilities.
        batch_size: Images that go through the model at once; None takes what memory allows.
        blurred: What insertion starts from; None is ``blurred_baseline``.
        ends: Scores of the images, the blurred images and zeros, which all curves share; None scores them.
        which: For each method, the indices of the images whose curves are measured, the others' being NaN;
            None measures all.

    >>> insertion_and_deletion_curves(model, images, [maps], targets, steps=4).shape
    torch.Size([1, 2, 1, 5])
    """
    pool = images, blurred_baseline(images) if blurred is None else blurred, torch.zeros_like(images)
    scenes = _Scenes(pool, ends or (None, None, None), targets, ((1, 0), (0, 2)))
    return _draw(model, scenes, maps, steps, "first", activation, batch_size, which)


class _Scenes(NamedTuple):
    """Images that turn into others pixel by pixel.

    Attributes:
        pool: Images and their baselines.
        scores: The targets' probabilities on each of the pool, where known.
        targets: The class of each image.
        ways: For each kind of curve, the place in the pool that it starts from, and that it ends at.
    """

    pool: Sequence[Float[Tensor, "B C H W"]]
    scores: Sequence[Float[Tensor, " B"] | None]
    targets: Int[Tensor, " B"]
    ways: Sequence[tuple[int, int]]

    def asked(self, way: int, steps: int) -> range:
        """Return the steps of a curve that have to be scored: without the ends where they are known."""
        start, end = (self.scores[place] is not None for place in self.ways[way])
        return range(int(start), steps + 1 - int(end))

    def laid_out(self, which: Sequence[Sequence[int]], steps: int) -> tuple[list[_Item], list[int]]:
        """Return what has to be painted, and where each point of all curves will be found.

        That is among NaN, for an image whose curves are not measured, the known scores, and the painted ones.
        """
        items: list[_Item] = []
        places: list[int] = []
        count, order = len(self.targets), 0
        known = [place for place, score in enumerate(self.scores) if score is not None]
        for some in which:
            orders = {image: order + i for i, image in enumerate(some)}
            order += len(some)
            for way, ends in enumerate(self.ways):
                asked = self.asked(way, steps)
                at_ends = [1 + known.index(end) * count if end in known else None for end in ends]
                for image in range(count):
                    if image not in orders:
                        places += [0] * (steps + 1)
                        continue
                    first = 1 + len(known) * count + len(items)
                    inner = range(first, first + len(asked))
                    start, end = ([] if at is None else [at + image] for at in at_ends)
                    places += [*start, *inner, *end]
                    rows = [end * count + image for end in ends]
                    items += [_Item(rows[0], rows[1], orders[image], step) for step in asked]
        return items, places


class _Item(NamedTuple):
    """An image of a stream: from which row of the pool to which, in which map's order, up to which step."""

    start: int
    end: int
    order: int
    step: int


class _Painter:
    """The images of a stream.

    On a CPU they are painted image by image, in place. An accelerator waits for its host: there, a batch is
    painted at once, at the cost of a copy of the pool.

    Args:
        pool: Images and their baselines, (B, C, H, W) each.
        step_of: For each map, the step at which each pixel changes.
        items: What to paint.
        together: Whether to paint a batch at once; None does on an accelerator.
    """

    def __init__(
        self,
        pool: Sequence[Float[Tensor, "B C H W"]],
        step_of: Int[Tensor, "R H W"],
        items: Sequence[_Item],
        together: bool | None = None,
    ) -> None:
        self._items, self._step_of = items, step_of
        self._together = not step_of.is_cpu if together is None else together
        if self._together:
            self._pool = torch.cat([images.detach().permute(0, 2, 3, 1) for images in pool])
            columns = sent(list(zip(*items, strict=True)) or [[]] * 4, step_of.device)
            self._ends, self._order, self._step = columns[:2], columns[2], columns[3][:, None, None]
        else:
            last = (images.detach().contiguous(memory_format=torch.channels_last) for images in pool)
            self._rows = [row for images in last for row in images]

    def paint(self, which: slice) -> Float[Tensor, "K C H W"]:
        """Return some of the images, channels last."""
        if self._together:
            start, end = self._pool[self._ends[:, which]]
            changed = self._step_of[self._order[which]] < self._step[which]
            return torch.where(changed[..., None], end, start).permute(0, 3, 1, 2)
        items = self._items[which]
        seen, done = blank_batch(len(items), self._rows[0][None]), 0
        for (start, end, order), group in groupby(items, lambda item: item[:3]):
            steps = [item.step for item in group]
            place = slice(done, done := done + len(steps))
            changed = _changed(self._step_of[order], range(steps[0], steps[-1] + 1), seen.shape[1])
            torch.where(changed, self._rows[end], self._rows[start], out=seen[place])
        return seen


def _draw(
    model: nn.Module,
    scenes: _Scenes,
    maps: Sequence[Float[Tensor, "B H W"]],
    steps: int,
    ties: Ties,
    activation: Activation,
    batch_size: int | None,
    which: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, "M K B {steps}+1"]:
    """Return the target's probability along every curve of every map; batches run across curves."""
    for images in scenes.pool if len(scenes.pool[0]) else ():
        check_inputs("Insertion and deletion", images, scenes.targets)
    count, which = len(scenes.targets), which or [range(len(scenes.targets))] * len(maps)
    for one in maps:
        _check_maps(one, count, size_of(scenes.pool[0]))
    items, places = scenes.laid_out(which, steps)
    device = scenes.targets.device
    with explaining(model, only_passes=True), torch.no_grad():
        measured = [
            one if len(some) == count else one[sent(some, device)]
            for one, some in zip(maps, which, strict=True)
        ]
        painter = _Painter(scenes.pool, pixel_steps(torch.cat(measured), steps, ties), items)
        of_item = scenes.targets[sent([item.start % count for item in items], device)]
        targets = TargetScores(of_item, activation)

        def scored(_: Sequence[_Item], part: slice) -> Tensor:
            return targets.read(classify(model, painter.paint(part)), part)

        batches = in_batches(scored, items, batch_limit(batch_size, scenes.pool[0]))
        scores = torch.cat([*batches]) if items else torch.zeros(0, device=device)
        drawn = targets.known(scores).exp()
    known = [score.to(drawn) for score in scenes.scores if score is not None]
    values = torch.cat([drawn.new_full((1,), torch.nan), *known, drawn])
    return values[sent(places, device)].view(len(maps), len(scenes.ways), count, steps + 1)


def _changed(step_of: Int[Tensor, "H W"], steps: range, channels: int) -> Bool[Tensor, "T C H W"]:
    """Return the values that have changed by each of ``steps``."""
    by = torch.arange(steps.start, steps.stop, device=step_of.device)
    changed = step_of < by[:, None, None]
    # Laid out like the images: three times as fast as broadcasting over the channels.
    return changed[:, None].expand(-1, channels, -1, -1).contiguous(memory_format=torch.channels_last)


def pixel_steps(maps: Float[Tensor, "B H W"], steps: int, ties: Ties = "first") -> Int[Tensor, "B H W"]:
    """Return the step, from 0, at which each pixel changes: most salient first.

    >>> pixel_steps(torch.tensor([[[0.1, 0.9], [0.5, 0.3]]]), steps=2).tolist()
    [[[1, 0], [0, 1]]]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if ties not in get_args(Ties):
        raise ValueError(f'ties must be "first" or "random", got {ties!r}.')
    flat, count = maps.flatten(1).nan_to_num(0), maps.shape[1] * maps.shape[2]
    step_of_rank = _steps_of_ranks(count, steps, flat.device)
    if ties == "first":
        ranked = flat.sort(dim=1, descending=True, stable=True).indices
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(flat.device)
        ranked = order[flat[:, order].sort(dim=1, descending=True, stable=True).indices]
    return torch.empty_like(ranked).scatter_(1, ranked, step_of_rank.expand_as(ranked)).view(maps.shape)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _steps_of_ranks(count: int, steps: int, device: torch.device) -> Int[Tensor, " N"]:
    return torch.arange(count, device=device) // -(-count // steps)


def tied_share(maps: Float[Tensor, "B H W"]) -> Float[Tensor, " B"]:
    """Return the share of each map's pixels that are tied with another: their order is arbitrary.

    NaN counts as 0, as in ``pixel_steps``.

    >>> tied_share(torch.tensor([[[0.0, 0.0], [0.5, 0.3]]]))
    tensor([0.5000])
    """
    ranked = maps.flatten(1).nan_to_num(0).sort(dim=1).values
    same = F.pad(ranked[:, 1:] == ranked[:, :-1], (1, 1))
    return (same[:, 1:] | same[:, :-1]).mean(1, dtype=torch.float32)


def curve_auc(curves: Float[Tensor, "*B T"]) -> Float[Tensor, "*B"]:
    """Return the area under curves over [0, 1], by the trapezoid rule.

    >>> curve_auc(torch.tensor([0.0, 0.5, 1.0]))
    tensor(0.5000)
    """
    return (curves.sum(-1) - (curves[..., 0] + curves[..., -1]) / 2) / (curves.shape[-1] - 1)


def _checked(baseline: Tensor, images: Tensor) -> Tensor:
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
