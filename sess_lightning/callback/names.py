"""Class names, normalisation and bands, found by walking through the objects around a training.

The walk visits child modules and whatever data sets, transforms and configurations hold, under any attribute.
It is bounded, reads stored attributes only, without computing any, and never raises.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

MOST_VISITED, MOST_ITEMS = 5000, 64
"""The most objects that a walk visits, and the most items of a list or dict that it looks into."""
LISTED = ("class_names", "classes", "categories", "label_names", "class_labels", "classes_", "labels")
INDEXED = ("idx_to_class", "id2label", "index_to_class", "class_to_idx", "label2id")
NORMALISATIONS = (
    ("mean", "std"), ("image_mean", "image_std"), ("pixel_mean", "pixel_std"), ("norm_mean", "norm_std"),
    ("img_mean", "img_std"),
)  # fmt: skip
BANDS = ("bands", "band_names", "all_band_names", "all_bands", "BAND_NAMES")


def find_class_names(*owners: Any, count: int | None = None) -> list[str] | None:
    """Return class names from the first owner that knows them: data module, data set, module, weights.

    Args:
        owners: In the order in which they are believed; of one, what is nearest to it.
        count: How many there must be, where that is known.
    """
    for place in _walk(owners):
        for name in (*LISTED, *INDEXED, *(["names"] if place.kind == "ClassLabel" else [])):
            names = _names(place.get(name))
            if names and count in (None, len(names)):
                return names
    return None


def find_normalisation(*owners: Any, channels: int | None = None) -> tuple[list[float], list[float]] | None:
    """Return (mean, std) per channel from the first owner that has them, or holds a ``Normalize``.

    Args:
        owners: In the order in which they are believed; of one, what is nearest to it.
        channels: Of the images, where that is known: there must be as many values, or one for all.
    """
    for place in _walk(owners):
        flags = place.get("flags") if place.normalises else None
        for source in (place, Place(flags, "", place.depth)) if isinstance(flags, dict) else (place,):
            for mean_name, std_name in NORMALISATIONS:
                if mean_name == "mean" and not place.is_believed:
                    continue
                mean, std = _floats(source.get(mean_name)), _floats(source.get(std_name))
                if not (mean and std and len(mean) == len(std) and all(value > 0 for value in std)):
                    continue
                if channels is None or len(mean) in (1, channels):
                    return mean, std
    return None


def find_display_channels(*owners: Any, channels: int | None = None) -> list[int] | None:
    """Return the red, green and blue channels, from the first data set that has ``rgb_bands``.

    Args:
        owners: In the order in which they are believed; of one, what is nearest to it.
        channels: Of the images, where that is known: there must be as many bands.
    """
    for place in _walk(owners):
        bands = place.get("rgb_bands")
        if not isinstance(bands, (list, tuple)) or len(bands) != 3:
            continue
        if all(isinstance(band, int) for band in bands):
            if channels is None or all(0 <= band < channels for band in bands):
                return list(bands)
            continue
        for name in BANDS:
            known = place.get(name)
            if not isinstance(known, (list, tuple)) or channels not in (None, len(known)):
                continue
            if all(band in known for band in bands):
                return [known.index(band) for band in bands]
    return None


class Place(NamedTuple):
    """An object that a walk has reached.

    Attributes:
        owner: The object.
        held_as: The attribute or key that holds it.
        depth: Number of steps from the owners.
    """

    owner: Any
    held_as: str
    depth: int

    @property
    def kind(self) -> str:
        """The name of its type."""
        return type(self.owner).__name__

    @property
    def normalises(self) -> bool:
        """Whether it is a transform that normalises."""
        kind = self.kind.lower()
        named = any(word in kind for word in ("normaliz", "normalis", "standardi", "preprocess"))
        return named and not kind.startswith(("denorm", "unnorm"))

    @property
    def is_believed(self) -> bool:
        """Whether its ``mean`` and ``std`` are a normalisation, not those of noise or a prior."""
        if isinstance(self.owner, dict):
            return self.held_as != "flags" and "noise" not in self.held_as.lower()
        is_named = any(word in self.held_as.lower() for word in ("norm", "cfg", "config", "process"))
        data = isinstance(self.owner, (Dataset, DataLoader)) or self.kind == "ImageClassification"
        return self.depth == 0 or self.normalises or is_named or data

    def get(self, name: str) -> Any:
        """Return what it holds under a name; computed attributes are not read."""
        if isinstance(self.owner, dict):
            return self.owner.get(name)
        for held in _held(self.owner):
            if name in held:
                return held[name]
        for kind in type(self.owner).__mro__:
            if name in vars(kind):
                value = vars(kind)[name]
                return None if hasattr(type(value), "__get__") else value
        return None


def _held(owner: Any) -> Iterator[Mapping[str, Any]]:
    """Yield an object's attributes; of a module also its children and buffers."""
    try:
        attributes = vars(owner)
    except TypeError:
        return
    yield attributes
    if isinstance(owner, nn.Module):
        for name in ("_modules", "_buffers"):
            if isinstance(attributes.get(name), dict):
                yield attributes[name]


