"""The paper's data sets, and your own: which classes are on each picture, and where.

Every benchmark reads its real on-disk layout and yields a ``Sample`` per picture, with one ``Trial`` per
class present. Regions are read when a sample is asked for, so that opening a data set is quick.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias
from xml.etree import ElementTree

import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

Region: TypeAlias = Tensor
"""Where a class is: a mask, bool (H, W), or boxes, float (N, 4), half-open (x0, y0, x1, y1) px."""
Regions: TypeAlias = Literal["masks", "boxes"]

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SMALL = 0.25
"""Share of the picture below which a region belongs to the "difficult" subset, if other classes are about."""


class BrokenSampleError(RuntimeError):
    """A sample's picture or annotation is missing, damaged, or of another size than it should be."""


class Trial(NamedTuple):
    """One class on one picture.

    Attributes:
        target: Class index, as the model counts.
        region: Where the class is, at the picture's original resolution; None where nobody said.
        difficult: Whether the trial is in the "difficult" subset; None where that is not known.
    """

    target: int
    region: Region | None
    difficult: bool | None


class Sample(NamedTuple):
    """A picture and the classes on it.

    Attributes:
        id: The picture's name in the data set.
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
    """A data set of pictures with classes and their regions.

    Attributes:
        class_names: Name of each class index, where known.
        ids: Name of each picture.
        options: What else the trials depend on, as text.
    """

    class_names: Sequence[str] = ()
    ids: Sequence[str] = ()
    options: Mapping[str, str] = MappingProxyType({})

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations.

        Raises:
            BrokenSampleError: If they are missing or damaged.
        """


