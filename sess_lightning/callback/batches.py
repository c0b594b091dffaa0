"""From the batches people have to the Batch that is explained; names and normalisation found on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sess_lightning.types import Batch

IMAGE_KEYS = ("image", "images", "pixel_values", "img", "imgs", "x", "input", "inputs", "data")
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class", "classes", "category")
BOX_KEYS = ("boxes", "box", "bboxes", "bbox")
MASK_KEYS = ("masks", "mask", "segmentation")
ID_KEYS = ("ids", "id", "image_id", "image_ids", "path", "paths", "filename", "filenames")
DIFFICULT_KEYS = ("difficult",)

HELP = "Pass batch_adapter=lambda batch: (images, labels), or one that returns a sess_lightning.types.Batch."


def read_batch(batch: Any, adapter: Callable[[Any], Any] | None = None) -> Batch:
    """Read a batch as images and labels, with boxes, masks and ids where it has them.

    Understands ``(images, labels)``, ``(images, targets)`` with a dict or one dict per image, a dict with the
    usual keys, and a ``Batch``. Of multi-hot labels the first positive class is explained.

    Args:
        batch: What the dataloader gave.
        adapter: Turns it into one of the above first.

    Raises:
        TypeError: If images or labels are not found.
        ValueError: If their shapes do not fit (where boxes lie is told by ``check_boxes``).
    """
    if adapter is not None:
        batch = adapter(batch)
    if isinstance(batch, Batch):
        return _checked(batch)
    images, target = _split(batch)
    if isinstance(target, (list, tuple)) and target and isinstance(target[0], Mapping):
        target = _collated(target)
    if isinstance(target, Mapping):
        labels = _first(target, LABEL_KEYS)
    else:
        labels, target = target, {}
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise TypeError(
            f"The batch gave images as {type(images).__name__} and labels as {type(labels).__name__}; "
            f"both must be tensors. {HELP}"
        )
    difficult = _first(target, DIFFICULT_KEYS)
    ids = _first(target, ID_KEYS)
    return _checked(
        Batch(
            images=images,
            labels=_class_indices(labels),
            boxes=_boxes(_first(target, BOX_KEYS)),
            masks=_masks(_first(target, MASK_KEYS)),
            ids=None
            if ids is None
            else [str(each) for each in (ids.tolist() if isinstance(ids, Tensor) else ids)],
            difficult=difficult.bool() if isinstance(difficult, Tensor) and difficult.ndim == 1 else None,
        )
    )


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        images, labels = _first(batch, IMAGE_KEYS), _first(batch, LABEL_KEYS)
        if images is None or labels is None:
            raise TypeError(
                f"The batch is a dict with keys {sorted(map(str, batch))}; none of {IMAGE_KEYS} or none of "
                f"{LABEL_KEYS} is among them. {HELP}"
            )
        if isinstance(labels, (Mapping, list, tuple)):
            return images, labels
        return images, {**batch, LABEL_KEYS[0]: labels}
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    raise TypeError(
        f"The batch is a {type(batch).__name__} without labels: nothing says which class to explain. {HELP}"
    )


def _first(mapping: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((mapping[key] for key in keys if key in mapping and mapping[key] is not None), None)


def _collated(targets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate one dict per image; a detection target is read as its first label and that label's boxes."""
    collated: dict[str, Any] = {key: [target[key] for target in targets] for key in targets[0]}
    label_key = next((key for key in LABEL_KEYS if key in collated), None)
    if label_key is None:
        raise TypeError(
            f"The targets are dicts with keys {sorted(collated)}; none of {LABEL_KEYS} is there. {HELP}"
        )
    labels = [torch.as_tensor(label).reshape(-1) for label in collated[label_key]]
    if any(len(label) == 0 for label in labels):
        raise ValueError(f"A target has no label at all: nothing says which class to explain. {HELP}")
    for keys, read in ((BOX_KEYS, _xyxy), (MASK_KEYS, torch.as_tensor)):
        for key in set(keys) & set(collated):
            entries = [read(entry) for entry in collated[key]]
            collated[key] = [
                entry[label == label[0]] if len(label) > 1 and len(entry) == len(label) else entry
                for entry, label in zip(entries, labels, strict=True)
            ]
    collated[label_key] = torch.stack([label[0] for label in labels])
    return collated


def _class_indices(labels: Tensor) -> Tensor:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        return labels.argmax(1)
    return labels.long()


def _boxes(boxes: Any) -> list[Float[Tensor, "_ 4"]] | None:
    if boxes is None:
        return None
    each = list(_xyxy(boxes)) if isinstance(boxes, Tensor) else [_xyxy(box) for box in boxes]
    return [box.reshape(-1, 4) if box.numel() in (0, 4) else box for box in each]


def _xyxy(boxes: Any) -> Tensor:
    # torchvision's BoundingBoxes say how they are written, and forget it when indexed.
    form = getattr(getattr(boxes, "format", None), "value", "XYXY")
    plain = torch.as_tensor(boxes).as_subclass(Tensor).float()
    if form == "XYXY":
        return plain
    from torchvision.ops import box_convert

    converted: Tensor = box_convert(plain, form.lower(), "xyxy")
    return converted


def _masks(masks: Any) -> Bool[Tensor, "B H W"] | None:
    if isinstance(masks, (list, tuple)):
        each = [mask.bool() for mask in masks]
        masks = torch.stack([mask.flatten(0, -3).any(0) if mask.ndim > 2 else mask for mask in each])
    if masks is None:
        return None
    plain: Tensor = masks.as_subclass(Tensor).bool()
    return plain.flatten(1, -3).any(1) if plain.ndim > 3 else plain


def _checked(batch: Batch) -> Batch:
    images, labels = batch.images, batch.labels
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images are {tuple(images.shape)}, {images.dtype}; expected float (B, C, H, W) as the model "
            f"takes them. {HELP}"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for {images.shape[0]} images; expected one class index "
            f"each. {HELP}"
        )
    for name in ("boxes", "masks", "ids", "difficult"):
        value = getattr(batch, name)
        if value is not None and len(value) != len(labels):
            raise ValueError(f"{name}: got {len(value)} for {len(labels)} images; give one per image. {HELP}")
    return batch


def check_boxes(batch: Batch) -> None:
    """Refuse boxes that are inside out or reach out of the picture. Reads values: call it on the host.

    Raises:
        ValueError: Naming the first such box.
    """
    height, width = batch.size or batch.images.shape[-2:]
    for i, boxes in enumerate(batch.boxes or []):
        for x0, y0, x1, y1 in boxes.tolist():
            if not (0 <= x0 <= x1 <= width + 1 and 0 <= y0 <= y1 <= height + 1):
                raise ValueError(
                    f"boxes: ({x0:g}, {y0:g}, {x1:g}, {y1:g}) of image {i} does not lie in the "
                    f"{height}x{width} image; boxes are (x0, y0, x1, y1) in pixels of the images as the "
                    "model takes them: convert from (x, y, w, h) or from shares, and resize them with "
                    "the images."
                )