def _walk(owners: Sequence[Any]) -> Iterator[Place]:
    """Walk from each owner to everything that it holds, nearest first."""
    seen: dict[int, Any] = {}  # Kept alive: the id of a deleted object may be reused.
    for owner in owners:
        queue, last = deque([Place(owner, "", 0)]), len(seen) + MOST_VISITED
        while queue and len(seen) < last:
            place = queue.popleft()
            if id(place.owner) in seen or not (place.depth == 0 or _is_worth(place.owner)):
                continue
            seen[id(place.owner)] = place.owner
            listed = isinstance(place.owner, (list, tuple))
            if not listed:
                yield place
            # The items of a list are as near as the list, and have its name.
            depth = place.depth + (not listed)
            children = _children(place.owner)
            queue.extend(Place(held, place.held_as if listed else name, depth) for name, held in children)


def _is_worth(value: Any) -> bool:
    """Whether it may hold names: not plain values, nor objects of libraries that know none."""
    if value is None or isinstance(value, (str, bytes, int, float, complex, Tensor, np.ndarray, type)):
        return False
    if isinstance(value, (dict, list, tuple, nn.Module, Dataset, DataLoader, partial)):
        return True
    library = type(value).__module__.partition(".")[0]
    if library in ("types", "argparse", "enum"):
        return hasattr(value, "__dict__") and not callable(value)
    return library not in sys.stdlib_module_names and library not in _SILENT


_SILENT = frozenset({
    "torch", "numpy", "pandas", "lightning", "pytorch_lightning", "lightning_fabric", "wandb", "torchmetrics",
})  # fmt: skip
_EVERY_MODULES = frozenset(vars(nn.Module()))


def _children(owner: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(owner, (list, tuple)):
        yield from (("", item) for item in owner[:MOST_ITEMS])
    elif isinstance(owner, dict):
        if len(owner) <= MOST_ITEMS:
            yield from ((str(key), value) for key, value in owner.items())
    elif isinstance(owner, partial):
        yield "keywords", owner.keywords
        if str(getattr(owner.func, "__module__", "")).startswith("torchvision."):
            yield "preset", owner()  # How torchvision's weights make their transforms.
    else:
        plain = type(owner).__module__.startswith(("torch.", "lightning.", "pytorch_lightning."))
        for held in _held(owner):
            for name, value in held.items():
                if name not in _EVERY_MODULES and (name == "_hparams" or not (plain and name[:1] == "_")):
                    yield name, value


def _names(value: Any) -> list[str] | None:
    """Read class names from a list (of synonyms, the first), or from a dict from or to indices."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "UO":
        value = value.tolist()
    if isinstance(value, dict):
        value = _by_index(value)
    if not isinstance(value, (list, tuple)) or not value:
        return None
    names = [item[0] if isinstance(item, tuple) and item else item for item in value]
    is_usable = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    # Hugging Face's default when nobody has named them.
    unnamed = all(str(name).startswith("LABEL_") for name in names)
    return names if is_usable and not unnamed else None


def _by_index(names: Mapping[Any, Any]) -> list[Any] | None:
    if names and all(isinstance(index, int) for index in names.values()):
        names = {index: name for name, index in names.items()}
    indices = [int(key) for key in names if str(key).isdecimal()]
    if len(indices) != len(names) or sorted(indices) != list(range(len(indices))):
        return None
    return [name for _, name in sorted(zip(indices, names.values(), strict=True), key=lambda pair: pair[0])]


def _floats(value: Any) -> list[float] | None:
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.flatten()[: MOST_ITEMS + 1].tolist()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MOST_ITEMS:
        return None
    is_usable = all(isinstance(item, (int, float)) and math.isfinite(item) for item in value)
    return [float(item) for item in value] if is_usable else None
