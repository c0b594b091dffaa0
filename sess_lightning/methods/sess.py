"""SESS around any method; itself a method."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.engine.extraction import Extracted, Scored, WindowExtractor
from sess_lightning.engine.fusion import AnyFusion, Fusion, channel_weights, fuse_maps, smooth
from sess_lightning.engine.windows import (
    Plan,
    WindowSize,
    both_sides,
    descent,
    kept_count,
    least_side,
    plan_windows,
    ranked,
    sides_of,
)
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs
from sess_lightning.introspection.sizes import input_size
from sess_lightning.methods.cam import GradCAM
from sess_lightning.methods.coarse_to_fine import descend
from sess_lightning.methods.templates import WrappingMethod
from sess_lightning.ops import min_max, size_of, upsample
from sess_lightning.types import Explanation, SaliencyMethod

SCORES_APART = 1e-4
"""Log-scores must differ by this much to rank windows: equal windows differ by up to 2e-5 between CPUs."""


@dataclass(frozen=True)
class SESS(WrappingMethod):
    """Saliency Enhancing with Scaling and Sliding (Tursun et al., ECCV 2022) around a base method.

    Many windows of the image at many scales are explained by the base method and fused, weighted by the
    model's score of each window. Windows of all images are packed into full batches; a base that gives maps
    and scores in one forward pass (the CAM family) costs exactly one forward pass per window, any other a
    scoring forward pass per window plus its own cost per window that is kept.

    Where the authors' code differs from the paper, this follows the paper: the fused map is min-max
    normalised, a flat window is left out (in theirs, everything that it covers becomes NaN), and scores are
    divided by the best one, in logarithms. Where equation 2 counts values above 0, this counts values above
    rounding, 1e-6 of a window's own weight (see ``fuse``), so that an image's map is the same whatever the
    batch, memory layout, number of threads or CPU, but for some pixels in a million at many scales.

    Attributes:
        base: The method to enhance.
        num_scales: Number of scales, with shorter sides of 224, 288, 352, ... px for a window of 224 px, in
            proportion for others.
        prefilter_ratio: Share of windows with the lowest scores to leave out, in [0, 1). Of windows whose
            log-scores differ by less than 1e-4, as with equal content, the earlier ones are kept.
        scales: The shorter sides themselves, px, instead of ``num_scales``; none below the window.
        window: (height, width) of a window, px, or the side of a square; None is the image's own size, or
            where the model refuses such images, the size that it says it was built for.
        stride: Step between windows along both axes, px; None is the window.
        antialias: Antialias when a scale is smaller than the image (what torchvision does today); False is
            the published behaviour.
        theta: Threshold for a weighted value to count in the mean, as a fraction of the top weight; 0 stands
            for rounding.
        fusion: ``"mean"`` (equation 2), ``"max"``, ``"average"`` over all windows, zeros included, or
            ``"coverage"``: per scale over the windows that cover a pixel, then over scales.
        channel_weights: Weight each map by its window's score (equation 1).
        weight_power: Power of that score; 1 is the paper's.
        stretch: Stretch each window's map to [0, 1], as the paper does. False keeps each map's own strength,
            so that a window without the class adds next to nothing. This needs a base with strength (the CAM
            family) and ``fusion`` ``"coverage"`` or ``"average"``, which have no threshold.
        smoothing: Blur the seams of the fused map: for display, not for scores.
        batch_size: Windows that go through the model at once; None takes what memory allows.
        coarse_to_fine: Share of the windows to score, in (0, 1]: all of the coarser scales, and of the finer
            ones those where the coarser maps are high; the others count as filtered out. None scores all. The
            maps are the base's if one forward pass gives scores and maps, else Grad-CAM's.

    >>> SESS(GradCAM(), num_scales=2)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    base: SaliencyMethod
    num_scales: int = 6
    prefilter_ratio: float = 0.0
    scales: tuple[int, ...] | None = None
    window: WindowSize | None = None
    stride: int | None = None
    antialias: bool = True
    theta: float = 0.0
    fusion: AnyFusion = "mean"
    channel_weights: bool = True
    weight_power: float = field(default=1.0, kw_only=True)
    stretch: bool = field(default=True, kw_only=True)
    smoothing: bool = False
    batch_size: int | None = None
    coarse_to_fine: float | None = None

    def __post_init__(self) -> None:
        self.check_base()
        if self.scales is not None:
            object.__setattr__(self, "scales", tuple(self.scales))
        sides_of(self.scales, 224, self.num_scales)
        kept_count(1, self.prefilter_ratio)
        fusions = (*get_args(Fusion), "coverage")
        if self.fusion not in fusions:
            raise ValueError(f"SESS: fusion must be one of {fusions}, got {self.fusion!r}.")
        if not self.weight_power > 0:
            raise ValueError(
                f"SESS: weight_power must be positive, got {self.weight_power}; channel_weights=False gives "
                "all windows the same weight."
            )
        self._check_strength()
        if not 0 <= self.theta < 1:
            raise ValueError(
                f"SESS: theta must be in [0, 1), a fraction of the top weight, got {self.theta}."
            )
        if self.coarse_to_fine is not None:
            if not 0 < self.coarse_to_fine <= 1:
                raise ValueError(
                    "SESS: coarse_to_fine must be in (0, 1], a share of the windows, got "
                    f"{self.coarse_to_fine}."
                )
            if self.scales is not None and list(self.scales) != sorted(self.scales):
                raise ValueError(f"SESS: coarse_to_fine needs scales in ascending order, got {self.scales}.")
        if isinstance(self.window, (list, tuple)):
            object.__setattr__(self, "window", tuple(self.window))
            if len(self.window) != 2 or min(self.window) < 1:
                raise ValueError(
                    f"SESS: window must be a side or (height, width) of at least 1 px, got {self.window}."
                )
            self.check_counts("stride", "batch_size")
        else:
            self.check_counts("window", "stride", "batch_size")

    def _check_strength(self) -> None:
        if self.stretch:
            return
        if not self.base.has_strength:
            raise ValueError(
                "SESS: stretch=False needs a base whose maps have a strength, the CAM family; got "
                f"{self.base}."
            )
        if self.fusion not in ("coverage", "average") or self.theta > 0:
            raise ValueError(
                'SESS: stretch=False needs fusion="coverage" or "average" and theta=0: a threshold is a '
                f"share of stretched maps; got fusion={self.fusion!r}, theta={self.theta}."
            )

    def plan(self, model: nn.Module, size: tuple[int, int]) -> Plan:
        """Return the windows that an image of ``size`` (height, width) gets.

        Raises:
            ValueError: If the window exceeds a scale, or the stride the window.
        """
        size = size[0], size[1]  # A torch.Size, too.
        window = both_sides(self.window) if self.window is not None else input_size(model, size)
        stride = self.stride if self.stride is not None else window
        sides = sides_of(self.scales, least_side(size, window), self.num_scales)
        return plan_windows(size, window, stride, sides)

    def count_forwards(self, model: nn.Module, size: tuple[int, int]) -> int:
        """Return how many forward passes of windows one map of an image of ``size`` costs."""
        plan = self.plan(model, size)
        scored, explained = self.counts(plan)
        return scored + explained * self.base.count_forwards(model, plan.window_size)

    def counts(self, plan: Plan) -> tuple[int, int]:
        """Return how many windows are scored, and how many the base explains by forward passes of its own."""
        scored, kept = self._scored_and_kept(plan)
        return scored, 0 if self.base.single_forward else kept

    def _scored_and_kept(self, plan: Plan) -> tuple[int, int]:
        scored = len(plan)
        if self.coarse_to_fine is not None:
            scales, fine = descent(plan, self.coarse_to_fine)
            scored = len(plan.first(scales)) + fine
        return scored, min(scored, kept_count(len(plan), self.prefilter_ratio))

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images`` of any one size.

        The scores are those of the whole image if that is one of the windows, else of the best window.

        Raises:
            ValueError: If an argument has the wrong shape, or the windows do not fit.
        """
        check_inputs("SESS", images, targets)
        return self._finished(model, images, targets)[0]

    @property
    def shares_classes(self) -> bool:
        """Whether maps of several classes of one image cost the forward passes of a single one."""
        base = self.base
        shared = type(base).extract_classes is not SaliencyMethod.extract_classes and base.single_forward
        return shared and not self.coarse_to_fine

    def explain_classes(
        self, model: nn.Module, image: Float[Tensor, "1 C H W"], targets: Int[Tensor, " T"]
    ) -> Explanation:
        """Explain several classes of one image; its windows pass through the model once for all of them."""
        check_inputs("SESS", image.expand(len(targets), -1, -1, -1), targets)
        return self._finished(model, image, targets)[0]

    def maps_beside(
        self,
        model: nn.Module,
        images: Float[Tensor, "B C H W"],
        targets: Int[Tensor, " T"],
        others: Sequence[SaliencyMethod] = (),
    ) -> list[Float[Tensor, "T H W"]]:
        """Return the maps of this method and of ``others``; the base's map is that of the first window."""
        size = size_of(images)
        if not any(self.gives(other, model, size) for other in others):
            return super().maps_beside(model, images, targets, others)
        check_inputs("SESS", images if len(images) > 1 else images.expand(len(targets), -1, -1, -1), targets)
        explained, first = self._finished(model, images, targets)
        beside = [
            self._drawn(first, size)
            if first is not None and self.gives(other, model, size)
            else other.maps_beside(model, images, targets)[0]
            for other in others
        ]
        return [explained.maps, *beside]

    def _drawn(self, maps: Float[Tensor, "T h w"], size: tuple[int, int]) -> Float[Tensor, "T H W"]:
        drawn = upsample(maps, size)
        return drawn.clamp(0, 1) if self.stretch else min_max(drawn)

    def gives(self, other: SaliencyMethod, model: nn.Module, size: tuple[int, int]) -> bool:
        """Return True for the base, if windows take one forward pass and the first is the untouched image."""
        if not self.base.single_forward or not other.single_forward or other != self.base:
            return False
        plan = self.plan(model, size)
        return plan.begins_whole and plan.size == plan.window_size

    def _finished(
        self, model: nn.Module, images: Tensor, targets: Tensor
    ) -> tuple[Explanation, Float[Tensor, "T h w"] | None]:
        with explaining(model, self.only_passes):
            plan = self.plan(model, size_of(images))
            maps, logs, first = self.fused(model, images, borrowed(targets), plan)  # Windows are copies.
        maps = min_max(maps)
        scores = (logs[:, 0] if plan.begins_whole else logs.amax(1)).exp()
        return Explanation(smooth(maps) if self.smoothing else maps, scores), first

    @torch.no_grad()
    def fused(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " T"], plan: Plan
    ) -> tuple[Float[Tensor, "T H W"], Float[Tensor, "T P"], Float[Tensor, "T h w"] | None]:
        """Return equation 2 before its min-max, the windows' log-scores, and the first window's map.

        There is one target per image, or several for a single image. The first window's map is as the base
        extracts it; None if windows are explained only after the pre-filter. The log-score of windows that
        were not scored is minus infinity.
        """
        extractor = self._extractor(images, targets, plan)
        scored = self._scored(model, extractor)
        logs = scored.logs
        if logs.shape[1] < len(plan):
            logs = logs.new_full((len(targets), len(plan)), -torch.inf).scatter(1, scored.which, logs)
        first = None if scored.maps is None else scored.maps[:, 0]
        scored = self._filtered(scored, plan)
        maps: Tensor | Iterator[Tensor]
        if scored.maps is not None:
            maps = scored.maps
        else:
            maps = chain.from_iterable(extractor.map_some(model, self.base, scored.which))
        return self._fuse(maps, scored.logs, scored.which, plan), logs, first

    def _fuse(
        self,
        maps: Float[Tensor, "T K h w"] | Iterator[Float[Tensor, "h w"]],
        log_scores: Float[Tensor, "T K"],
        kept: Int[Tensor, "T K"],
        plan: Plan,
    ) -> Float[Tensor, "T H W"]:
        weights = channel_weights(log_scores if self.weight_power == 1 else log_scores * self.weight_power)
        if not self.channel_weights:
            weights = torch.ones_like(weights)
        return fuse_maps(maps, weights, plan, kept, theta=self.theta, fusion=self.fusion)

    @torch.no_grad()
    def kept_windows(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " T"], plan: Plan
    ) -> Int[Tensor, "T K"]:
        """Return the indices of the windows that are kept, rising; arguments as for ``fused``."""
        return self._filtered(self._scored(model, self._extractor(images, targets, plan)), plan).which

    def _extractor(self, images: Tensor, targets: Tensor, plan: Plan) -> WindowExtractor:
        return WindowExtractor(images, targets, plan, self.antialias, self.stretch, self.batch_size)

    def _filtered(self, scored: Scored | Extracted, plan: Plan) -> Scored | Extracted:
        kept = self._scored_and_kept(plan)[1]
        if kept == scored.which.shape[1]:
            return scored
        # In the plan's order: where all are kept, the windows need not be cut one by one.
        places = ranked(scored.logs, SCORES_APART)[:, :kept].sort(dim=-1).values
        which, logs = scored.which.gather(1, places), scored.logs.gather(1, places)
        if scored.maps is None:
            return Scored(which, logs)
        of_map = places[..., None, None].expand(-1, -1, *scored.maps.shape[2:])
        return Extracted(which, logs, scored.maps.gather(1, of_map))

    def _scored(self, model: nn.Module, extractor: WindowExtractor) -> Scored | Extracted:
        if self.coarse_to_fine is not None:
            return self._descended(model, extractor, self.coarse_to_fine)
        if self.base.single_forward:
            return extractor.extract(model, self.base)
        return extractor.score(model, self.activation)

    def _descended(self, model: nn.Module, extractor: WindowExtractor, share: float) -> Scored | Extracted:
        if self.base.single_forward:
            return descend(extractor, model, self.base, share, self._fuse)
        guide = GradCAM(activation=self.activation)
        try:
            scored = descend(extractor, model, guide, share, self._fuse)
        except ValueError as error:
            raise ValueError(
                f"SESS: coarse_to_fine descends by {guide} here, which fails; leave it out. {error}"
            ) from error
        return Scored(scored.which, scored.logs)  # The maps are the guide's, not the base's.


@dataclass(frozen=True)
class ContrastiveSESS(SESS):
    """SESS with the recommended settings, which differ from the paper's at the same cost.

    The base explains the log-odds of the class against the classes it could be mistaken for, each window's
    map keeps its own strength, weights are the fourth root of the scores, and maps are averaged over
    coverage, per scale. Each part needs the others. Log-odds are closer than logits to what insertion and
    deletion measure, so part of the gain in these is alignment with the metric: look at the Pointing Game and
    relevance mass, too.

    >>> ContrastiveSESS(num_scales=2)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    base: SaliencyMethod = field(default_factory=lambda: GradCAM(of="log_odds"))
    fusion: AnyFusion = "coverage"
    weight_power: float = field(default=0.25, kw_only=True)
    stretch: bool = field(default=False, kw_only=True)
