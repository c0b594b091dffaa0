"""Where in a model features are read: the layer, which of its calls, and their grids on the image."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sess_lightning.introspection.grids import Grid, find_grid, is_certain
from sess_lightning.introspection.hooks import NeverRanError, cut_forward
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.search import place_layer, search
from sess_lightning.ops import size_of


@dataclass(frozen=True)
class OnGrid:
    """A target layer whose grid is stated instead of found.

    ``GradCAM(OnGrid("blocks.11", Grid("tokens", 14, 14, extra=5)))`` reads the tokens of ``blocks.11`` as 14
    rows of 14 places behind 5 others.

    Attributes:
        layer: A dotted name or a module; None finds the last one that has such a grid.
        grid: How its features lie on the image.
    """

    layer: str | nn.Module | None
    grid: Grid


TargetLayer: TypeAlias = str | nn.Module | OnGrid | None
"""A dotted name, a module, either of them on a stated grid, or None to find one."""


class Site(NamedTuple):
    """Where in a model features are read.

    Attributes:
        name: Name of the layer.
        grids: For each of its calls that is read, by index in one forward pass, its grid on the image.
    """

    name: str
    grids: dict[int, Grid]

    def to_maps(self, features: Mapping[int, Tensor]) -> Float[Tensor, "B K h w"]:
        """Return the features of all calls that are read, or gradients by them, as channels of one grid."""
        maps = [grid.to_maps(features[call]) for call, grid in self.grids.items()]
        return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


_SITES: WeakKeyDictionary[nn.Module, dict[tuple[str | None, Grid | None, tuple[int, int]], Site]] = (
    WeakKeyDictionary()
)


def read_features(
    model: nn.Module, target_layer: TargetLayer, images: Float[Tensor, "B C H W"]
) -> tuple[Float[Tensor, "B N"], dict[int, Tensor], Site]:
    """Run one forward pass; return logits, the target layer's features, and how these lie on the images.

    The features are leaves of a graph up to the logits, by number of the layer's call. A layer that is to be
    found, or whose shape can be read in several ways, costs one more forward pass of one image, once per
    model and image size. One that was found is looked for anew if it does not run any more.

    Raises:
        ValueError: If the model has no such layer, or its features lie on no grid.
        NeverRanError: If the layer never ran.
    """
    name, stated = _named(model, target_layer)
    if name is None:
        site: Site | None = _found(model, stated, images)
    else:
        site = _SITES.get(model, {}).get((name, stated, size_of(images)))
    if site is not None:
        try:
            logits, features = cut_forward(model, _module(model, site.name), images, [*site.grids])
        except NeverRanError:
            if name is not None:
                raise
            # The model goes another way now, such as through its averaged weights from some epoch on.
            site = _found(model, stated, images, anew=True)
            logits, features = cut_forward(model, _module(model, site.name), images, [*site.grids])
    else:
        site, logits, features = _settle(model, str(name), stated, images)
    for call, grid in site.grids.items():
        if call not in features or not grid.fits(features[call].shape, len(images)):
            shape = tuple(features[call if call in features else max(features)].shape)
            raise ValueError(_no_grid(_module(model, site.name), shape, tuple(images.shape)))
    return logits, features, site


def _found(
    model: nn.Module, stated: Grid | None, images: Float[Tensor, "B C H W"], anew: bool = False
) -> Site:
    """Return where features are read if no layer is named; the search runs once."""
    key, sites = (None, stated, size_of(images)), _SITES.setdefault(model, {})
    if anew or key not in sites or not _has_module(model, sites[key].name):
        with explaining(model):
            sites[key] = Site(*search(model, borrowed(images[:1]), stated))
    return sites[key]


def _settle(
    model: nn.Module, name: str, stated: Grid | None, images: Float[Tensor, "B C H W"]
) -> tuple[Site, Float[Tensor, "B N"], dict[int, Tensor]]:
    """Run a named layer for the first time, and find out its features' grid on the images."""
    layer, size = _module(model, name), size_of(images)
    logits, features = cut_forward(model, layer, images)
    shape = tuple(features[0].shape)
    certain = stated or (find_grid(shape, size) if is_certain(shape, size) else None)
    if certain is not None and len(features) == 1:
        grids = {0: certain}
    else:
        with explaining(model):
            grids = place_layer(model, layer, borrowed(images[:1]), stated)
    if not grids:
        raise ValueError(_no_grid(layer, tuple(features[max(features)].shape), tuple(images.shape)))
    if max(grids) < max(features):  # Later calls would cut off those that are read.
        logits, features = cut_forward(model, layer, images, [*grids])
    site = _SITES.setdefault(model, {})[name, stated, size] = Site(name, grids)
    return site, logits, features


