"""The evidence for a class, with its features and gradients at a layer, from one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sess_lightning.introspection.hooks import gradients
from sess_lightning.introspection.layers import TargetLayer, read_features
from sess_lightning.introspection.logits import check_targets

Evidence: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, N) and targets (B,) -> the weights of the logits whose sum is the evidence, (B, N)."""
TEMPERATURE = 2.0
"""Softens the distribution over rival classes: at 1, a confident model would have a single rival."""
RIVALS = 50
"""How many rival classes count: the likeliest ones."""


def logit(logits: Float[Tensor, "B N"], targets: Int[Tensor, " B"]) -> Float[Tensor, "B N"]:
    """Weigh each target's logit by 1; a single logit speaks for class 1, and negated for class 0.

    A target that is not one of the model's classes has no weight at all.

    Raises:
        ValueError: If a target on the CPU is not one of the model's classes.
    """
    check_targets(logits, targets)
    if logits.shape[1] == 1:
        return ((targets == 1).to(logits) - (targets == 0).to(logits))[:, None]
    return _is_target(logits, targets).to(logits.dtype)


def log_odds(logits: Float[Tensor, "B N"], targets: Int[Tensor, " B"]) -> Float[Tensor, "B N"]:
    """Weigh each target's logit against those of the classes it could be mistaken for.

    Rivals have their share of the probability among rivals (at temperature 2, the 50 likeliest), held
    constant under differentiation, so that what speaks for the target and its rivals alike cancels. With two
    classes the weighted sum is the log-odds of the target; a head with a single logit gives those by itself.

    Raises:
        ValueError: If a target on the CPU is not one of the model's classes.
    """
    weights = logit(logits, targets)
    if logits.shape[1] == 1:
        return weights
    # In half precision a rival's weight would lose its digits before it is summed.
    rivals = logits.to(torch.float32).masked_fill(_is_target(logits, targets), -torch.inf) / TEMPERATURE
    likeliest = rivals.topk(min(RIVALS, logits.shape[1] - 1), dim=1)
    against = torch.zeros_like(rivals).scatter(1, likeliest.indices, likeliest.values.softmax(1))
    return (weights - against).to(logits.dtype)


def _is_target(logits: Tensor, targets: Tensor) -> Bool[Tensor, "B N"]:
    # Not one_hot, which reads the targets and waits for the device.
    return _numbers(logits.shape[1], logits.device) == targets[:, None]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _numbers(count: int, device: torch.device) -> Int[Tensor, " N"]:
    return torch.arange(count, device=device)


def layer_evidence(
    model: nn.Module,
    target_layer: TargetLayer,
    images: Float[Tensor, "B C H W"],
    targets: Int[Tensor, " B"],
    evidence: Evidence = logit,
) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"], Float[Tensor, "B N"]]:
    """Return a layer's features, the gradients on its grid of the evidence for a class, and the logits.

    All come from one forward pass.

    Args:
        model: Any classifier.
        target_layer: As for ``GradCAM``.
        images: As the model takes them.
        targets: Class index of each image.
        evidence: Logits and targets -> the weights of the logits whose sum is differentiated, by default
            the target's alone.

    Raises:
        ValueError: If the layer's features lie on no grid.
        RuntimeError: If no gradient flows back to the layer.
    """
    return next(class_evidence(model, target_layer, images, [targets], evidence))


def class_evidence(
    model: nn.Module,
    target_layer: TargetLayer,
    images: Float[Tensor, "B C H W"],
    targets: Sequence[Int[Tensor, " B"]],
    evidence: Evidence = logit,
) -> Iterator[tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"], Float[Tensor, "B N"]]]:
    """Yield what ``layer_evidence`` returns for each of several targets: one forward pass for all."""
    logits, features, site = read_features(model, target_layer, images)
    on_grid = site.to_maps(features).detach().to(torch.float32)
    for place, target in enumerate(targets, 1):
        weights = evidence(logits.detach(), target)
        slopes = gradients(logits, features, weights, retain_graph=place < len(targets))
        yield on_grid, site.to_maps(slopes).detach().to(torch.float32), logits.detach()
