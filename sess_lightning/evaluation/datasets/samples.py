"""Images, their classes, and where these are."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor
from torch.utils.data import Dataset

from sess_lightning.evaluation.datasets.pictures import BrokenSampleError, read_pixels
from sess_lightning.regions import box_masks

Region: TypeAlias = Tensor
"""Where a class is: a mask, bool (H, W), or boxes, float (N, 4), half-open (x0, y0, x1, y1) px."""
Regions: TypeAlias = Literal["masks", "boxes"]
SMALL = 0.25
"""Share of the image below which a region is in the "difficult" subset, if there are other classes."""


class Trial(NamedTuple):
    """One class on one image.

    Attributes:
        target: The model's class index.
        region: Where the class is, at the image's original resolution; None if unknown.
        difficult: Whether the trial is in the "difficult" subset; None if unknown.
    """

    target: int
    region: Region | None
    difficult: bool | None


class Sample(NamedTuple):
    """An image and the classes on it.

    Attributes:
        id: The image's name in the data set.
        path: Its file.
        size: (height, width), px.
        trials: One per class.
        skipped: Classes left out because all their objects are marked difficult.
    """

    id: str
    path: Path
    size: tuple[int, int]
    trials: tuple[Trial, ...]
    skipped: int = 0


class Benchmark(Dataset[Sample]):
    """A data set of images with classes and their regions.

    Attributes:
        class_names: Name of each class index, where known.
        ids: Name of each image.
        is_labelled: Whether anything says which classes are on the images; otherwise the predicted ones are
            explained (``Experiment(target="predicted")``).
        options: Other settings that the trials depend on, as text.
    """

    class_names: Sequence[str] = ()
    ids: Sequence[str] = ()
    is_labelled: bool = True
    options: Mapping[str, str] = MappingProxyType({})
    _flags: Mapping[str, Sequence[bool]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations.

        Raises:
            BrokenSampleError: If they are missing or damaged.
        """

    def read_difficult(self, path: str | Path | None) -> str:
        """Read a published "difficult" list, if there is one; return what identifies the subset."""
        if path is None:
            return "by rule"
        self._flags = read_flags(path, len(self.class_names))
        return hashlib.sha256(repr(self._flags).encode()).hexdigest()[:16]

    def flags_of(self, name: str) -> Sequence[bool] | None:
        """Return by class whether an image is "difficult"; None if the rule decides.

        An image that is not listed is.
        """
        return None if self._flags is None else self._flags.get(name, (True,) * len(self.class_names))


def read_picture(sample: Sample) -> Real[Tensor, "3 H W"]:
    """Decode a sample's image as ``read_pixels`` does.

    Raises:
        BrokenSampleError: If the file is missing or damaged, or its size differs from the annotations'.
    """
    picture = read_pixels(sample.path)
    if tuple(picture.shape[1:]) != sample.size:
        actual, annotated = ("x".join(map(str, size)) for size in (picture.shape[1:], sample.size))
        raise BrokenSampleError(
            f"{sample.path}: the image is {actual} px (height x width), its annotations say {annotated}."
        )
    return picture


def read_flags(path: str | Path, class_count: int) -> dict[str, tuple[bool, ...]]:
    """Read a published "difficult" list: per line an image id, then one 0 or 1 per class.

    Raises:
        ValueError: If a line has another number of flags, or a flag is neither 0 nor 1.
    """
    flags = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        name, *values = line.split()
        if len(values) != class_count or not set(values) <= {"0", "1"}:
            raise ValueError(
                f"{path}, line {number}: expected an image id and {class_count} flags of 0 or 1, "
                f"got {len(values)} values."
            )
        flags[name] = tuple(value == "1" for value in values)
    return flags


def covered(region: Region, size: tuple[int, int]) -> float:
    """Return the share of an image of ``size`` (height, width) that a region covers."""
    if region.dtype != torch.bool:
        region = boxes_to_mask(region, size)
    return float(region.float().mean())


def boxes_to_mask(boxes: Float[Tensor, "N 4"], size: tuple[int, int]) -> Bool[Tensor, "H W"]:
    """Return the pixels whose centre is in one of the half-open boxes."""
    return box_masks([boxes], size, boxes.device)[0]


def make_trials(
    regions: Mapping[int, Region],
    size: tuple[int, int],
    flags: Sequence[bool] | None,
    others: int,
) -> tuple[Trial, ...]:
    """Turn regions into trials; "difficult" is what ``flags`` say, else small among other classes."""

    def is_difficult(target: int, region: Region) -> bool:
        return flags[target] if flags is not None else others > 1 and covered(region, size) < SMALL

    return tuple(
        Trial(target, region, is_difficult(target, region)) for target, region in sorted(regions.items())
    )
