"""Insertion and deletion: the target's probability as pixels are shown or removed, most salient first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sess_lightning.batching import batch_limit, blank_batch, in_batches
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs, score
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
        batch_size: Images that go through the model at once; None by the memory there is.
        ends: Scores of baseline and image, where known; each saves one forward pass per image.

    Raises:
        ValueError: If shapes do not fit.

    Source: Petsiuk et al., "RISE", BMVC 2018.

    >>> insertion_curve(model, images, maps, targets, steps=4).shape
    torch.Size([1, 5])
    """
    start = blurred_baseline(images) if baseline is None else _like(images, baseline)
    transition = _Transition.by(maps, start, images, targets, ends, steps, ties)
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
    """Return the target's probability as pixels are removed, most salient first.

    Like ``insertion_curve``, from the image to its baseline: None is zeros, the data set's mean in normalised
    space. ``ends`` are the scores of the image and of the baseline.

    >>> deletion_curve(model, images, maps, targets, steps=4).shape
    torch.Size([1, 5])
    """
    end = torch.zeros_like(images) if baseline is None else _like(images, baseline)
    transition = _Transition.by(maps, images, end, targets, ends, steps, ties)
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
    """Return (insertion, deletion) curves of each method's maps, from one stream of full batches.

    Raises ``ValueError`` if shapes do not fit.

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
        which: For each method, an index of the images whose curves are measured; None measures all.

    >>> len(insertion_and_deletion_curves(model, images, [maps], targets, steps=4))
    1
    """
    whole = _Pictures.of(images, blurred, targets, ends)
    transitions = []
    for of_method, some in zip(maps, which or [slice(None)] * len(maps), strict=True):
        transitions += whole.transitions(of_method, some, steps)
    curves = _draw(model, transitions, steps, activation, batch_size)
    return list(zip(curves[::2], curves[1::2], strict=True))


class _Pictures(NamedTuple):
    """The ends of every method's curves, with their scores where these are known."""

    images: Float[Tensor, "B C H W"]
    blurred: Float[Tensor, "B C H W"]
    zeros: Float[Tensor, "B C H W"]
    targets: Int[Tensor, " B"]
    scores: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]

    @classmethod
    def of(
        cls,
        images: Tensor,
        blurred: Tensor | None,
        targets: Tensor,
        ends: tuple[Tensor, Tensor, Tensor] | None,
    ) -> _Pictures:
        """Lay the images out once, for all methods."""
        images, blurred = _last(images), _last(blurred_baseline(images) if blurred is None else blurred)
        return cls(images, blurred, torch.zeros_like(images), targets, ends or (None, None, None))

    def transitions(
        self, maps: Float[Tensor, "B H W"], some: slice | Tensor, steps: int
    ) -> list[_Transition]:
        """Return insertion and deletion of some of the images by their maps."""
        _check_maps(maps, len(self.images), size_of(self.images))
        step_of = pixel_steps(borrowed(maps[some]), steps)
        image, blurred, zero = (None if end is None else end[some] for end in self.scores)
        images, targets = self.images[some], self.targets[some]
        return [
            _Transition(self.blurred[some], images, step_of, targets, (blurred, image)),
            _Transition(images, self.zeros[some], step_of, targets, (image, zero)),
        ]


class _Transition(NamedTuple):
    """Images that turn into others pixel by pixel, in the order of their maps."""

    start: Float[Tensor, "B C H W"]
    end: Float[Tensor, "B C H W"]
    step_of: Int[Tensor, "B H W"]
    targets: Int[Tensor, " B"]
    ends: Ends

    @classmethod
    def by(
        cls, maps: Tensor, start: Tensor, end: Tensor, targets: Tensor, ends: Ends, steps: int, ties: Ties
    ) -> _Transition:
        """Return the transition in which the most salient pixels change first."""
        _check_maps(maps, len(start), size_of(start))
        return cls(start, end, pixel_steps(borrowed(maps), steps, ties), targets, ends)

    def asked(self, steps: int) -> range:
        """Return the steps that have to be scored: without the ends where they are known."""
        return range(0 if self.ends[0] is None else 1, steps + 1 if self.ends[1] is None else steps)


