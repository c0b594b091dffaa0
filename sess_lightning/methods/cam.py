"""Class activation maps: one forward, and a backward through what follows the target layer only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.introspection import (
    borrowed,
    check_inputs,
    explaining,
    find_grid,
    gradient,
    head_forward,
    log_scores,
    resolve_layer,
    target_logits,
)
from sess_lightning.ops import full_precision, min_max_upsampled, size_of, upsample
from sess_lightning.types import Activation, Explanation, Extraction, SaliencyMethod


def layer_evidence(
    model: nn.Module,
    target_layer: str | nn.Module | None,
    images: Float[Tensor, "B C H W"],
    targets: Int[Tensor, " B"],
) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"], Float[Tensor, "B N"]]:
    """Return a layer's features and the target logit's gradients on its grid, and the logits: one forward.

    Raises:
        ValueError: If the layer's features lie on no grid.
        RuntimeError: If no gradient flows back to the layer.
    """
    layer = resolve_layer(model, target_layer, images)
    logits, features = head_forward(model, layer, images)
    grid = find_grid(features.shape, size_of(images))
    if grid is None or features.shape[0] != images.shape[0]:
        raise ValueError(
            f"target_layer {type(layer).__name__} gives features of shape {tuple(features.shape)}, which lie "
            f"on no grid over {tuple(images.shape)} images; name an earlier layer."
        )
    gradients = gradient(target_logits(logits, targets), features)
    on_grid = (grid.to_maps(tensor.detach()).to(torch.float32) for tensor in (features, gradients))
    return *on_grid, logits.detach()  # type: ignore[return-value]


@dataclass(frozen=True)
class GradCAM(SaliencyMethod):
    """Grad-CAM (Selvaraju et al., ICCV 2017): features weighted by their mean gradient, rectified.

    Written here rather than taken from a library because SESS calls it per window: scores and maps come out
    of one forward, the backward runs through the head only, and maps stay on the layer's small grid until
    fused.

    Attributes:
        target_layer: The layer, as a dotted name or a module; None finds the last one that keeps a grid.
        activation: How the model's logits become probabilities.
    """

    target_layer: str | nn.Module | None = None
    activation: Activation = "softmax"
    single_forward: ClassVar[bool] = True

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images``.

        Args:
            model: Any classifier.
            images: As the model takes them.
            targets: Class index of each image.

        Raises:
            ValueError: If the target layer is unknown, or its features lie on no grid.
            RuntimeError: If no gradient flows back to the target layer.
        """
        check_inputs(type(self).__name__, images, targets)
        maps, logs = self.extract(model, images, targets)
        return Explanation(upsample(maps, size_of(images)).clamp(0, 1), logs.exp())

    def extract(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Extraction:
        """Return maps on the layer's grid, and log-scores, from one forward."""
        with explaining(model):
            images, targets = borrowed(images), borrowed(targets)
            features, gradients, logits = layer_evidence(model, self.target_layer, images, targets)
            with torch.no_grad(), full_precision(images.device):
                maps = self.combine(features, gradients)
                logs = log_scores(logits, targets, self.activation)
                return Extraction(min_max_upsampled(maps, size_of(images)), logs)

    def combine(
        self, features: Float[Tensor, "B K h w"], gradients: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B h w"]:
        """Turn features and gradients into maps, any range."""
        weights = gradients.mean((2, 3), keepdim=True)
        return (weights * features).sum(1).relu()