def resolve_layer(model: nn.Module, target_layer: TargetLayer, images: Float[Tensor, "B C H W"]) -> nn.Module:
    """Return the module that ``target_layer`` means: a module, a dotted name, or None to find one.

    Raises:
        ValueError: If the model has no such layer.
    """
    name, stated = _named(model, target_layer)
    return _module(model, _found(model, stated, images).name if name is None else name)


def find_target_layer(model: nn.Module, images: Float[Tensor, "B C H W"]) -> nn.Module:
    """Find the last layer whose features still lie on a grid, by one traced forward pass of one image.

    The answer is remembered per model and image size; ``search`` says which layer that is.

    Raises:
        ValueError: If no layer keeps a grid.
    """
    return resolve_layer(model, None, images)


def check_layer(model: nn.Module, target_layer: TargetLayer) -> None:
    """Refuse a target layer that the model does not have, without running anything.

    Raises:
        ValueError: Naming the most similar layers.
    """
    _named(model, target_layer)


def _named(model: nn.Module, target_layer: TargetLayer) -> tuple[str | None, Grid | None]:
    """Return the name that a layer has in the model (None: to be found), and its stated grid."""
    if isinstance(target_layer, OnGrid):
        return _named(model, target_layer.layer)[0], target_layer.grid
    if target_layer is None:
        return None, None
    if isinstance(target_layer, str) and target_layer and _has_module(model, target_layer):
        return target_layer, None
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(target_layer, nn.Module):
        for name, module in modules.items():
            if module is target_layer:
                return name, None
        raise ValueError(
            f"target_layer {type(target_layer).__name__} is not a part of this model; give one of its own "
            'modules, or a dotted name such as "layer4".'
        )
    if not isinstance(target_layer, str):
        raise TypeError(
            'target_layer must be one of the model\'s modules, its name such as "layer4.1", or OnGrid, got '
            f"{type(target_layer).__name__}; name a single layer; those of a Sequential are named by numbers."
        )
    names = {_plain(name): name for name in modules}
    if not target_layer or _plain(target_layer) not in names:
        raise ValueError(_unknown(target_layer, [name for name in names if name]))
    return names[_plain(target_layer)], None


def _module(model: nn.Module, name: str) -> nn.Module:
    for part in name.split(".") if name else ():
        model = model._modules[part]  # type: ignore[assignment]  # Scripted models have no get_submodule.
    return model


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(_module(model, name), nn.Module)
    except (KeyError, AttributeError):  # Not there, or inside of a module that is None.
        return False


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


_WRAPPED = frozenset({"_orig_mod", "_forward_module", "_original_module"})  # By torch.compile, by Fabric.


def _unknown(wanted: str, names: list[str]) -> str:
    top = [name for name in names if name.count(".") < 2]
    deeper = [name for name in names if wanted and name.endswith(f".{wanted}")]
    near = [*deeper, *(name for name in difflib.get_close_matches(wanted, names, 3) if name not in deeper)]
    text = (
        f"target_layer {wanted!r} is unknown; this model has, among others, {', '.join(top[-12:])}; leave it "
        "out to have one found."
    )
    return f"{text} Did you mean {' or '.join(map(repr, near[:3]))}?" if near else text


def _no_grid(layer: nn.Module, shape: tuple[int, ...], images: tuple[int, ...]) -> str:
    """Return the error message for a layer whose features lie on no grid."""
    return (
        f"target_layer {type(layer).__name__} gives features of shape {shape}, which lie on no grid over "
        f"{images} images; name an earlier layer, leave it out to have one found, or state how its features "
        "lie: OnGrid(name, Grid(...))."
    )
