"""What a model is: its logits, its scores, its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sess_lightning.introspection.hooks import _gradient, first_tensor, with_first_tensor
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import classify
from sess_lightning.ops import size_of

_FOUND: WeakKeyDictionary[nn.Module, dict[tuple[int, int], str]] = WeakKeyDictionary()


def resolve_layer(
    model: nn.Module, target_layer: str | nn.Module | None, images: Float[Tensor, "B C H W"]
) -> nn.Module:
    """Return the module that ``target_layer`` means: a module, a dotted name, or None to find one.

    Raises:
        ValueError: If the model has no such layer.
    """
    if target_layer is None:
        return find_target_layer(model, images)
    modules: dict[str, nn.Module] = {
        _plain(name): module for name, module in model.named_modules(remove_duplicate=False)
    }
    if isinstance(target_layer, nn.Module):
        if not any(module is target_layer for module in modules.values()):
            raise ValueError(
                f"target_layer {type(target_layer).__name__} is not a part of this model; give one of its "
                'own modules, or a dotted name such as "layer4".'
            )
        return target_layer
    found = modules.get(_plain(target_layer))
    if found is None or not target_layer:
        near = [name for name in modules if name and name.count(".") < 2]
        raise ValueError(
            f"target_layer {target_layer!r} is unknown; this model has, among others, "
            f"{', '.join(near[-12:])}; leave it out to have one found."
        )
    return found


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


_WRAPPED = frozenset({"_orig_mod", "_forward_module", "_original_module"})  # By torch.compile, by Fabric.


def find_target_layer(model: nn.Module, images: Float[Tensor, "B C H W"]) -> nn.Module:
    """Find the last layer whose features still lie on a grid, by one traced forward of one image.

    For a CNN that is the block before global pooling (ResNet's ``layer4``, VGG-16's last ReLU before its last
    pooling). For a transformer it is the last layer, keys and values aside, whose patch tokens still reach
    the logits: a class token is read at the end, so the very last layers tell nothing about place (ViT's last
    block's ``norm1``). The answer is remembered per model and image size.

    Raises:
        ValueError: If no layer keeps a grid.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    remembered = _FOUND.setdefault(model, {})
    size = size_of(images)
    if remembered.get(size) not in modules:
        with explaining(model):
            remembered[size] = _last_on_a_grid(model, borrowed(images[:1]))
    return modules[remembered[size]]


_PASS_THROUGH = (
    nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity, nn.Flatten,
    nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AvgPool1d, nn.MaxPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Softmax, nn.LogSoftmax,
)  # fmt: skip


def _last_on_a_grid(model: nn.Module, image: Float[Tensor, "1 C H W"]) -> str:
    size = size_of(image)
    logits, seen = _trace(model, image)
    probe = _probe(logits, seen)
    second_choice = None
    for name, features in reversed(seen):
        grid = find_grid(features.shape, size)
        if grid is None or features.shape[0] != 1:
            continue
        reached = _gradient(probe, features, retain_graph=True)
        if reached is None or not grid.to_maps(reached).any():
            continue
        # Keys and values, which a class token reads, are parts of the attention, not features of a place.
        projection = grid.layout == "tokens" and isinstance(model.get_submodule(name), nn.Linear)
        class_map = grid.channels == logits.shape[1] and _is_class_map(logits, features, grid)
        if not projection and not class_map:
            return name
        second_choice = second_choice or name
    if second_choice is not None:
        return second_choice
    tried = ", ".join(f"{name} {tuple(features.shape)}" for name, features in seen[-6:])
    raise ValueError(
        f"No layer with spatial features reaches the logits for a {size[0]}x{size[1]} image "
        f"(the last ones seen: {tried}). Name target_layer, or use larger images."
    )


def _trace(
    model: nn.Module, image: Float[Tensor, "1 C H W"]
) -> tuple[Float[Tensor, "1 N"], list[tuple[str, Tensor]]]:
    """Return the logits and what each layer gave, in order; layers that only pool or pass on are left out."""
    names = {module: name for name, module in model.named_modules() if name}
    seen: list[tuple[str, Tensor]] = []
    passed: list[tuple[Tensor, int]] = []  # Held, so that no tensor's identity is used twice.

    def note(module: nn.Module, _inputs: Any, output: Any) -> Any:
        try:
            features = first_tensor(output)
        except TypeError:
            return output
        if isinstance(module, _PASS_THROUGH):
            passed.append((features, features._version))
            return output
        # Written to since it passed, as by an activation in place, it is features again.
        merely_passed = any(features is tensor and features._version == v for tensor, v in passed)
        if merely_passed or not features.requires_grad:
            return output
        # A copy is reached by what reads the layer's output only, not by what the layer itself made of it:
        # Hugging Face's backbones give features and a pooled output, and the head reads the latter.
        features = features.clone()
        seen.append((names[module], features))
        return with_first_tensor(output, features)

    def record(_module: nn.Module, _inputs: Any) -> None:
        torch.set_grad_enabled(True)  # Even where the model's own `no_grad` wraps a frozen backbone.

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(record).remove)
            stack.callback(module.register_forward_hook(note).remove)
        return classify(model, image.requires_grad_().clone()), seen


