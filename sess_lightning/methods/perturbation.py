"""Methods that ask the model about changed images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.introspection import borrowed, check_inputs, explaining, log_scores, score
from sess_lightning.methods.cam import layer_evidence
from sess_lightning.ops import blur, min_max, size_of, upsample
from sess_lightning.types import Activation, Explanation, SaliencyMethod


@dataclass(frozen=True)
class GroupCAM(SaliencyMethod):
    """Group-CAM (Zhang et al., 2021): groups of weighted features, weighted by their gain.

    A flat group reveals nothing and scores 0 (in the SESS authors' code it loses the whole window). As in
    their code no percentile is cut from the groups, and it is the groups themselves that are summed, not
    their masks.

    Attributes:
        groups: Number of groups, and of masked images.
        target_layer: As for ``GradCAM``.
        kernel_size: Side of the Gaussian kernel that makes the uninformative image, px.
        sigma: Its standard deviation, px.
        batch_size: How many masked images go through the model at once.
        activation: How the model's logits become probabilities.
    """

    groups: int = 32
    target_layer: str | nn.Module | None = None
    kernel_size: int = 51
    sigma: float = 50.0
    batch_size: int = 32
    activation: Activation = "softmax"

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """One for the features, one for the blurred image, one per group."""
        return 2 + self.groups

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images``; raises what ``GradCAM`` raises."""
        check_inputs(type(self).__name__, images, targets)
        size = size_of(images)
        with explaining(model):
            images, targets = borrowed(images), borrowed(targets)
            features, gradients, logits = layer_evidence(model, self.target_layer, images, targets)
            with torch.no_grad():
                weighted = gradients.mean((2, 3), keepdim=True) * features
                groups = torch.stack([part.sum(1) for part in weighted.chunk(self.groups, 1)], 1).relu()
                masks = min_max(upsample(groups.flatten(0, 1), size)).unflatten(0, groups.shape[:2])
                gains = self._gains(model, images, masks, targets)
                maps = min_max(upsample((groups * gains[:, :, None, None]).sum(1), size))
            return Explanation(maps, log_scores(logits, targets, self.activation).exp())

    def _gains(
        self, model: nn.Module, images: Tensor, masks: Float[Tensor, "B G H W"], targets: Tensor
    ) -> Float[Tensor, "B G"]:
        groups = masks.shape[1]
        blurred = blur(images, self.kernel_size, self.sigma).to(images.dtype)
        before = score(model, blurred, targets, self.activation).exp()
        image_of = torch.arange(images.shape[0], device=images.device).repeat_interleave(groups)
        after = [
            score(
                model,
                torch.lerp(blurred[which], images[which], mask[:, None].to(images.dtype)),
                targets[which],
                self.activation,
            ).exp()
            for which, mask in zip(
                image_of.split(self.batch_size), masks.flatten(0, 1).split(self.batch_size), strict=True
            )
        ]
        gains: Tensor = torch.cat(after).unflatten(0, (-1, groups)) - before[:, None]
        return gains.relu()
