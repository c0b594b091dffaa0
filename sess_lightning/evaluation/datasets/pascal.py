"""PASCAL VOC, and annotations in its XML format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch
from jaxtyping import Float
from torch import Tensor

from sess_lightning.evaluation.datasets.pictures import BrokenSampleError
from sess_lightning.evaluation.datasets.samples import Benchmark, Sample, make_trials

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class VOC07(Benchmark):
    """PASCAL VOC 2007, as ``torchvision.datasets.VOCDetection`` finds it: ``VOCdevkit/VOC2007`` in ``root``.

    A region is the union of the class's boxes, including those of objects marked difficult; a class is left
    out only if all its objects are marked so. VOC counts pixels from 1, both ends included.

    Args:
        root: The folder that holds ``VOCdevkit``, or that folder itself.
        image_set: ``"test"``, or another list in ``ImageSets/Main``.
        difficult_list: File with the published flags of the "difficult" subset; None applies the rule: less
            than a quarter of the image, with another class in it. An image that is not listed is difficult.

    Raises:
        FileNotFoundError: If the layout is not there.
    """

    def __init__(
        self, root: str | Path, image_set: str = "test", difficult_list: str | Path | None = None
    ) -> None:
        from torchvision.datasets import VOCDetection

        root = _above(Path(root), ("VOCdevkit", "VOC2007"))
        try:
            self._files = VOCDetection(root, year="2007", image_set=image_set)
        except (RuntimeError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"VOC07: no {root}/VOCdevkit/VOC2007 with ImageSets/Main/{image_set}.txt ({error}); extract "
                "VOCtest_06-Nov-2007.tar there."
            ) from error
        self.class_names = VOC_CLASSES
        self.ids = [Path(path).stem for path in self._files.images]
        self.options = {"image_set": image_set, "difficult": self.read_difficult(difficult_list)}

    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations."""
        annotation = read_xml(Path(self._files.annotations[index]))
        size, objects = xml_size(annotation), annotation.findall("object")
        names = [str(item.findtext("name")) for item in objects]
        if not set(names) <= set(VOC_CLASSES):
            raise BrokenSampleError(
                f"{self.ids[index]}.xml names {set(names) - set(VOC_CLASSES)}, which VOC does not have."
            )
        regions, skipped = {}, 0
        for name in sorted(set(names)):
            of_class = [item for item, other in zip(objects, names, strict=True) if other == name]
            if all(item.findtext("difficult") == "1" for item in of_class):
                skipped += 1
            else:
                regions[VOC_CLASSES.index(name)] = xml_boxes(of_class, first_pixel=1)
        trials = make_trials(regions, size, self.flags_of(self.ids[index]), len(set(names)))
        return Sample(self.ids[index], Path(self._files.images[index]), size, trials, skipped)


def _above(root: Path, names: Sequence[str]) -> Path:
    """Return the folder that holds ``names[0]/names[1]/...``; ``root`` is any folder of that chain."""
    for depth in range(len(names), 0, -1):
        if root.parts[-depth:] == tuple(names[:depth]):
            return root.parents[depth - 1]
    return root


def read_xml(path: Path) -> ElementTree.Element:
    """Read an annotation.

    Raises:
        BrokenSampleError: If it is missing or damaged.
    """
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise BrokenSampleError(f"{path}: cannot be read as an annotation ({error}).") from error


def xml_size(annotation: ElementTree.Element) -> tuple[int, int]:
    """Return the (height, width) that an annotation gives for its image.

    Raises:
        BrokenSampleError: If it gives none.
    """
    try:
        height, width = (int(annotation.findtext(f"size/{side}", "")) for side in ("height", "width"))
    except ValueError as error:
        raise BrokenSampleError("An annotation does not give the size of its image.") from error
    return height, width


def xml_boxes(objects: Iterable[ElementTree.Element], first_pixel: int) -> Float[Tensor, "N 4"]:
    """Read boxes with an inclusive far side as half-open ones.

    Args:
        objects: The XML elements of the objects.
        first_pixel: The number of the first pixel, 1 in VOC and 0 in ImageNet.

    Raises:
        BrokenSampleError: If an object has no complete box.
    """

    def corner(item: ElementTree.Element, name: str) -> float:
        return float(item.findtext(f"bndbox/{name}", "nan"))

    boxes = torch.tensor(
        [[corner(item, name) for name in ("xmin", "ymin", "xmax", "ymax")] for item in objects]
    )
    if not boxes.isfinite().all():
        raise BrokenSampleError("An annotation contains an object without a complete box.")
    return boxes + torch.tensor([0, 0, 1, 1]) - first_pixel
