"""Extremal perturbations: the smooth mask of a given area that best keeps the score, by gradient ascent."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sess_lightning.introspection.hooks import gradient
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import classify, target_logits
from sess_lightning.methods.templates import MapMethod
from sess_lightning.ops import full_precision, min_max, size_of
from sess_lightning.types import Activation

Perturbation: TypeAlias = Literal["blur", "fade"]
"""How ``ExtremalPerturbation`` hides pixels: by a stronger blur, or by fading to zero."""

Reward: TypeAlias = Literal["simple", "contrastive"]
"""What ``ExtremalPerturbation`` maximises: the target's logit, or its lead over the next."""

_LEVELS = 8  # Strengths of the perturbation, from the strongest to none.
_COLDNESS = 20  # How close the soft maximum comes to the true one.


@dataclass(frozen=True)
class ExtremalPerturbation(MapMethod):
    """Extremal perturbations (Fong et al., ICCV 2019): smooth masks of given areas that best keep the score.

    By TorchRay's rules, which the paper's numbers follow. The mask is a soft maximum of smooth bumps on a
    grid of parameters, with a margin of one ``sigma``. Outside it the image is blurred, more strongly where
    the mask is lower (up to a standard deviation of 20 px, in 8 levels; zero enters from the border). The
    mask's sorted values are drawn towards zeros and ones in the wanted proportion, margin included, with a
    weight that grows from 300 by 0.35 % a step. Optimised by gradient ascent with momentum, on the image and,
    every second step, on its mirror image. The map is the mean of the masks over all areas, blurred, as in
    TorchRay's pointing game.

    The areas are aimed at, not forced: for 0.05, 0.1 and 0.2, 800 steps ended at 0.06, 0.11 and 0.23
    (MobileNetV2, 112 px). Costs ``steps`` forward and backward passes for each area, and for scores a
    forward pass more: by far the most expensive method here.

    Attributes:
        areas: Shares of the image that masks may keep; TorchRay's choice for PASCAL VOC.
        steps: Steps of the ascent.
        reward: ``"simple"`` (the target's logit) or ``"contrastive"`` (its lead over the next logit).
        perturbation: ``"blur"`` or ``"fade"`` (to zero, the mean of normalised images).
        step: Distance between the mask's parameters, px.
        sigma: Reach of a bump, px, a multiple of ``step`` (else TorchRay's mask would not cover the image).
        smooth: Standard deviation of the final blur, as a share of the shorter side; 0 for none.
        batch_size: How many masked images go through the model at once; never fewer than one per area.
        activation: How the model's logits become probabilities (of the scores; the reward is in logits).

    >>> ExtremalPerturbation(areas=(0.2,), steps=2)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    areas: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2)
    steps: int = 800
    reward: Reward = "simple"
    perturbation: Perturbation = "blur"
    step: int = 7
    sigma: int = 21
    smooth: float = 0.09
    batch_size: int = 32
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "areas", tuple(self.areas))
        self.check_counts("steps", "step", "sigma", "batch_size")
        if not self.areas or not all(0 < area < 1 for area in self.areas):
            raise ValueError(f"ExtremalPerturbation: areas must be shares between 0 and 1, got {self.areas}.")
        if not self.smooth >= 0:
            raise ValueError(f"ExtremalPerturbation: smooth must not be negative, got {self.smooth}.")
        if self.sigma % self.step:
            raise ValueError(
                f"ExtremalPerturbation: sigma must be a multiple of step, got {self.sigma} and {self.step}."
            )
        if self.reward not in ("simple", "contrastive") or self.perturbation not in ("blur", "fade"):
            raise ValueError(
                'ExtremalPerturbation: reward must be "simple" or "contrastive", perturbation "blur" or '
                f'"fade", got {self.reward!r} and {self.perturbation!r}.'
            )

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """One per step and area."""
        return self.steps * len(self.areas)

    def maps(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the mean of the masks of all areas, blurred."""
        maps = self.masks(model, images, targets).mean(1)
        if self.smooth:
            maps = fading_blur(maps[:, None], self.smooth * min(size_of(images)))[:, 0]
        return min_max(maps)

    def masks(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B A H W"]:
        """Return the mask of each area."""
        with explaining(model):
            images, targets = borrowed(images), borrowed(targets)
            size = max(1, self.batch_size // len(self.areas))
            parts = zip(images.split(size), targets.split(size), strict=True)
            return torch.cat([self._ascend(model, *part) for part in parts])

    def _ascend(self, model: nn.Module, images: Tensor, targets: Tensor) -> Float[Tensor, "B A H W"]:
        levels = self._levels(images)
        bumps = Bumps(size_of(images), self.step, self.sigma)
        areas = len(self.areas)
        wanted = _sorted_masks(self.areas, bumps.padded, images.device)
        heights = torch.ones(len(images), areas, *bumps.grid, device=images.device)
        momentum, weight = torch.zeros(()), 300.0
        for step in range(self.steps):
            heights.requires_grad_()
            whole = bumps.mask(heights.flatten(0, 1)).unflatten(0, (-1, areas))
            masks = bumps.crop(whole)
            seen = perturbed(levels, masks).to(images.dtype).flatten(0, 1)
            logits = classify(model, seen.flip(3) if step % 2 == 0 else seen)
            rewards = self._rewards(logits.float(), targets.repeat_interleave(areas))
            misfit = (whole.flatten(2).sort(dim=2).values - wanted).square().mean(2)
            slope = gradient(rewards - weight * misfit.flatten(), heights)
            momentum = 0.9 * momentum + 0.1 * slope if step else slope
            heights = (heights.detach() + 0.01 * momentum).clamp(0, 1)
            weight *= 1.0035
        return masks.detach()

    def _levels(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "L B C H W"]:
        """Return the images from fully perturbed to untouched."""
        strengths = [1 - level / (_LEVELS - 1) for level in range(_LEVELS)]
        if self.perturbation == "fade":
            return torch.stack([(1 - strength) * images.float() for strength in strengths])
        return torch.stack([fading_blur(images, 20 * strength) for strength in strengths])

    def _rewards(self, logits: Float[Tensor, "N K"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        chosen = target_logits(logits, targets)
        if self.reward == "simple":
            return chosen
        if logits.shape[1] == 1:
            return 2 * chosen
        others = logits.scatter(1, targets[:, None].long(), -torch.inf)
        return chosen - others.amax(1)


class Bumps(NamedTuple):
    """Masks made of smooth bumps on a grid of parameters, by TorchRay's rules.

    A pixel's value is the soft maximum of the parameters around it, each times exp(-2 max(0, d / sigma -
    1/2)^2) of its distance d. The padded mask reaches a ``sigma`` beyond the image, so that bumps at the
    border cover as much as others.

    Attributes:
        size: (height, width) of the image.
        step: Distance between parameters, px.
        sigma: Reach of a bump, px.
    """

    size: tuple[int, int]
    step: int
    sigma: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of parameters."""
        return -(-self.size[0] // self.step), -(-self.size[1] // self.step)

    @property
    def _radius(self) -> int:
        return 1 - (-self.sigma // self.step)

    @property
    def _padding(self) -> int:
        return 1 - (-2 * self.sigma // self.step)

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) of the mask with its margin."""
        more = 2 * (self._padding - self._radius)
        return self.step * (self.grid[0] + more - 1) + 1, self.step * (self.grid[1] + more - 1) + 1

    def mask(self, heights: Float[Tensor, "N h w"]) -> Float[Tensor, "N H W"]:
        """Return padded masks."""
        around = F.unfold(heights[:, None], 2 * self._radius + 1, padding=self._padding)
        rows = self.grid[0] + 2 * (self._padding - self._radius)
        # (N, side^2, rows, 1, columns, 1) times (side^2, 1, step, 1, step): the kernel repeats every step.
        values = around.unflatten(2, (rows, -1))[:, :, :, None, :, None] * self._kernel(heights.device)
        shares = (_COLDNESS * values).softmax(1)
        drawn: Tensor = (values * shares).sum(1).flatten(3, 4).flatten(1, 2).clamp(0, 1)
        return drawn[:, : self.padded[0], : self.padded[1]]

    def _kernel(self, device: torch.device) -> Float[Tensor, "K 1 s 1 s"]:
        phase = torch.arange(self.step, device=device)
        place = torch.arange(2 * self._radius + 1, device=device)
        along = phase[None] - self.sigma + self.step * (self._padding - place[:, None])  # (side, step), px
        apart = (along[:, None, :, None] ** 2 + along[None, :, None, :] ** 2).float().sqrt() / self.sigma
        return torch.exp(-2 * (apart - 0.5).clamp(min=0) ** 2).flatten(0, 1)[:, None, :, None]

    def crop(self, masks: Float[Tensor, "*N P Q"]) -> Float[Tensor, "*N H W"]:
        """Cut the margin off."""
        (height, width), margin = self.size, self.sigma
        return masks[..., margin : margin + height, margin : margin + width]


def perturbed(
    levels: Float[Tensor, "L B C H W"], masks: Float[Tensor, "B A H W"]
) -> Float[Tensor, "B A C H W"]:
    """Interpolate between the two levels next to the mask's value: 0 is the first, 1 the last."""
    place = masks * (len(levels) - 1)
    # A NaN must not become an index: on a GPU, one out of range kills the whole process.
    low = place.detach().nan_to_num().floor().long().clamp(0, len(levels) - 1)
    shape = (-1, -1, levels.shape[2], -1, -1)

    def at(level: Int[Tensor, "B A H W"]) -> Float[Tensor, "B A C H W"]:
        level = level.clamp(max=len(levels) - 1)[None, :, :, None].expand(-1, *shape)
        return levels[:, :, None].expand(-1, -1, masks.shape[1], -1, -1, -1).gather(0, level)[0]

    return torch.lerp(at(low), at(low + 1), (place - low)[:, :, None].expand(shape))


def fading_blur(images: Float[Tensor, "B C H W"], sigma: float) -> Float[Tensor, "B C H W"]:
    """Blur with a Gaussian cut at 4 sigma; zero enters from the border. Float32."""
    reach = math.ceil(4 * sigma)
    if not reach:
        return images.float()

    def matrix(side: int) -> Float[Tensor, "{side} {side}"]:
        places = torch.arange(side, device=images.device)
        apart = (places[:, None] - places[None]).abs()
        whole = torch.arange(-reach, reach + 1, device=images.device)
        weights = torch.exp(-(apart**2) / (2 * sigma**2)) * (apart <= reach)
        return weights / torch.exp(-(whole**2) / (2 * sigma**2)).sum()

    rows, columns = (matrix(side) for side in size_of(images))
    with full_precision(images.device):
        return rows @ images.float() @ columns


def _sorted_masks(
    areas: tuple[float, ...], size: tuple[int, int], device: torch.device
) -> Float[Tensor, "A P"]:
    """Return the sorted pixels of ideal masks: zeros, then ones."""
    count = size[0] * size[1]
    ranks = torch.arange(count, device=device)
    return torch.stack([(ranks >= int(count * (1 - area))).float() for area in areas])