def read_picture(sample: Sample) -> UInt8[Tensor, "3 H W"]:
    """Decode a sample's picture as RGB.

    Raises:
        BrokenSampleError: If the file is missing or damaged, or its size is not the annotations'.
    """
    try:
        with Image.open(sample.path) as file:
            picture: Tensor = pil_to_tensor(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenSampleError(f"{sample.path}: cannot be read as a picture ({error}).") from error
    if tuple(picture.shape[1:]) != sample.size:
        found, told = ("x".join(map(str, size)) for size in (picture.shape[1:], sample.size))
        raise BrokenSampleError(
            f"{sample.path}: the picture is {found} px (height x width), its annotations say {told}."
        )
    return picture


def read_flags(path: str | Path, class_count: int) -> dict[str, tuple[bool, ...]]:
    """Read a published "difficult" list: per line a picture's id, then one 0 or 1 per class.

    Raises:
        ValueError: If a line has another number of flags, or a flag is neither 0 nor 1.
    """
    flags = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        name, *values = line.split()
        if len(values) != class_count or not set(values) <= {"0", "1"}:
            raise ValueError(
                f"{path}, line {number}: expected an image id and {class_count} flags of 0 or 1, "
                f"got {len(values)} values."
            )
        flags[name] = tuple(value == "1" for value in values)
    return flags


def _flags(path: str | Path | None, class_count: int) -> dict[str, tuple[bool, ...]] | None:
    return read_flags(path, class_count) if path is not None else None


def _digest(flags: Mapping[str, Sequence[bool]] | None) -> str:
    return "by rule" if flags is None else hashlib.sha256(repr(flags).encode()).hexdigest()[:16]


def covered(region: Region, size: tuple[int, int]) -> float:
    """Return the share of a picture of ``size`` (height, width) that a region covers."""
    if region.dtype != torch.bool:
        region = boxes_to_mask(region, size)
    return float(region.float().mean())


def boxes_to_mask(boxes: Float[Tensor, "N 4"], size: tuple[int, int]) -> Bool[Tensor, "H W"]:
    """Paint half-open boxes, rounded to whole pixels."""
    mask = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.round().long().clamp(min=0).tolist():
        mask[y0:y1, x0:x1] = True
    return mask


def _trials(
    regions: Mapping[int, Region],
    size: tuple[int, int],
    flags: Sequence[bool] | None,
    others: int,
) -> tuple[Trial, ...]:
    """Make trials of regions; "difficult" is what ``flags`` say, else small among other classes."""

    def is_difficult(target: int, region: Region) -> bool:
        return flags[target] if flags is not None else others > 1 and covered(region, size) < SMALL

    return tuple(
        Trial(target, region, is_difficult(target, region)) for target, region in sorted(regions.items())
    )


class VOC07(Benchmark):
    """PASCAL VOC 2007, as ``torchvision.datasets.VOCDetection`` finds it: ``VOCdevkit/VOC2007`` in ``root``.

    A region is the union of the class's boxes, objects marked difficult included; a class is left out only if
    all its objects are so marked. VOC counts pixels from 1, both ends included.

    Args:
        root: The folder that holds ``VOCdevkit``, or that folder itself.
        image_set: ``"test"``, or another list in ``ImageSets/Main``.
        difficult_list: File with the published flags of the "difficult" subset; None goes by the rule: less
            than a quarter of the picture, and another class is about. A picture not listed counts.

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
        self._flags = _flags(difficult_list, len(VOC_CLASSES))
        self.options = {"image_set": image_set, "difficult": _digest(self._flags)}

    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations."""
        annotation = _read_xml(Path(self._files.annotations[index]))
        size, objects = _xml_size(annotation), annotation.findall("object")
        names = [str(each.findtext("name")) for each in objects]
        if not set(names) <= set(VOC_CLASSES):
            raise BrokenSampleError(
                f"{self.ids[index]}.xml names {set(names) - set(VOC_CLASSES)}, no class of VOC."
            )
        regions, skipped = {}, 0
        for name in sorted(set(names)):
            own = [each for each, other in zip(objects, names, strict=True) if other == name]
            if all(each.findtext("difficult") == "1" for each in own):
                skipped += 1
            else:
                regions[VOC_CLASSES.index(name)] = _xml_boxes(own, first_pixel=1)
        flags = None if self._flags is None else self._flags.get(self.ids[index], (True,) * len(VOC_CLASSES))
        trials = _trials(regions, size, flags, len(set(names)))
        return Sample(self.ids[index], Path(self._files.images[index]), size, trials, skipped)


def _above(root: Path, names: Sequence[str]) -> Path:
    """Return the folder that holds ``names[0]/names[1]/...``, wherever in that chain ``root`` points."""
    for depth in range(len(names), 0, -1):
        if root.parts[-depth:] == tuple(names[:depth]):
            return root.parents[depth - 1]
    return root


def _read_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise BrokenSampleError(f"{path}: cannot be read as an annotation ({error}).") from error


def _xml_size(annotation: ElementTree.Element) -> tuple[int, int]:
    try:
        height, width = (int(annotation.findtext(f"size/{side}", "")) for side in ("height", "width"))
    except ValueError as error:
        raise BrokenSampleError("An annotation tells no size of its picture.") from error
    return height, width


def _xml_boxes(objects: Iterable[ElementTree.Element], first_pixel: int) -> Float[Tensor, "N 4"]:
    """Read boxes; counted from 1 with both ends included, or from 0 and half-open."""

    def corner(each: ElementTree.Element, name: str) -> float:
        return float(each.findtext(f"bndbox/{name}", "nan"))

    boxes = torch.tensor(
        [[corner(each, name) for name in ("xmin", "ymin", "xmax", "ymax")] for each in objects]
    )
    if not boxes.isfinite().all():
        raise BrokenSampleError("An annotation holds an object without a complete box.")
    return boxes - torch.tensor([first_pixel, first_pixel, 0, 0])


class COCO14(Benchmark):
    """MS COCO, as ``torchvision.datasets.CocoDetection`` reads it; needs ``pycocotools``.

    A region is the union of the class's segmentations, crowds included. Classes are the categories by rising
    id, 0 to 79.

    Args:
        root: The folder that holds ``val2014/`` and ``annotations/instances_val2014.json``.
        split: Name of the folder of pictures.
        annotations: The JSON; None is ``annotations/instances_<split>.json``.
        region: ``"masks"`` (the rules that the paper's figures follow) or ``"boxes"`` (the paper's words).
        difficult_list: As for ``VOC07``, by the pictures' file names without suffix.

    Raises:
        FileNotFoundError: If the layout is not there.
        ImportError: If ``pycocotools`` is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "val2014",
        annotations: str | Path | None = None,
        region: Regions = "masks",
        difficult_list: str | Path | None = None,
    ) -> None:
        from torchvision.datasets import CocoDetection

        root = Path(root)
        path = Path(annotations) if annotations else root / "annotations" / f"instances_{split}.json"
        self._folder = root / split
        for needed in (path, self._folder):
            if not needed.exists():
                raise FileNotFoundError(
                    f"COCO14: {needed} is not there; give root= the folder that holds {split}/ and "
                    "annotations/."
                )
        if region not in ("masks", "boxes"):
            raise ValueError(f'COCO14: region must be "masks" or "boxes", got {region!r}.')
        try:
            with redirect_stdout(io.StringIO()):  # pycocotools reports on what it reads.
                self._files = CocoDetection(self._folder, str(path))
        except ImportError as error:
            raise ImportError("COCO14 reads masks with pycocotools: pip install pycocotools.") from error
        self._region = region
        categories = sorted(self._files.coco.cats)
        self._index = {category: index for index, category in enumerate(categories)}
        self.class_names = [self._files.coco.cats[category]["name"] for category in categories]
        self._images = [self._files.coco.imgs[each] for each in self._files.ids]
        self.ids = [Path(image["file_name"]).stem for image in self._images]
        self._flags = _flags(difficult_list, len(categories))
        self.options = {"region": region, "difficult": _digest(self._flags)}

    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations."""
        image = self._images[index]
        size = image["height"], image["width"]
        found: dict[int, list[dict[str, Any]]] = {}
        for annotation in self._files.coco.imgToAnns.get(image["id"], []):
            found.setdefault(self._index[annotation["category_id"]], []).append(annotation)
        regions = {target: self._union(own) for target, own in found.items()}
        flags = None if self._flags is None else self._flags.get(self.ids[index], (True,) * len(self._index))
        trials = _trials(regions, size, flags, len(found))
        return Sample(self.ids[index], self._folder / image["file_name"], size, trials)

    def _union(self, annotations: Sequence[dict[str, Any]]) -> Region:
        if self._region == "boxes":
            return _coco_boxes(annotations)
        masks = [torch.from_numpy(self._files.coco.annToMask(each)) for each in annotations]
        return torch.stack(masks).bool().any(0)


def _coco_boxes(annotations: Iterable[Mapping[str, Any]]) -> Float[Tensor, "N 4"]:
    corners = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in annotations)]
    return torch.tensor(corners, dtype=torch.float32).view(-1, 4)


PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def _pictures(root: Path) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder of pictures.")
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise FileNotFoundError(f"{root} holds no pictures.")
    return found


def read_synsets(path: str | Path) -> list[str]:
    """Read the WordNet ids in the order of class indices: JSON, or one a line, as published with ImageNet.

    JSON is ``{"0": ["n01440764", "tench"], ...}``; of a line, the first word counts.
    """
    text = Path(path).read_text()
    if Path(path).suffix == ".json":
        table = json.loads(text)
        return [table[str(index)][0] for index in range(len(table))]
    return [line.split()[0] for line in text.splitlines() if line.strip()]


class ImageNet(Benchmark):
    """ImageNet-1k validation: pictures in one folder or in a folder per class, and the bounding-box XML.

    The class is that of the folder (``n01440764/``), else that of the XML's objects. Without XML there is no
    Pointing Game. The boxes are read as they stand: pixels from 0, the far side not included.

    Args:
        root: The folder of pictures.
        boxes: The folder of XML files, named as the pictures, in sub-folders or not; None goes without.
        synsets: WordNet ids in the order of class indices (see ``read_synsets``); None sorts the class
            folders, of which there must then be 1000.

    Raises:
        FileNotFoundError: If there are no pictures.
        ValueError: If the class indices cannot be known.
    """

    def __init__(
        self, root: str | Path, boxes: str | Path | None = None, synsets: str | Path | None = None
    ) -> None:
        # By file name: the same order in both layouts.
        self._paths = sorted(_pictures(Path(root)), key=lambda path: path.name)
        self.ids = [path.stem for path in self._paths]
        folders = sorted({path.parent.name for path in self._paths if _is_synset(path.parent.name)})
        known = read_synsets(synsets) if synsets is not None else folders
        if synsets is None and len(folders) != 1000:
            raise ValueError(
                f"ImageNet: {len(folders)} class folders in {root}, not 1000, so that they do not tell the "
                "class indices; give synsets=, a file with all WordNet ids in order."
            )
        self._index = {synset: index for index, synset in enumerate(known)}
        self.class_names = known
        self._xml = {path.stem: path for path in Path(boxes).rglob("*.xml")} if boxes is not None else None
        self.options = {"boxes": str(boxes is not None)}
        if not folders and not self._xml:
            raise ValueError("ImageNet: without class folders the classes come from the XML; give boxes=.")

    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations."""
        path = self._paths[index]
        folder = path.parent.name if _is_synset(path.parent.name) else None
        if self._xml is None:
            return Sample(self.ids[index], path, _size_on_disk(path), (self._trial(str(folder), None),))
        if path.stem not in self._xml:
            raise BrokenSampleError(f"{path}: no {path.stem}.xml among the bounding boxes.")
        annotation = _read_xml(self._xml[path.stem])
        objects = annotation.findall("object")
        synset = folder or (objects[0].findtext("name") if objects else None)
        own = [each for each in objects if each.findtext("name") == synset]
        region = _xml_boxes(own, first_pixel=0) if own else None
        return Sample(self.ids[index], path, _xml_size(annotation), (self._trial(str(synset), region),))

    def _trial(self, synset: str, region: Region | None) -> Trial:
        if synset not in self._index:
            raise BrokenSampleError(f"The class {synset} is none of the {len(self._index)} synsets.")
        return Trial(self._index[synset], region, None)


def _is_synset(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def _size_on_disk(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except OSError as error:
        raise BrokenSampleError(f"{path}: cannot be read as a picture ({error}).") from error


class PictureFolder(Benchmark):
    """Your own pictures: an ``ImageFolder``, a COCO-style JSON, or both.

    Without JSON, the class is the sub-folder's place among the sorted sub-folders, and there are no regions.
    With JSON, boxes (x, y, w, h in pixels of the file) are the regions. Which classes are explained:

    - an image that carries ``class_index``: that one, with the boxes of the category of this id;
    - pictures in class folders: the folder's, with the boxes of the category of this name;
    - else every category on the picture, a trial each; its class index is what the category carries under
      ``index_key`` (of a list the first; categories without one are not explained, but count as other
      classes), else its place among the rising category ids.

    An image that carries ``hard`` says itself whether it is difficult.

    Args:
        root: The folder of pictures.
        annotations: The JSON; None takes ``annotations.json`` in ``root``, if it is there.
        index_key: The categories' key that holds class indices as the model counts.
        difficult_list: As for ``VOC07``, by the pictures' file names without suffix.

    Raises:
        FileNotFoundError: If there is nothing to read.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path | None = None,
        index_key: str = "class_index",
        difficult_list: str | Path | None = None,
    ) -> None:
        self._root = Path(root)
        path = Path(annotations) if annotations else self._root / "annotations.json"
        self._paths: list[Path] = []
        self._images: list[dict[str, Any]] = []
        if annotations or path.is_file():
            self._read(json.loads(path.read_text()), index_key)
        else:
            self._paths = _pictures(self._root)
            self._folders()
        self.ids = [each.relative_to(self._root).as_posix() for each in self._paths]
        self._flags = _flags(difficult_list, len(self.class_names))
        self.options = {"index_key": index_key, "difficult": _digest(self._flags)}

    def _folders(self) -> None:
        if any(path.parent == self._root for path in self._paths):
            raise ValueError(
                f"PictureFolder: {self._root} holds pictures outside of class folders and no "
                "annotations.json; nothing says which classes to explain."
            )
        self.class_names = sorted({path.relative_to(self._root).parts[0] for path in self._paths})

    def _read(self, coco: Mapping[str, Any], index_key: str) -> None:
        self._images = list(coco["images"])
        self._paths = [self._root / image["file_name"] for image in self._images]
        self._boxes: dict[Any, list[dict[str, Any]]] = {}
        for annotation in coco.get("annotations", []):
            self._boxes.setdefault(annotation["image_id"], []).append(annotation)
        categories = sorted(coco.get("categories", []), key=lambda category: category["id"])
        names = {category["id"]: str(category["name"]) for category in categories}
        if any("class_index" in image for image in self._images):
            self._category_of = {category: category for category in names}
            last = max([*names, *(image.get("class_index", 0) for image in self._images)], default=0)
            self.class_names = [names.get(index, f"class {index}") for index in range(last + 1)]
        elif all(len(Path(image["file_name"]).parts) > 1 for image in self._images):
            self._folders()
            places = {name: index for index, name in enumerate(self.class_names)}
            self._category_of = {key: places[name] for key, name in names.items() if name in places}
        else:
            self._category_of = _indices(categories, index_key)
            last = max(self._category_of.values(), default=0)
            own = {index: names[key] for key, index in self._category_of.items()}
            self.class_names = [own.get(index, f"class {index}") for index in range(last + 1)]

    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations."""
        path = self._paths[index]
        if not self._images:
            target = self.class_names.index(path.relative_to(self._root).parts[0])
            return Sample(self.ids[index], path, _size_on_disk(path), (Trial(target, None, None),))
        image = self._images[index]
        size = image["height"], image["width"]
        found = self._boxes.get(image["id"], [])
        regions: dict[int, Region] = {
            target: _coco_boxes(own)
            for target in self._asked(image, found)
            if (own := [each for each in found if self._category_of.get(each["category_id"]) == target])
        }
        flags = None if self._flags is None else self._flags.get(path.stem, (True,) * len(self.class_names))
        if "hard" in image:
            flags = (bool(image["hard"]),) * len(self.class_names)
        trials = _trials(regions, size, flags, len({each["category_id"] for each in found}))
        blind = (Trial(target, None, None) for target in self._asked(image, found) if target not in regions)
        return Sample(self.ids[index], path, size, (*trials, *blind))

    def _asked(self, image: Mapping[str, Any], found: Iterable[Mapping[str, Any]]) -> list[int]:
        """Return the classes to explain."""
        if "class_index" in image:
            return [int(image["class_index"])]
        folder = Path(image["file_name"]).parts[0]
        if folder in self.class_names and len(Path(image["file_name"]).parts) > 1:
            return [self.class_names.index(folder)]
        present = {self._category_of.get(each["category_id"]) for each in found}
        return sorted(target for target in present if target is not None)


def _indices(categories: Sequence[Mapping[str, Any]], index_key: str) -> dict[Any, int]:
    if not any(index_key in category for category in categories):
        return {category["id"]: place for place, category in enumerate(categories)}
    indices = {category["id"]: category.get(index_key) for category in categories}
    firsts = {
        key: (each[0] if each else None) if isinstance(each, list) else each for key, each in indices.items()
    }
    return {key: int(each) for key, each in firsts.items() if each is not None}
