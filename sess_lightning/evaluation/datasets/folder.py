"""Your own images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sess_lightning.evaluation.datasets.coco import coco_boxes
from sess_lightning.evaluation.datasets.pictures import BrokenSampleError, find_pictures, size_on_disk
from sess_lightning.evaluation.datasets.samples import Benchmark, Region, Sample, Trial, make_trials
from sess_lightning.regions import check_boxes

COCO = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name"),
}
"""What each entry of a JSON in COCO's format has."""


class PictureFolder(Benchmark):
    """Your own images: a folder of images, a folder per class, a COCO-style JSON, or class folders with JSON.

    Without JSON, the class is that of the sub-folder, and there are no regions; images that lie in no
    sub-folder have no label, and the predicted class is explained.

    With JSON, boxes (x, y, w, h in pixels of the file) are the regions. Which classes are explained:

    - an image with ``class_index``: that one, with the boxes of the category of this id;
    - an image in a class folder: the folder's, with the boxes of the category of this name (a single
      sub-folder that names no category does not count);
    - else every category on the image, a trial each; its class index is what the category carries under
      ``index_key`` (of a list the first; categories without one are not explained, but count as other
      classes), else that of its name among ``classes``; else, if there are as many categories as classes or
      ``classes`` is None, its place among the rising category ids.

    An image with ``hard`` says itself whether it is difficult.

    Args:
        root: The folder of images.
        annotations: The JSON; None takes ``annotations.json`` in ``root``, if it exists.
        index_key: The categories' key that holds the model's class indices.
        difficult_list: As for ``VOC07``, by the images' file names without suffix.
        classes: Names of the model's classes, in order: class folders are found among them by name (case,
            "_" and "-" do not matter) or number, else there must be as many folders as classes, and a JSON's
            categories by name likewise. None takes a folder's place among the sorted folders, as
            torchvision's ``ImageFolder`` does.

    Raises:
        FileNotFoundError: If there is nothing to read.
        ValueError: If a class folder or a category is not one of the model's classes, if images lie beside
            class folders, if boxes are fractions of the sides, or if the JSON's parts do not fit.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path | None = None,
        index_key: str = "class_index",
        difficult_list: str | Path | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self._root, self._classes = Path(root), classes
        path = Path(annotations) if annotations else self._root / "annotations.json"
        self._paths: list[Path] = []
        self._images: list[dict[str, Any]] = []
        self._target_of: dict[str, int] = {}
        if annotations or path.is_file():
            self._read(_load(path), index_key)
            self._target_of = self._target_of or {name: i for i, name in enumerate(self.class_names)}
        else:
            self._paths = find_pictures(self._root)
            self._folders()
        self.ids = [file.relative_to(self._root).as_posix() for file in self._paths]
        self.options = {"index_key": index_key, "difficult": self.read_difficult(difficult_list)}

    def _folders(self) -> None:
        beside = [path.parent == self._root for path in self._paths]
        self.is_labelled = not all(beside)
        if any(beside) and self.is_labelled:
            raise ValueError(
                f"PictureFolder: {self._root} contains images in class folders and beside them; nothing says "
                "which class the latter show. Move them into class folders, or all of them into one folder "
                "without sub-folders to explain what the model predicts."
            )
        names = {path.relative_to(self._root).parts[0] for path in self._paths} if self.is_labelled else ()
        self.class_names = sorted(names) if self._classes is None else self._classes
        self._target_of = _places(sorted(names), self.class_names)

    def _read(self, coco: Mapping[str, Any], index_key: str) -> None:
        self._images = [
            {**image, "file_name": _below(self._root, image["file_name"])} for image in coco["images"]
        ]
        self._paths = [self._root / image["file_name"] for image in self._images]
        self._boxes: dict[Any, list[dict[str, Any]]] = {}
        for annotation in coco.get("annotations", []):
            self._boxes.setdefault(annotation["image_id"], []).append(annotation)
        _refuse_shares(coco.get("annotations", []), self._root)
        categories = sorted(coco.get("categories", []), key=lambda category: category["id"])
        names = {category["id"]: str(category["name"]) for category in categories}
        if any("class_index" in image for image in self._images):
            for image in self._images:
                if not isinstance(image.get("class_index", 0), int):
                    raise ValueError(
                        f"PictureFolder: class_index of {image['file_name']} must be a whole number, the "
                        f"model's class, got {image['class_index']!r}."
                    )
            self._category_of = {category: category for category in names}
            last = max([*names, *(image.get("class_index", 0) for image in self._images)], default=0)
            self.class_names = [names.get(index, f"class {index}") for index in range(last + 1)]
        elif self._has_class_folders(names.values()):
            self._folders()
            places = self._target_of
            self._category_of = {key: places[name] for key, name in names.items() if name in places}
        else:
            self._category_of = _indices(categories, index_key, self._classes)
            last = max(self._category_of.values(), default=0)
            known = {index: names[key] for key, index in self._category_of.items()}
            self.class_names = [known.get(index, f"class {index}") for index in range(last + 1)]

    def _has_class_folders(self, categories: Iterable[str]) -> bool:
        """Return whether all images lie in sub-folders, other than a single one that names no category."""
        folders = [Path(image["file_name"]).parts[:-1][:1] for image in self._images]
        first, *others = {*folders} or {()}
        return all(folders) and (bool(others) or _plain(first[0]) in map(_plain, categories))

    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations."""
        path = self._paths[index]
        if not self._images:
            target = self._target_of.get(path.relative_to(self._root).parts[0])
            trials = tuple(Trial(place, None, None) for place in (target,) if place is not None)
            return Sample(self.ids[index], path, size_on_disk(path), trials)
        image = self._images[index]
        size = (image["height"], image["width"]) if "height" in image else size_on_disk(path)
        objects = self._boxes.get(image["id"], [])
        asked = self._asked(image, objects)
        regions: dict[int, Region] = {
            target: _checked(of_target, size, path)
            for target in asked
            if (of_target := self._of(target, objects))
        }
        hard = (bool(image["hard"]),) * len(self.class_names) if "hard" in image else None
        trials = make_trials(
            regions, size, hard or self.flags_of(path.stem), len({item["category_id"] for item in objects})
        )
        blind = (Trial(target, None, None) for target in asked if target not in regions)
        return Sample(self.ids[index], path, size, (*trials, *blind))

    def _of(self, target: int, objects: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [item for item in objects if self._category_of.get(item["category_id"]) == target]

    def _asked(self, image: Mapping[str, Any], objects: Iterable[Mapping[str, Any]]) -> list[int]:
        """Return the classes to explain."""
        if "class_index" in image:
            return [int(image["class_index"])]
        folder = Path(image["file_name"]).parts[0]
        if folder in self._target_of and len(Path(image["file_name"]).parts) > 1:
            return [self._target_of[folder]]
        present = {self._category_of.get(item["category_id"]) for item in objects}
        return sorted(target for target in present if target is not None)


def _below(root: Path, name: str) -> str:
    """Return a file's name from the root on, of one that may be absolute."""
    try:
        return (root.absolute() / name).relative_to(root.absolute()).as_posix()
    except ValueError as error:
        raise ValueError(
            f"PictureFolder: {name} does not lie in {root}; give the folder that it lies in."
        ) from error


def _load(path: Path) -> Mapping[str, Any]:
    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error}).") from error
    if not isinstance(coco, dict) or "images" not in coco:
        form = '{"images": [...], "annotations": [...], "categories": [...]}'
        raise ValueError(f"{path}: is not in COCO's format, {form}.")
    ids: dict[str, set[Any]] = {}
    for part, keys in COCO.items():
        entries = coco.get(part, [])
        if lacking := [key for key in keys if any(key not in entry for entry in entries)]:
            raise ValueError(f"{path}: one of its {part} has no {lacking[0]!r}.")
        ids |= {f"{part} {key}": {entry[key] for entry in entries} for key in keys if "id" in key}
    for key, part in (("image_id", "images"), ("category_id", "categories")):
        asked, known = ids[f"annotations {key}"], ids[f"{part} id"]
        if asked and not asked & known:
            first = next(iter(asked))
            raise ValueError(
                f"{path}: no annotation's {key}, such as {first!r}, is the id of one of its {part}; "
                'a number and a text are not the same: 1, "1".'
            )
    return coco


