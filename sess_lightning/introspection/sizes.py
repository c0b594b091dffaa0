"""Which image sizes a model takes: those it was fed, and the one it says it was built for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sess_lightning.introspection.lending import explaining

Size = tuple[int, int]

_TAKES: WeakKeyDictionary[nn.Module, dict[Size, bool]] = WeakKeyDictionary()


def note_fed(model: nn.Module, size: Size) -> None:
    """Note that a model has taken images of a size, (height, width), so that it need not be tried."""
    _TAKES.setdefault(model, {})[size] = True


def input_size(model: nn.Module, size: Size) -> Size:
    """Return the (height, width) of windows that a model takes.

    It is that of the images, unless the model states another size and refuses such images, as one forward
    pass of zeros shows, once per model and size: then it is the stated one.

    Args:
        model: Any classifier.
        size: (height, width) of the images.
    """
    known = _TAKES.setdefault(model, {})
    if not known.get(size):
        stated = stated_size(model)  # A walk through all modules, which is not repeated.
        if stated is not None and stated != size and not takes(model, size):
            return stated
        known[size] = True
    return size


def takes(model: nn.Module, size: Size) -> bool:
    """Return whether a model takes images of a size, by a forward pass of zeros, once per model and size."""
    known = _TAKES.setdefault(model, {})
    if size not in known:
        try:
            with explaining(model), torch.no_grad():
                model(blank_image(model, size))
            known[size] = True
        except Exception:  # noqa: BLE001 (Models refuse with anything; that they do is the answer.)
            known[size] = False
    return known[size]


def blank_image(model: nn.Module, size: Size) -> Float[Tensor, "1 C H W"]:
    """Return zeros with as many channels as a model's first convolution takes, of its type and device."""
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    weight = next(model.parameters(), torch.zeros(0)) if first is None else first.weight
    channels = 3 if first is None else first.in_channels
    return torch.zeros(1, channels, *size, dtype=weight.dtype, device=weight.device)


def input_window(model: nn.Module) -> int | None:
    """Return the shorter side of ``stated_size``; None if the model states none."""
    size = stated_size(model)
    return None if size is None else min(size)


def stated_size(model: nn.Module) -> Size | None:
    """Return the (height, width) that a model says it was built for; None if it does not say.

    Read from torchvision's ``image_size``, timm's ``pretrained_cfg`` and Hugging Face's
    ``config.image_size``, on the model or on a wrapped one.
    """
    for module in model.modules():
        for size in _stated_sizes(module):
            sides = [*size[-2:]] if isinstance(size, (tuple, list)) else [size]
            if sides and all(isinstance(side, int) and side > 0 for side in sides):
                return sides[0], sides[-1]
    return None


def _stated_sizes(module: nn.Module) -> Iterator[Any]:
    if "encoder" in vars(module) or "encoder" in module._modules:
        yield vars(module).get("image_size")
    cfg = vars(module).get("pretrained_cfg")
    if isinstance(cfg, Mapping) and cfg.get("fixed_input_size"):
        yield getattr(getattr(module, "patch_embed", None), "img_size", None)  # That of the model as made.
        yield cfg.get("input_size")
    config = vars(module).get("config")
    if config is not None and not isinstance(config, Mapping):
        yield getattr(config, "image_size", None)
