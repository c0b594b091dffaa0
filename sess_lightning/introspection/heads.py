"""Heads of classifiers: whether one is a single linear layer on the mean of a layer's features."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sess_lightning.introspection.layers import TargetLayer, read_features, resolve_layer

_LINEAR_HEADS: WeakKeyDictionary[nn.Module, tuple[str, ref[nn.Module]]] = WeakKeyDictionary()


def check_linear_head(model: nn.Module, target_layer: TargetLayer, image: Float[Tensor, "1 C H W"]) -> None:
    """Refuse a model without CAM's head, by a forward pass of one image, remembered per layer."""
    layer = resolve_layer(model, target_layer, image)
    names = {module: name for name, module in model.named_modules()}
    remembered = _LINEAR_HEADS.get(layer)
    if remembered is not None and names.get(remembered[1]() or layer) == remembered[0]:
        return
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        calls.append((module, inputs[0], output))

    with ExitStack() as stack, torch.no_grad():
        for module in names:
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(note).remove)
        logits, features, site = read_features(model, target_layer, image)
    pooled = site.to_maps(features).mean((2, 3))
    for module, given, output in calls:
        if _alike(given, pooled) and _alike(output, logits):
            _LINEAR_HEADS[layer] = names[module], ref(module)
            return
    raise ValueError(
        f"CAM: the head is not a single linear layer on the mean of target_layer {type(layer).__name__}'s "
        "features over places, which CAM is defined by; use GradCAM, or HiResCAM for other linear heads."
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    precision = 1e-4 if one.dtype.itemsize >= 4 else 2e-2
    one, other = (tensor.detach().flatten().float() for tensor in (one, other))
    return len(one) == len(other) and torch.allclose(one, other, rtol=precision, atol=precision)