def _places(folders: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """Return each class folder's class index."""
    names = _indices_by_name(classes)
    unknown = [folder for folder in folders if _plain(folder) not in names]
    if not unknown:
        return {folder: names[_plain(folder)] for folder in folders}
    places = {folder: index for index, folder in enumerate(folders)} if len(folders) == len(classes) else {}
    if all(folder.isdecimal() and int(folder) < len(classes) for folder in folders):
        return _numbers(folders, places)
    if places:
        return places
    hint = _similar(unknown[0], names, classes)
    raise ValueError(
        f"PictureFolder: the folder {unknown[0]!r} is not one of the model's {len(classes)} classes{hint}; "
        "name class folders after the model's classes or their indices, or put all images into one folder "
        "to explain what the model predicts."
    )


def _numbers(folders: Sequence[str], places: Mapping[str, int]) -> dict[str, int]:
    """Return the numbers that folders are named by, unless their order as text, ``places``, is another."""
    numbers = {folder: int(folder) for folder in folders}
    if odd := [folder for folder in places if places[folder] != numbers[folder]]:
        first = min(odd, key=int)
        padded = first.zfill(len(max(odd, key=len)))
        raise ValueError(
            f"PictureFolder: the folder {first!r} is class {numbers[first]} by its number, but class "
            f"{places[first]} as torchvision's ImageFolder counts, which sorts folders as text. Name them by "
            f"the model's own indices with leading zeros, such as {padded}."
        )
    return numbers


def _indices_by_name(classes: Sequence[str]) -> dict[str, int]:
    """Return the index of each class by its plain name; of equal names, the first one's."""
    return {_plain(name): index for index, name in reversed([*enumerate(classes)])}


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def _refuse_shares(annotations: Sequence[Mapping[str, Any]], root: Path) -> None:
    sides = [side for annotation in annotations for side in annotation.get("bbox") or ()]
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


def _indices(
    categories: Sequence[Mapping[str, Any]], index_key: str, classes: Sequence[str] | None
) -> dict[Any, int]:
    """Return each category's class index; ``categories`` by rising ids."""
    if not any(index_key in category for category in categories):
        places = {category["id"]: place for place, category in enumerate(categories)}
        return places if classes is None else _by_name(categories, classes) or places
    indices = {category["id"]: category.get(index_key) for category in categories}
    firsts = {
        key: (value[0] if value else None) if isinstance(value, list) else value
        for key, value in indices.items()
    }
    return {key: int(value) for key, value in firsts.items() if value is not None}


def _by_name(categories: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[Any, int]:
    """Return the class indices of categories by their names; none if their places have to do."""
    names = _indices_by_name(classes)
    unknown = [str(category["name"]) for category in categories if _plain(str(category["name"])) not in names]
    if not unknown:
        return {category["id"]: names[_plain(str(category["name"]))] for category in categories}
    if len(categories) == len(classes):
        return {}
    raise ValueError(
        f"PictureFolder: the category {unknown[0]!r} is not one of the model's {len(classes)} classes"
        f"{_similar(unknown[0], names, classes)}; name categories after the model's classes, or give each "
        'its index: {"id": ..., "name": ..., "class_index": 5}.'
    )


def _similar(name: str, names: Mapping[str, int], classes: Sequence[str]) -> str:
    near = get_close_matches(_plain(name), names, 3)
    return f" (similar: {', '.join(classes[names[one]] for one in near)})" if near else ""