class _Painter:
    """The images along several transitions, one after the other, with their targets.

    On a CPU they are painted image by image, in place. An accelerator waits for its host: there, a batch is
    painted at once, at the cost of a copy of all ends.

    Args:
        transitions: The transitions to paint.
        asked: The steps of each.
        together: Whether to paint a batch at once; None does on an accelerator.
    """

    def __init__(
        self, transitions: Sequence[_Transition], asked: Sequence[range], together: bool | None = None
    ) -> None:
        device = transitions[0].start.device
        self._together = device.type != "cpu" if together is None else together
        self._starts, self._ends, self._steps, targets = (
            [row for one in transitions for row in getattr(one, name)]
            if not self._together and name != "targets"
            else torch.cat([getattr(one, name) for one in transitions])
            for name in ("start", "end", "step_of", "targets")
        )
        counts = [len(one.targets) for one in transitions]
        owners = [some for some, count in zip(asked, counts, strict=True) for _ in range(count)]
        self._owner = [place for place, some in enumerate(owners) for _ in some]
        self._at = [step for some in owners for step in some]
        self._on_device = [sent(numbers, device) for numbers in (self._owner, self._at)]
        self.targets = targets[self._on_device[0]]

    def __len__(self) -> int:
        return len(self._at)

    def paint(self, which: slice) -> Float[Tensor, "K C H W"]:
        """Return some of the images, channels last."""
        if self._together:
            owner, at = (numbers[which] for numbers in self._on_device)
            changed = (self._steps[owner] < at[:, None, None])[:, None]
            return _last(torch.where(changed, self._ends[owner], self._starts[owner]))
        owners = self._owner[which]
        seen, done = blank_batch(len(owners), self._starts[owners[0]][None]), 0
        for one, items in groupby(owners):
            place = slice(done, done := done + len([*items]))
            steps = self._at[which][place]
            changed = _changed(self._steps[one], range(steps[0], steps[-1] + 1), seen.shape[1])
            torch.where(changed, self._ends[one], self._starts[one], out=seen[place])
        return seen


def _draw(
    model: nn.Module,
    transitions: Sequence[_Transition],
    steps: int,
    activation: Activation,
    batch_size: int | None,
) -> list[Float[Tensor, "B {steps}+1"]]:
    """Return the target's probability along every transition; batches run across transitions."""
    for one in transitions:
        if len(one.targets):
            check_inputs("Insertion and deletion", one.start, one.targets)
    asked = [one.asked(steps) for one in transitions]
    with explaining(model), torch.no_grad():
        laid = [
            one._replace(start=_last(one.start), end=_last(one.end), targets=borrowed(one.targets))
            for one in transitions
        ]
        painter = _Painter(laid, asked)

        def scored(_: Sequence[int], which: slice) -> Tensor:
            return score(model, painter.paint(which), painter.targets[which], activation)

        batches = in_batches(scored, range(len(painter)), batch_limit(batch_size, laid[0].start))
        none = torch.zeros(0, device=painter.targets.device)
        counts = [len(one.targets) * len(some) for one, some in zip(laid, asked, strict=True)]
        probabilities = torch.cat([none, *batches]).exp().split(counts)
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
    step_of_rank = torch.arange(count, device=flat.device) // -(-count // steps)
    if ties == "first":
        ranked = flat.sort(dim=1, descending=True, stable=True).indices
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(flat.device)
        ranked = order[flat[:, order].sort(dim=1, descending=True, stable=True).indices]
    return torch.empty_like(ranked).scatter_(1, ranked, step_of_rank.expand_as(ranked)).view(maps.shape)


def tied_share(maps: Float[Tensor, "B H W"]) -> Float[Tensor, " B"]:
    """Return the share of each map's pixels that are tied with another: their order is arbitrary.

    NaN counts as 0, as in ``pixel_steps``.

    >>> tied_share(torch.tensor([[[0.0, 0.0], [0.5, 0.3]]]))
    tensor([0.5000])
    """
    ranked = maps.flatten(1).nan_to_num(0).sort(dim=1).values
    same = ranked[:, 1:] == ranked[:, :-1]
    edge = same.new_zeros(same.shape[0], 1)
    return (torch.cat([edge, same], 1) | torch.cat([same, edge], 1)).float().mean(1)


def curve_auc(curves: Float[Tensor, "*B T"]) -> Float[Tensor, "*B"]:
    """Return the area under curves over [0, 1], by the trapezoid rule.

    >>> curve_auc(torch.tensor([0.0, 0.5, 1.0]))
    tensor(0.5000)
    """
    return (curves.sum(-1) - (curves[..., 0] + curves[..., -1]) / 2) / (curves.shape[-1] - 1)


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
