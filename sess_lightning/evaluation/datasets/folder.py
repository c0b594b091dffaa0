"""Your own images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sess_lightning.evaluation.datasets.coco import coco_boxes
from sess_lightning.evaluation.datasets.pictures import BrokenSampleError, find_pictures, size_on_disk
from sess_lightning.evaluation.datasets.samples import (
    Benchmark,
    Region,
    Sample,
    Trial,
    digest,
    flags_or_none,
    make_trials,
)
from sess_lightning.regions import check_boxes


class PictureFolder(Benchmark):
    """Your own images: an ``ImageFolder``, a COCO-style JSON, or both.

    Without JSON, the class is the sub-folder's index among the sorted sub-folders, and there are no regions.
    With JSON, boxes (x, y, w, h in pixels of the file) are the regions. Which classes are explained:

    - an image with ``class_index``: that one, with the boxes of the category of this id; - an image in a
    class folder: the folder's, with the boxes of the category of this name; - else every category on the
    image, a trial each; its class index is what the category carries under
      ``index_key`` (of a list the first; categories without one are not explained, but count as other
      classes), else its place among the rising category ids.

    An image with ``hard`` says itself whether it is difficult.

    Args:
        root: The folder of images.
        annotations: The JSON; None takes ``annotations.json`` in ``root``, if it exists.
        index_key: The categories' key that holds the model's class indices.
        difficult_list: As for ``VOC07``, by the images' file names without suffix.

    Raises:
        FileNotFoundError: If there is nothing to read.
        ValueError: If nothing says which classes to explain, or if boxes are fractions of the sides.
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
            self._paths = find_pictures(self._root)
            self._folders()
        self.ids = [file.relative_to(self._root).as_posix() for file in self._paths]
        self._flags = flags_or_none(difficult_list, len(self.class_names))
        self.options = {"index_key": index_key, "difficult": digest(self._flags)}

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
        _refuse_shares(coco.get("annotations", []), self._root)
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
            known = {index: names[key] for key, index in self._category_of.items()}
            self.class_names = [known.get(index, f"class {index}") for index in range(last + 1)]

    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations."""
        path = self._paths[index]
        if not self._images:
            target = self.class_names.index(path.relative_to(self._root).parts[0])
            return Sample(self.ids[index], path, size_on_disk(path), (Trial(target, None, None),))
        image = self._images[index]
        size = (image["height"], image["width"]) if "height" in image else size_on_disk(path)
        objects = self._boxes.get(image["id"], [])
        regions: dict[int, Region] = {
            target: _checked(of_target, size, path)
            for target in self._asked(image, objects)
            if (of_target := self._of(target, objects))
        }
        flags = None if self._flags is None else self._flags.get(path.stem, (True,) * len(self.class_names))
        if "hard" in image:
            flags = (bool(image["hard"]),) * len(self.class_names)
        trials = make_trials(regions, size, flags, len({item["category_id"] for item in objects}))
        blind = (Trial(target, None, None) for target in self._asked(image, objects) if target not in regions)
        return Sample(self.ids[index], path, size, (*trials, *blind))

    def _of(self, target: int, objects: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [item for item in objects if self._category_of.get(item["category_id"]) == target]

    def _asked(self, image: Mapping[str, Any], objects: Iterable[Mapping[str, Any]]) -> list[int]:
        """Return the classes to explain."""
        if "class_index" in image:
            return [int(image["class_index"])]
        folder = Path(image["file_name"]).parts[0]
        if folder in self.class_names and len(Path(image["file_name"]).parts) > 1:
            return [self.class_names.index(folder)]
        present = {self._category_of.get(item["category_id"]) for item in objects}
        return sorted(target for target in present if target is not None)


def _refuse_shares(annotations: Sequence[Mapping[str, Any]], root: Path) -> None:
    sides = [side for annotation in annotations for side in annotation.get("bbox", ())]
    if any(sides) and all(0 <= side <= 1 for side in sides):
        raise ValueError(
            f"PictureFolder: all boxes of {root} lie in 0..1, as shares of the sides; write (x, y, w, h) in "
            "pixels of the file: multiply by (width, height, width, height)."
        )


def _checked(
    annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], path: Path
) -> Float[Tensor, "N 4"]:
    try:
        boxes = coco_boxes(annotations)
        check_boxes([boxes], size, "a JSON's boxes are (x, y, w, h) in pixels of the file.")
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenSampleError(f"{path}: {error}") from error
    return boxes


def _indices(categories: Sequence[Mapping[str, Any]], index_key: str) -> dict[Any, int]:
    if not any(index_key in category for category in categories):
        return {category["id"]: place for place, category in enumerate(categories)}
    indices = {category["id"]: category.get(index_key) for category in categories}
    firsts = {
        key: (value[0] if value else None) if isinstance(value, list) else value
        for key, value in indices.items()
    }
    return {key: int(value) for key, value in firsts.items() if value is not None}
