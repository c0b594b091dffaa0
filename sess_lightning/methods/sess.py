"""SESS around any method; itself a method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.engine import (
    Fusion,
    Plan,
    canvas_strips,
    channel_weights,
    chunked,
    crop,
    crop_strips,
    fuse,
    kept_count,
    plan_windows,
    prefilter,
    sides_of,
    smooth,
    windows,
)
from sess_lightning.introspection import check_inputs, classify, input_window, log_scores
from sess_lightning.lending import borrowed, explaining
from sess_lightning.ops import min_max, size_of
from sess_lightning.types import Activation, Explanation, SaliencyMethod


@dataclass(frozen=True)
class SESS(SaliencyMethod):
    """Saliency Enhancing with Scaling and Sliding (Tursun et al., ECCV 2022) around a base method.

    Many windows of the image at many scales are explained by the base method and fused, weighted by the
    model's score of each window. Windows of all images are packed into full batches; a base that yields maps
    and scores in one forward (the CAM family) costs exactly one forward per window, any other a scoring
    forward per window and its own cost per window kept.

    Where the authors' code parts from the paper, this follows the paper: the fused map is min-max normalised,
    a flat window is left out (theirs turns all it covers into NaN), scores are divided by the best one in
    logarithms.

    Attributes:
        base: The method to enhance.
        num_scales: Scales, shorter sides being 224, 288, 352, ... px for a window of 224, in proportion for
            others.
        prefilter_ratio: Share of windows with the lowest scores to leave out, in [0, 1).
        scales: The shorter sides themselves, px, instead of ``num_scales``; none below the window.
        window: Side of a window, px; None is the size the model says it was built for, else the image's
            shorter side.
        stride: Step between windows, px; None is the window.
        antialias: Antialias when a scale is smaller than the image (what torchvision does today); False is
            the published behaviour.
        theta: What a weighted value must exceed to take part in the mean, as a fraction of the top weight.
        fusion: ``"mean"`` (equation 2), ``"max"``, or ``"average"`` over all windows, zeros included.
        channel_weights: Weight each map by its window's score (equation 1).
        smoothing: Blur the seams of the fused map: for pictures, not for scores.
        batch_size: Windows that go through the model at once.
    """

    base: SaliencyMethod
    num_scales: int = 6
    prefilter_ratio: float = 0.0
    scales: tuple[int, ...] | None = None
    window: int | None = None
    stride: int | None = None
    antialias: bool = True
    theta: float = 0.0
    fusion: Fusion = "mean"
    channel_weights: bool = True
    smoothing: bool = False
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.base, SaliencyMethod):
            raise TypeError(f"SESS: base must be a saliency method such as GradCAM(), got {self.base!r}.")
        if self.scales is not None:
            object.__setattr__(self, "scales", tuple(self.scales))
        sides_of(self.scales, 224, self.num_scales)
        kept_count(1, self.prefilter_ratio)
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"SESS: fusion must be one of {get_args(Fusion)}, got {self.fusion!r}.")
        if not 0 <= self.theta < 1:
            raise ValueError(
                f"SESS: theta must be in [0, 1), a fraction of the top weight, got {self.theta}."
            )
        for name in ("window", "stride", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"SESS: {name} must be at least 1, got {value}.")

    @property
    def activation(self) -> Activation:  # type: ignore[override]
        """The base method's."""
        return self.base.activation

    def plan(self, model: nn.Module, size: tuple[int, int]) -> Plan:
        """Return the windows that an image of ``size`` (height, width) gets.

        Raises:
            ValueError: If the window exceeds a scale, or the stride the window.
        """
        window = self.window if self.window is not None else input_window(model) or min(size)
        stride = self.stride if self.stride is not None else window
        return plan_windows(tuple(size), window, stride, sides_of(self.scales, window, self.num_scales))

    def count_forwards(self, model: nn.Module, size: tuple[int, int]) -> int:
        """Return how many forwards of windows one map of an image of ``size`` costs."""
        count = len(self.plan(model, size))
        if self.base.single_forward:
            return count
        window = self.plan(model, size).window
        kept = kept_count(count, self.prefilter_ratio)
        return count + kept * self.base.count_forwards(model, (window, window))

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images`` of any one size.

        The scores are those of the window that is the whole image where there is one, else of the best
        window.

        Raises:
            ValueError: If an argument has the wrong shape, or the windows do not fit.
        """
        check_inputs("SESS", images, targets)
        return self._finished(model, images, targets)

    def explain_classes(
        self, model: nn.Module, image: Float[Tensor, "1 C H W"], targets: Int[Tensor, " T"]
    ) -> Explanation:
        """Explain several classes of one image; its windows pass through the model once for all of them."""
        check_inputs("SESS", image.expand(len(targets), -1, -1, -1), targets)
        return self._finished(model, image, targets)

    def _finished(self, model: nn.Module, images: Tensor, targets: Tensor) -> Explanation:
        plan = self.plan(model, size_of(images))
        with explaining(model):
            maps, logs = self.fused(model, borrowed(images), borrowed(targets), plan)
        maps = min_max(maps)
        whole = plan.scales[0] == (plan.window, plan.window)
        scores = (logs[:, 0] if whole else logs.amax(1)).exp()
        return Explanation(smooth(maps) if self.smoothing else maps, scores)

    @torch.no_grad()
    def fused(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " T"], plan: Plan
    ) -> tuple[Float[Tensor, "T H W"], Float[Tensor, "T P"]]:
        """Return equation 2 before its min-max, and every window's log-score.

        There is one target per image, or several for a single image.
        """
        parts = chunked(windows(images, plan, self.antialias), self.batch_size)
        stream: Iterator[Tensor]
        if self.base.single_forward:
            coarse, logs = self._extracted(model, parts, targets, len(images), len(plan))
            kept = prefilter(logs, self.prefilter_ratio)
            stream = chain.from_iterable(maps[which] for maps, which in zip(coarse, kept, strict=True))
            grid = size_of(coarse)
        else:
            logits = torch.cat([classify(model, part) for part in parts]).unflatten(0, (-1, len(plan)))
            each = zip(logits.expand(len(targets), -1, -1), targets, strict=True)
            logs = torch.stack(
                [log_scores(own, target.repeat(len(plan)), self.activation) for own, target in each]
            )
            kept = prefilter(logs, self.prefilter_ratio)
            stream = self._kept_maps(model, images.expand(len(targets), -1, -1, -1), targets, plan, kept)
            grid = (plan.window, plan.window)
        weights = channel_weights(logs) if self.channel_weights else torch.ones_like(logs)
        strips = canvas_strips(plan, grid, images.device)
        fused = [
            fuse(
                islice(stream, len(which)), weight[which], strips, which, theta=self.theta, fusion=self.fusion
            )
            for weight, which in zip(weights, kept, strict=True)
        ]
        return torch.stack(fused), logs

    def _extracted(
        self, model: nn.Module, parts: Iterator[Tensor], targets: Tensor, images: int, windows: int
    ) -> tuple[Float[Tensor, "T P h w"], Float[Tensor, "T P"]]:
        """Return all windows' maps and log-scores: of each image for its target, or of one for each."""
        if images == len(targets):
            of_window = targets.repeat_interleave(windows).split(self.batch_size)
            extracted = [self.base.extract(model, *each) for each in zip(parts, of_window, strict=True)]
            maps, logs = (torch.cat(each) for each in zip(*extracted, strict=True))
            return maps.unflatten(0, (-1, windows)), logs.unflatten(0, (-1, windows))
        shared = [self.base.extract_classes(model, part, targets) for part in parts]
        maps = torch.cat([torch.stack([each.maps for each in part]) for part in shared], 1)
        return maps, torch.cat([torch.stack([each.log_scores for each in part]) for part in shared], 1)

    def _kept_maps(
        self, model: nn.Module, images: Tensor, targets: Tensor, plan: Plan, kept: Int[Tensor, "B K"]
    ) -> Iterator[Float[Tensor, "w w"]]:
        """Yield the base's maps of the kept windows, image by image, from full batches."""
        rows, columns = crop_strips(plan, self.antialias, images.device)
        cut = chain.from_iterable(
            crop(image, rows, columns, which)
            for image, some in zip(images, kept, strict=True)
            for which in some.split(self.batch_size)
        )
        of_window = targets.repeat_interleave(kept.shape[1]).split(self.batch_size)
        for part, target in zip(chunked(cut, self.batch_size), of_window, strict=True):
            yield from self.base(model, part, target)
