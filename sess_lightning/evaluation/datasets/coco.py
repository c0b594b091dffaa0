"""MS COCO."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sess_lightning.evaluation.datasets.samples import Benchmark, Region, Regions, Sample, make_trials


class COCO14(Benchmark):
    """MS COCO, as ``torchvision.datasets.CocoDetection`` reads it; needs ``pycocotools``.

    A region is the union of the class's segmentations, including crowds. Classes 0 to 79 are the categories
    by rising id.

    Args:
        root: The folder that holds ``val2014/`` and ``annotations/instances_val2014.json``.
        split: Name of the folder of images.
        annotations: The JSON; None is ``annotations/instances_<split>.json``.
        region: ``"masks"`` (the rules that the paper's figures follow) or ``"boxes"`` (the paper's words).
        difficult_list: As for ``VOC07``, by the images' file names without suffix.

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
                    f"COCO14: {needed} does not exist; pass root=, the folder that contains {split}/ "
                    "and annotations/."
                )
        if region not in ("masks", "boxes"):
            raise ValueError(f'COCO14: region must be "masks" or "boxes", got {region!r}.')
        try:
            with redirect_stdout(io.StringIO()):  # pycocotools prints what it does.
                self._files = CocoDetection(self._folder, str(path))
        except ImportError as error:
            raise ImportError("COCO14 reads masks with pycocotools: pip install pycocotools.") from error
        self._region = region
        categories = sorted(self._files.coco.cats)
        self._index = {category: index for index, category in enumerate(categories)}
        self.class_names = [self._files.coco.cats[category]["name"] for category in categories]
        self._images = [self._files.coco.imgs[image_id] for image_id in self._files.ids]
        self.ids = [Path(image["file_name"]).stem for image in self._images]
        self.options = {"region": region, "difficult": self.read_difficult(difficult_list)}

    def __getitem__(self, index: int) -> Sample:
        """Read a sample's annotations."""
        image = self._images[index]
        size = image["height"], image["width"]
        by_category: dict[int, list[dict[str, Any]]] = {}
        for annotation in self._files.coco.imgToAnns.get(image["id"], []):
            by_category.setdefault(self._index[annotation["category_id"]], []).append(annotation)
        regions = {target: self._union(annotations_of) for target, annotations_of in by_category.items()}
        trials = make_trials(regions, size, self.flags_of(self.ids[index]), len(by_category))
        return Sample(self.ids[index], self._folder / image["file_name"], size, trials)

    def _union(self, annotations: Sequence[dict[str, Any]]) -> Region:
        if self._region == "boxes":
            return coco_boxes(annotations)
        masks = [torch.from_numpy(self._files.coco.annToMask(annotation)) for annotation in annotations]
        return torch.stack(masks).bool().any(0)


def coco_boxes(annotations: Iterable[Mapping[str, Any]]) -> Float[Tensor, "N 4"]:
    """Read boxes given as (x, y, width, height).

    Raises:
        ValueError: If one is not.
    """
    corners = []
    for annotation in annotations:
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"an annotation's bbox must be [x, y, w, h], px, got {box!r}.")
        corners.append([*box[:2], box[0] + box[2], box[1] + box[3]])
    return torch.tensor(corners, dtype=torch.float32).view(-1, 4)
