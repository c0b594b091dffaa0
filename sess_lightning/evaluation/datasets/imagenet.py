"""ImageNet-1k."""

from __future__ import annotations

import json
from pathlib import Path

from sess_lightning.evaluation.datasets.pascal import read_xml, xml_boxes, xml_size
from sess_lightning.evaluation.datasets.pictures import BrokenSampleError, find_pictures, size_on_disk
from sess_lightning.evaluation.datasets.samples import Benchmark, Region, Sample, Trial


def read_synsets(path: str | Path) -> list[str]:
    """Read the WordNet ids in the order of class indices: JSON, or one a line as published.

    JSON is ``{"0": ["n01440764", "tench"], ...}``; of each line, the first word is read.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".json":
        table = json.loads(text)
        return [table[str(index)][0] for index in range(len(table))]
    return [line.split()[0] for line in text.splitlines() if line.strip()]


class ImageNet(Benchmark):
    """ImageNet-1k validation: images in one folder or in a folder per class, and the bounding-box XML.

    The class is that of the folder (``n01440764/``), else that of the XML's objects. Without XML there is no
    Pointing Game. Boxes count pixels from 0, the far side included: among 813 boxes of the validation set 99
    ends lie on the last pixel, none beyond, and 97 starts on 0.

    Args:
        root: The folder of images.
        boxes: The folder of XML files, named like the images, in sub-folders or not; None for no boxes.
        synsets: WordNet ids in the order of class indices (see ``read_synsets``); None sorts the class
            folders, of which there must then be 1000.

    Raises:
        FileNotFoundError: If there are no images.
        ValueError: If the class indices cannot be known.
    """

    def __init__(
        self, root: str | Path, boxes: str | Path | None = None, synsets: str | Path | None = None
    ) -> None:
        # By file name: the same order in both layouts.
        self._paths = sorted(find_pictures(Path(root)), key=lambda path: path.name)
        self.ids = [path.stem for path in self._paths]
        folders = sorted({path.parent.name for path in self._paths if _is_synset(path.parent.name)})
        known = read_synsets(synsets) if synsets is not None else folders
        if synsets is None and len(folders) != 1000:
            raise ValueError(
                f"ImageNet: {len(folders)} class folders in {root}, not 1000, so that they do not show the "
                "class indices; pass synsets=, a file with all WordNet ids in order."
            )
        self._index = {synset: index for index, synset in enumerate(known)}
        self.class_names = known
        self._xml = {path.stem: path for path in Path(boxes).rglob("*.xml")} if boxes is not None else None
        self.options = {"boxes": str(boxes is not None)}
        if not folders and not self._xml:
            raise ValueError("ImageNet: without class folders the classes come from the XML; pass boxes=.")

    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations."""
        path = self._paths[index]
        folder = path.parent.name if _is_synset(path.parent.name) else None
        if self._xml is None:
            return Sample(self.ids[index], path, size_on_disk(path), (self._trial(str(folder), None),))
        if path.stem not in self._xml:
            raise BrokenSampleError(f"{path}: no {path.stem}.xml among the bounding boxes.")
        annotation = read_xml(self._xml[path.stem])
        objects = annotation.findall("object")
        synset = folder or (objects[0].findtext("name") if objects else None)
        of_class = [item for item in objects if item.findtext("name") == synset]
        region = xml_boxes(of_class, first_pixel=0) if of_class else None
        return Sample(self.ids[index], path, xml_size(annotation), (self._trial(str(synset), region),))

    def _trial(self, synset: str, region: Region | None) -> Trial:
        if synset not in self._index:
            raise BrokenSampleError(f"The class {synset} is not one of the {len(self._index)} synsets.")
        return Trial(self._index[synset], region, None)


def _is_synset(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()