def _is_class_map(logits: Float[Tensor, "1 N"], features: Tensor, grid: Grid) -> bool:
    """Whether the features are the logits before pooling: each logit then hangs on its own channel."""
    reached = _gradient(logits[0, 0], features, retain_graph=True)
    return reached is not None and not grid.to_maps(reached)[:, 1:].any()


def _probe(logits: Tensor, seen: list[tuple[str, Tensor]]) -> Tensor:
    """Return a scalar whose gradient tells what can reach the logits."""
    mix = torch.linspace(1, 2, logits.shape[1], device=logits.device, dtype=logits.dtype)
    probe = (logits * mix).sum()
    before_head = [
        features for _, features in seen if features.ndim == 2 and features.shape[1] != logits.shape[1]
    ]
    if not logits.any() and before_head:
        # A head of zeros, as an untrained torchvision ViT has, stops every gradient: look in front of it.
        probe = before_head[-1].cumsum(1).sum()
    return probe


@dataclass(frozen=True)
class Grid:
    """How a layer's features lie on the image.

    Attributes:
        layout: ``"channels"`` (B, C, h, w), ``"channels_last"`` (B, h, w, C) or ``"tokens"``
            (B, extra + h * w, C).
        height: Rows of the grid.
        width: Columns of the grid.
        channels: Feature channels.
        extra: Leading tokens that belong to no place (class, distillation, register tokens).
    """

    layout: str
    height: int
    width: int
    channels: int
    extra: int = field(default=0)

    def to_maps(self, features: Tensor) -> Float[Tensor, "B C h w"]:
        """Return features as (B, C, h, w)."""
        if self.layout == "channels_last":
            return features.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            features = features[:, self.extra :].unflatten(1, (self.height, self.width))
            return features.permute(0, 3, 1, 2)
        return features


def find_grid(shape: tuple[int, ...], size: tuple[int, int]) -> Grid | None:
    """Read a feature shape as a grid over an image of ``size``, or return None if it is none.

    Channels may come first or last: the reading whose proportions fit the image's wins, if they fit at all.
    Tokens (B, N, C) are read with the patch size that leaves the fewest tokens over.
    """
    height, width = size
    if len(shape) == 4:
        readings = [Grid("channels", shape[2], shape[3], shape[1]), Grid("channels_last", *shape[1:])]
        misfits = [_misfit(grid, height, width) for grid in readings]
        return readings[misfits.index(min(misfits))] if min(misfits) < 2 else None
    if len(shape) == 3 and shape[2] > 1:
        grids = {(height // patch, width // patch) for patch in range(2, min(height, width) + 1)}
        tokens = [
            Grid("tokens", *grid, shape[2], shape[1] - grid[0] * grid[1]) for grid in grids if grid != (1, 1)
        ]
        return min(
            (grid for grid in tokens if 0 <= grid.extra <= 32), key=lambda grid: grid.extra, default=None
        )
    return None


def _misfit(grid: Grid, height: int, width: int) -> float:
    """How many times longer or flatter the grid is than the image; infinite where it is no grid over it."""
    if grid.height * grid.width == 1 or grid.height > height or grid.width > width:
        return float("inf")
    ratio = grid.height * width / (grid.width * height)
    return max(ratio, 1 / ratio)


def input_window(model: nn.Module) -> int | None:
    """Return the side of the square input a model was built for, where it says so; None otherwise.

    Read from torchvision's ``image_size``, timm's ``pretrained_cfg`` and Hugging Face's
    ``config.image_size``, on the model or on a wrapped one.
    """
    for module in model.modules():
        for size in _stated_sizes(module):
            side = size[-1] if isinstance(size, (tuple, list)) and size else size
            if isinstance(side, int) and side > 0:
                return side
    return None


def _stated_sizes(module: nn.Module) -> Iterator[Any]:
    if hasattr(module, "encoder"):
        yield vars(module).get("image_size")
    cfg = vars(module).get("pretrained_cfg")
    if isinstance(cfg, Mapping) and cfg.get("fixed_input_size"):
        yield getattr(getattr(module, "patch_embed", None), "img_size", None)  # Of the model as it was made.
        yield cfg.get("input_size")
    config = vars(module).get("config")
    if config is not None and not isinstance(config, Mapping):
        yield getattr(config, "image_size", None)
