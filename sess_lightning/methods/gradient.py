"""Gradients of the target's logit with respect to the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from sess_lightning.introspection import (
    borrowed,
    check_inputs,
    classify,
    explaining,
    gradient,
    log_scores,
    target_logits,
)
from sess_lightning.ops import min_max, upper_percentile
from sess_lightning.types import Activation, Explanation, SaliencyMethod


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float, in_place: bool) -> Tensor:
        # The mask, not the output, is saved: what follows may write into the output.
        ctx.save_for_backward((x > 0) & (x < top))
        if in_place:
            ctx.mark_dirty(x)
            return x.clamp_(0, top)
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (passed,) = ctx.saved_tensors
        return grad.clamp(min=0) * passed, None, None


class guided_relu(TorchFunctionMode):  # noqa: N801
    """Inside, every ReLU and ReLU6 lets only positive gradients back, however the model calls it.

    Nothing is hooked or replaced on the model, so a ReLU that is a function, reused or in-place is guided
    too. Other activations (GELU, SiLU, Hardswish) keep their own gradient, as in the original method.
    """

    _PLAIN = frozenset({F.relu, torch.relu, Tensor.relu})
    _IN_PLACE = frozenset({F.relu_, torch.relu_, Tensor.relu_})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Guide ReLUs, pass everything else through."""
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if func in self._PLAIN or func in self._IN_PLACE:
            in_place = func in self._IN_PLACE or _argument(args, kwargs, 1, "inplace", False)
            return _GuidedReLU.apply(x, float("inf"), in_place)
        if func is F.relu6:
            return _GuidedReLU.apply(x, 6.0, _argument(args, kwargs, 1, "inplace", False))
        if func is F.hardtanh and _argument(args, kwargs, 1, "min_val", -1.0) == 0:
            top = float(_argument(args, kwargs, 2, "max_val", 1.0))
            return _GuidedReLU.apply(x, top, _argument(args, kwargs, 3, "inplace", False))
        return func(*args, **kwargs)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


@dataclass(frozen=True)
class GuidedBackprop(SaliencyMethod):
    """Guided backpropagation (Springenberg et al., 2015): the sum of |gradient| over channels.

    Values above the map's 99th percentile are clipped, as the paper's authors draw it. Their code drops its
    hooks after the first window, so that all later windows are plain gradients; here every window is guided.

    Attributes:
        percentile: Where a map is clipped from above; 100 clips nothing.
        activation: How the model's logits become probabilities.
    """

    percentile: float = 99.0
    activation: Activation = "softmax"

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images``: one forward, one backward to the pixels.

        Raises:
            RuntimeError: If no gradient flows from the logits back to the pixels.
        """
        check_inputs(type(self).__name__, images, targets)
        with explaining(model):
            pixels, targets = borrowed(images).requires_grad_(), borrowed(targets)
            # The backward is inside, too: checkpointed activations are computed again there.
            with guided_relu():
                logits = classify(model, pixels.clone())
                gradients = gradient(target_logits(logits, targets), pixels)
        with torch.no_grad():
            maps = gradients.to(torch.float32).abs().sum(1)
            maps = maps.clamp(max=upper_percentile(maps, self.percentile)[:, None, None])
            return Explanation(min_max(maps), log_scores(logits.detach(), targets, self.activation).exp())
