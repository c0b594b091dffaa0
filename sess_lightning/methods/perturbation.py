"""Methods that score masked images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.batching import batch_limit, blank_batch, by_image, in_batches
from sess_lightning.introspection.layers import TargetLayer
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs, classify, log_scores, score, target_logits
from sess_lightning.introspection.sizes import blank_image
from sess_lightning.methods.evidence import layer_evidence
from sess_lightning.methods.extremal import Bumps as Bumps  # Under its own name: defined here once.
from sess_lightning.methods.extremal import ExtremalPerturbation as ExtremalPerturbation
from sess_lightning.methods.extremal import Perturbation as Perturbation
from sess_lightning.methods.extremal import Reward as Reward
from sess_lightning.methods.extremal import fading_blur as fading_blur
from sess_lightning.methods.extremal import perturbed as perturbed
from sess_lightning.methods.gradient import generator
from sess_lightning.methods.templates import ExtractingMethod, MapMethod
from sess_lightning.ops import (
    blur,
    full_precision,
    min_max,
    min_max_upsampled,
    resize_matrix,
    size_of,
    upsample,
)
from sess_lightning.types import Activation, Explanation, Extraction, SaliencyMethod


@dataclass(frozen=True)
class GroupCAM(ExtractingMethod):
    """Group-CAM (Zhang et al., 2021): groups of weighted features, weighted by their gain.

    A flat group reveals nothing and scores 0 (in the SESS authors' code it loses the whole window). As in
    their code no percentile is cut from the groups, and it is the groups themselves that are summed, not
    their masks.

    Attributes:
        groups: Number of groups, and of masked images.
        target_layer: As for ``GradCAM``.
        kernel_size: Side of the Gaussian kernel that makes the uninformative image, px.
        sigma: Its standard deviation, px.
        batch_size: How many masked images go through the model at once; None takes what memory allows.
        activation: How the model's logits become probabilities.

    >>> GroupCAM(groups=4)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    groups: int = 32
    target_layer: TargetLayer = None
    kernel_size: int = 51
    sigma: float = 50.0
    batch_size: int | None = None
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        self.check_counts("groups", "batch_size")

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """One for the features, one for the blurred image, one per group."""
        return 2 + self.groups

    def draw(self, maps: Float[Tensor, "B h w"], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
        """Return maps at full resolution, stretched to [0, 1]."""
        return min_max(upsample(maps, size))

    def extract(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Extraction:
        """Return maps on the layer's grid, and log-scores."""
        size = size_of(images)
        with explaining(model):
            # Before the forward pass, which may write to them.
            images, given = images.contiguous(memory_format=torch.channels_last), borrowed(images)
            features, gradients, logits = layer_evidence(model, self.target_layer, given, targets)
            with torch.no_grad():
                weighted = gradients.mean((2, 3), keepdim=True) * features
                groups = torch.stack([part.sum(1) for part in weighted.chunk(self.groups, 1)], 1).relu()
                masks = min_max_upsampled(groups.flatten(0, 1), size)[0].unflatten(0, groups.shape[:2])
                gains = self._gains(model, images, masks, targets)
                maps = min_max_upsampled((groups * gains[:, :, None, None]).sum(1), size)[0]
                return Extraction(maps, log_scores(logits, targets, self.activation))

    def _gains(
        self, model: nn.Module, images: Tensor, masks: Float[Tensor, "B G h w"], targets: Tensor
    ) -> Float[Tensor, "B G"]:
        groups, size = masks.shape[1], size_of(images)
        blurred = blur(images, self.kernel_size, self.sigma).to(images)
        blurred = blurred.contiguous(memory_format=torch.channels_last)
        revealed = images - blurred
        target_of = targets.repeat_interleave(groups)

        def after(_: Sequence[int], which: slice) -> Tensor:
            masked = blank_batch(which.stop - which.start, images)
            for image, some, place in by_image(which, groups):
                mask = upsample(masks[image, some], size)[:, None].to(images.dtype)
                torch.addcmul(blurred[image], revealed[image], mask, out=masked[place])
            return score(model, masked, target_of[which], self.activation).exp()

        after_parts = in_batches(after, range(len(target_of)), batch_limit(self.batch_size, images))
        before = score(model, blurred, targets, self.activation).exp()
        gains: Tensor = torch.cat(list(after_parts)).unflatten(0, (-1, groups)) - before[:, None]
        return gains.relu()


Weighting: TypeAlias = Literal["probability", "softmax"]
"""How ``ScoreCAM`` weighs a channel: by the target's probability, or by a softmax of logits over channels."""


@dataclass(frozen=True)
class ScoreCAM(SaliencyMethod):
    """Score-CAM (Wang et al., 2020): each channel is weighted by the score of the image seen through it.

    A channel is upsampled and stretched to [0, 1] to become a mask; what it hides is zero, the mean of
    normalised images. The paper defines two weights: in its text, and in its authors' code, the target's
    probability on the masked image (``"probability"``); in its algorithm 1, a softmax over channels of the
    target's scores (``"softmax"``, here of logits, as in the ``grad-cam`` package: the baseline that the
    algorithm subtracts cancels out). A flat channel hides nothing in particular and is left out, as in the
    authors' code.

    Costs one forward pass per channel of the layer and one for the features (with a backward pass through the
    head, which is not used).

    Attributes:
        target_layer: As for ``GradCAM``.
        weighting: ``"probability"`` or ``"softmax"``.
        batch_size: How many masked images go through the model at once; never fewer than one per image.
        activation: How the model's logits become probabilities.

    >>> ScoreCAM()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    target_layer: TargetLayer = None
    weighting: Weighting = "probability"
    batch_size: int = 32
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        if self.weighting not in ("probability", "softmax"):
            raise ValueError(
                f'ScoreCAM: weighting must be "probability" or "softmax", got {self.weighting!r}.'
            )
        self.check_counts("batch_size")

    def count_forwards(self, model: nn.Module, size: tuple[int, int]) -> int:
        """Return one more than the layer's channels, which a forward pass of one image shows."""
        image = blank_image(model, size)
        target = torch.zeros(1, dtype=torch.long, device=image.device)
        with explaining(model):
            return 1 + layer_evidence(model, self.target_layer, image, target)[0].shape[1]

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images``; raises what ``GradCAM`` raises."""
        check_inputs(type(self).__name__, images, targets)
        size = size_of(images)
        with explaining(model):
            images, targets = borrowed(images), borrowed(targets)
            features, _, logits = layer_evidence(model, self.target_layer, images, targets)
            with torch.no_grad():
                scores, usable = [], []
                for part in features.split(max(1, self.batch_size // len(images)), dim=1):
                    masks = min_max(upsample(part.flatten(0, 1), size)).unflatten(0, part.shape[:2])
                    usable.append(masks.amax((2, 3)) > 0)
                    scores.append(self._scores(model, images, masks.transpose(0, 1), targets).T)
                weights = torch.cat(scores, 1)
                if self.weighting == "softmax":
                    weights = weights.softmax(1)
                weights = weights.where(torch.cat(usable, 1), 0)
                maps = (weights[:, :, None, None] * features).sum(1)
                # Rectified after upsampling, as in the authors' code.
                return Explanation(
                    min_max(upsample(maps, size).relu()), log_scores(logits, targets, self.activation).exp()
                )

    def _scores(
        self, model: nn.Module, images: Tensor, masks: Float[Tensor, "M B H W"], targets: Tensor
    ) -> Float[Tensor, "M B"]:
        logits = classify(model, (masks[:, :, None].to(images.dtype) * images).flatten(0, 1))
        targets = targets.repeat(len(masks))
        if self.weighting == "softmax":
            scores = target_logits(logits.float(), targets)
        else:
            scores = log_scores(logits, targets, self.activation).exp()
        by_mask: Tensor = scores.unflatten(0, masks.shape[:2])
        return by_mask


@dataclass(frozen=True)
class RISE(MapMethod):
    """RISE (Petsiuk et al., BMVC 2018): random masks, averaged by what the image scores under each.

    A mask is a coin-tossed grid of cells, enlarged bilinearly and cropped at a random shift of up to a cell,
    as in the authors' code (a grid of ``cells`` squared, drawn ``cells + 1`` cells large), with the border
    clamped where scikit-image mirrors it. What a mask hides is zero, the mean of normalised images. The
    division by the expected mask value, the same everywhere, has no effect, since min-max undoes it. All
    images of a batch meet the same masks.

    Grids are drawn on the images' device by a generator of their own, all at once (they are small); masks are
    made when they are used, so that memory does not grow with their number. Costs ``num_masks`` forward
    passes; scores cost one more.

    Attributes:
        num_masks: Masks; the paper takes 4000 for VGG-16 and 8000 for ResNet-50.
        cells: Cells along a side.
        probability: Probability that a cell stays visible.
        seed: Seed of its own generator; the global one is never touched.
        batch_size: How many masked images go through the model at once; never fewer than one per image.
        activation: How the model's logits become probabilities.

    >>> RISE(num_masks=4)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    num_masks: int = 8000
    cells: int = 7
    probability: float = 0.5
    seed: int = 0
    batch_size: int = 32
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        self.check_counts("num_masks", "cells", "batch_size")
        if not 0 < self.probability < 1:
            raise ValueError(f"RISE: probability must be between 0 and 1, got {self.probability}.")

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """One per mask."""
        return self.num_masks

    @torch.no_grad()
    def maps(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the mean of the masks, weighted by the scores; no gradient is needed."""
        grids, shifts = self.draw(size_of(images), images.device)
        total = torch.zeros_like(images[:, 0], dtype=torch.float32)
        size = max(1, self.batch_size // len(images))
        for grid, shift in zip(grids.split(size), shifts.split(size), strict=True):
            masks = rise_masks(grid, shift, size_of(images))
            masked = (masks[:, None, None].to(images.dtype) * images).flatten(0, 1)
            logs = score(model, masked, targets.repeat(len(masks)), self.activation)
            with full_precision(images.device):
                total += torch.tensordot(logs.exp().unflatten(0, (len(masks), -1)), masks, ([0], [0]))
        return min_max(total / (self.num_masks * self.probability))

    def draw(
        self, size: tuple[int, int], device: torch.device
    ) -> tuple[Float[Tensor, "N c c"], Int[Tensor, "N 2"]]:
        """Draw every mask's grid, and its shift (down, right), px."""
        source = generator(device, self.seed)
        shape = (self.num_masks, self.cells, self.cells)
        grids = torch.rand(shape, generator=source, device=device) < self.probability
        down, right = (
            torch.randint(-(-side // self.cells), (self.num_masks,), generator=source, device=device)
            for side in size
        )
        return grids.to(torch.float32), torch.stack([down, right], 1)


def rise_masks(
    grids: Float[Tensor, "N c c"], shifts: Int[Tensor, "N 2"], size: tuple[int, int]
) -> Float[Tensor, "N {size[0]} {size[1]}"]:
    """Enlarge grids by one cell more than ``size`` and crop them at ``shifts``: two small products each."""
    cells = grids.shape[-1]

    def strips(axis: int) -> Float[Tensor, "N n c"]:
        side = size[axis]
        enlarge = resize_matrix(cells, (cells + 1) * -(-side // cells), grids.device)
        return enlarge[shifts[:, axis, None] + torch.arange(side, device=grids.device)]

    with full_precision(grids.device):
        return strips(0) @ grids @ strips(1).mT
