"""The evidence for a class, with its features and gradients at a layer, from one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.introspection.hooks import gradients
from sess_lightning.introspection.layers import TargetLayer, read_features
from sess_lightning.introspection.logits import target_logits

Evidence: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, N) and targets (B,) -> the evidence for each target, (B,)."""
TEMPERATURE = 2.0
"""Softens the distribution over rival classes: at 1, a confident model would have a single rival."""
RIVALS = 50
"""How many rival classes count: the likeliest ones."""


def log_odds(logits: Float[Tensor, "B N"], targets: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return each target's logit less the mean logit of the classes it could be mistaken for.

    The mean is weighted by the probability of each rival class (at temperature 2, the 50 likeliest, held
    constant under differentiation), so that what speaks for the target and its rivals alike cancels. With two
    classes this is the log-odds of the target; a head with a single logit gives those by itself.
    """
    logits = logits.to(torch.float32)
    if logits.shape[1] == 1:
        return target_logits(logits, targets)
    # Not one_hot, which reads the targets and waits for the device.
    chosen = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    rivals = logits.detach().masked_fill(chosen, -torch.inf) / TEMPERATURE
    likeliest = rivals.topk(min(RIVALS, logits.shape[1] - 1), dim=1)
    mean = (likeliest.values.softmax(1) * logits.gather(1, likeliest.indices)).sum(1)
    return target_logits(logits, targets) - mean


def layer_evidence(
    model: nn.Module,
    target_layer: TargetLayer,
    images: Float[Tensor, "B C H W"],
    targets: Int[Tensor, " B"],
    evidence: Evidence = target_logits,
) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"], Float[Tensor, "B N"]]:
    """Return a layer's features, the gradients on its grid of the evidence for a class, and the logits.

    All come from one forward pass.

    Args:
        model: Any classifier.
        target_layer: As for ``GradCAM``.
        images: As the model takes them.
        targets: Class index of each image.
        evidence: Logits and targets -> what is differentiated, by default the target's logit.

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
    evidence: Evidence = target_logits,
) -> Iterator[tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"], Float[Tensor, "B N"]]]:
    """Yield what ``layer_evidence`` returns for each of several targets: one forward pass for all."""
    logits, features, site = read_features(model, target_layer, images)
    on_grid = site.to_maps(features).detach().to(torch.float32)
    for place, each in enumerate(targets, 1):
        found = gradients(evidence(logits, each), features, retain_graph=place < len(targets))
        yield on_grid, site.to_maps(found).detach().to(torch.float32), logits.detach()
