"""Turning the batches that people have into the Batch that is explained.

What is understood, and how it is read:

===================================================  =========================================================
batch                                                read as
===================================================  =========================================================
``(images, labels)``, ``[images, labels, ...]``      the first two
``{"image": ..., "label": ..., "boxes": ...}``       the usual keys (``IMAGE_KEYS``, ``LABEL_KEYS``, ...)
a dataclass or a named tuple with such fields        likewise; other named tuples like any tuple
a list of one of these, as NVIDIA DALI gives it      what is in it
``(images, {"label": ..., "mask": ...})``            likewise
``(images, [{"labels": ..., "boxes": ...}, ...])``   of each dict its first label and that label's boxes and
                                                     masks; each of its labels if the model is multi-label
a ``Batch``                                          itself, values read as below
anything else                                        through ``batch_adapter``
---------------------------------------------------  ---------------------------------------------------------
labels (B,) or (B, 1), any type                      class indices; floats in 0..1 at one half
labels (B, N), rows that sum to 1                    the largest: one-hot, smoothed, mixed
labels (B, N), other rows in 0..1                    each class of at least one half, up to four an image
-1, -100, NaN, no positive class                     that image is left out
---------------------------------------------------  ---------------------------------------------------------
images (B, C, H, W), floats                          as the model takes them
images (B, C, H, W), bytes                           floats of the same values; rounded for a model that needs
                                                     bytes
a NaN or an infinity in an image                     that image is left out
---------------------------------------------------  ---------------------------------------------------------
boxes (B, 4), (B, N, 4), a list of (N, 4)            (x0, y0, x1, y1) px of the images, half-open
``BoundingBoxes``                                    as they say
``"bbox"`` beside ``"area"``, ``"iscrowd"``, ...     COCO's (x, y, w, h)
``"bbox"`` alone                                     what all boxes of the batch can be, else refused
boxes in 0..1                                        refused
masks                                                by ``sess_lightning.regions.read_masks``
masks (B, N, h, w) beside labels (B, N)              the class's own
one region for several classes of an image           none: nothing says whose it is
===================================================  =========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sess_lightning import regions
from sess_lightning.callback.classes import MOST_CLASSES, Classes, known_labels, read_classes
from sess_lightning.ops import size_of
from sess_lightning.types import Activation, Batch

IMAGE_KEYS = ("image", "images", "pixel_values", "img", "imgs", "x", "input", "inputs", "data")
LABEL_KEYS = (
    "label", "labels", "target", "targets", "y", "class", "classes", "category", "category_id",
)  # fmt: skip
BOX_KEYS = ("boxes", "box", "bboxes", "bbox")
MASK_KEYS = ("masks", "mask", "segmentation")
ID_KEYS = ("ids", "id", "image_id", "image_ids", "path", "paths", "filename", "filenames")
DIFFICULT_KEYS = ("difficult",)
COCO_BOX_KEY, COCO_KEYS = "bbox", ("area", "iscrowd", "category_id")
"""COCO's key for boxes (x, y, w, h), and keys that only COCO's annotations have beside it."""

HELP = (
    "Pass batch_adapter=lambda batch: (images, labels), or one that returns a sess_lightning.types.Batch; "
    "models that do not classify images cannot be explained."
)


def read_batch(
    batch: Any,
    adapter: Callable[[Any], Any] | None = None,
    *,
    activation: Activation | None = None,
) -> Batch:
    """Read a batch as images and the classes to explain, with boxes, masks and ids where there are any.

    Values of labels, and of masks that are not bool, are read on the host.

    Args:
        batch: A batch of the loader; the module's docstring lists what is understood.
        adapter: Called first, to turn the batch into one of these.
        activation: How the model's logits become probabilities, where known: with ``"sigmoid"``, each label
            of an image is explained.

    Raises:
        TypeError: If images or labels are not found.
        ValueError: If their shapes do not fit, or if nothing decides what values mean (``check_boxes`` checks
            where boxes lie).
    """
    parts = _parts(batch if adapter is None else _adapted(batch, adapter))
    _check_shapes(parts.images, parts.labels)
    try:
        return _rows(parts, _classes(parts.labels, activation))
    except ValueError as error:
        raise ValueError(f"{error} {HELP}") from error


def _adapted(batch: Any, adapter: Callable[[Any], Any]) -> Any:
    try:
        return adapter(batch)
    except Exception as error:
        told = getattr(error, "__notes__", [])
        error.__notes__ = [*told, "This was batch_adapter=, called with one of validation's batches."]
        raise


def _check_shapes(images: Any, labels: Any) -> None:
    if not isinstance(images, Tensor) or not isinstance(labels, (Tensor, _Ragged)):
        given = "a list for each image" if isinstance(labels, _Ragged) else type(labels).__name__
        raise TypeError(
            f"The batch gave images as {type(images).__name__} and labels as {given}; both must be tensors. "
            f"{HELP}"
        )
    if images.ndim != 4 or images.dtype == torch.bool or images.is_complex():
        raise ValueError(
            f"images are {tuple(images.shape)}, {images.dtype}; expected (B, C, H, W) as the model takes "
            f"them. {HELP}"
        )
    if len(labels) != len(images):
        shape = (len(labels),) if isinstance(labels, _Ragged) else tuple(labels.shape)
        raise ValueError(
            f"labels have shape {shape} for {len(images)} images; expected one class index each. {HELP}"
        )


class _Ragged(list[list[int]]):
    """Class indices of each image's objects."""


@dataclass
class _Parts:
    """The parts of a batch, before their values are read.

    Attributes:
        box_form: Torchvision's name for the format of boxes; ``"bbox"`` where only their key hints at it.
    """

    images: Any
    labels: Any
    boxes: Any = None
    masks: Any = None
    ids: Any = None
    difficult: Any = None
    size: tuple[int, int] | None = None
    box_form: str = "XYXY"


def _parts(batch: Any) -> _Parts:
    if isinstance(batch, Batch):
        return _Parts(
            batch.images, batch.labels, batch.boxes, batch.masks, batch.ids, batch.difficult, batch.size
        )
    images, target = _split(batch)
    if _are_dicts(target):
        target = _collated(target)
    if not isinstance(target, Mapping):
        return _Parts(images, _numbers(target))
    form = "XYXY"
    if _first_key(target, BOX_KEYS) == COCO_BOX_KEY:
        form = "XYWH" if any(key in target for key in COCO_KEYS) else COCO_BOX_KEY
    return _Parts(
        images, _numbers(_first(target, LABEL_KEYS)), _first(target, BOX_KEYS), _first(target, MASK_KEYS),
        _first(target, ID_KEYS), _first(target, DIFFICULT_KEYS), box_form=form,
    )  # fmt: skip


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (list, tuple)) and len(batch) == 1 and not isinstance(batch[0], Tensor):
        batch = batch[0]
    kind = "dict" if isinstance(batch, Mapping) else type(batch).__name__
    batch = _by_name(batch)
    if isinstance(batch, Mapping):
        images, labels = _first(batch, IMAGE_KEYS), _first(batch, LABEL_KEYS)
        if images is None or labels is None:
            raise TypeError(
                f"The batch is a {kind} with keys {sorted(map(str, batch))}; none of {IMAGE_KEYS} or none of "
                f"{LABEL_KEYS} is among them. {HELP}"
            )
        if isinstance(labels, Mapping) or _are_dicts(labels):
            return images, labels
        return images, {**batch, LABEL_KEYS[0]: labels}
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    raise TypeError(f"The batch is a {kind} without labels: nothing says which class to explain. {HELP}")


def _by_name(batch: Any) -> Any:
    """Return a dataclass as a dict, and a named tuple if its names are known ones."""
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        named = batch._asdict()
        if _first_key(named, IMAGE_KEYS) and _first_key(named, LABEL_KEYS):
            return named
    return batch


def _are_dicts(target: Any) -> bool:
    return isinstance(target, (list, tuple)) and len(target) > 0 and isinstance(target[0], Mapping)


def _first_key(mapping: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key in mapping and mapping[key] is not None), None)


def _first(mapping: Mapping[str, Any], keys: Sequence[str]) -> Any:
    key = _first_key(mapping, keys)
    return None if key is None else mapping[key]


def _numbers(labels: Any) -> Any:
    """Turn a list of numbers, one per image, into a tensor."""
    if isinstance(labels, (list, tuple)) and not isinstance(labels, _Ragged) and labels:
        if all(isinstance(label, (int, float)) for label in labels):
            return torch.tensor(labels)
        if all(isinstance(label, Tensor) and label.ndim == 0 for label in labels):
            return torch.stack(list(labels))
    return labels


def _collated(targets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate one dict per image; labels of objects stay lists, one per image."""
    collated: dict[str, Any] = {
        key: [target[key] for target in targets]
        for key in targets[0]
        if all(key in other for other in targets)
    }
    key = _first_key(collated, LABEL_KEYS)
    if key is None:
        raise TypeError(
            f"The targets are dicts with keys {sorted(collated)}; none of {LABEL_KEYS} is there. {HELP}"
        )
    labels = [torch.as_tensor(label) for label in collated[key]]
    if all(label.ndim == 0 for label in labels) or _are_hot(labels, collated):
        collated[key] = torch.stack(labels)
    else:
        collated[key] = _Ragged(label.reshape(-1).tolist() for label in labels)
    return collated


def _are_hot(labels: Sequence[Tensor], collated: Mapping[str, Any]) -> bool:
    """Return whether each image has a value per class, rather than an index per object."""
    if any(label.ndim != 1 or label.shape != labels[0].shape or not len(label) for label in labels):
        return False
    stacked = torch.stack(list(labels))
    if stacked.is_floating_point():
        return True
    objects = _first(collated, (*BOX_KEYS, *MASK_KEYS))
    per_object = objects is not None and all(
        len(of_image) == len(label) for of_image, label in zip(objects, labels, strict=True)
    )
    return stacked.shape[1] > 2 and not per_object and bool(((stacked == 0) | (stacked == 1)).all())


def _classes(labels: Tensor | _Ragged, activation: Activation | None) -> Classes:
    if isinstance(labels, Tensor):
        return read_classes(labels)
    most = MOST_CLASSES if activation == "sigmoid" else 1
    items, named = [], []
    for item, indices in enumerate(labels):
        distinct = [label for label in dict.fromkeys(indices) if label >= 0][:most]
        items += [item] * len(distinct)
        named += distinct
    return Classes(items, named, "sigmoid" if most > 1 else None)


def _rows(parts: _Parts, classes: Classes) -> Batch:
    """Make a row for each class to explain."""
    images, items = parts.images, classes.items
    several = items != list(range(len(images)))
    for name in ("boxes", "masks", "ids", "difficult"):
        value = getattr(parts, name)
        if value is not None and len(value) != len(images):
            raise ValueError(f"{name}: got {len(value)} for {len(images)} images; give one per image.")
    ids = parts.ids.tolist() if isinstance(parts.ids, Tensor) else parts.ids
    marks = parts.difficult
    return Batch(
        images=images[items] if several else images,
        labels=torch.tensor(classes.labels, dtype=torch.int64, device=images.device),
        boxes=None if parts.boxes is None else _boxes(parts, classes),
        masks=None if parts.masks is None else _masks(parts, classes),
        ids=None if ids is None else [str(ids[item]) for item in items],
        difficult=marks[items].bool() if isinstance(marks, Tensor) and marks.ndim == 1 else None,
        size=parts.size,
        items=items if several else None,
        count=len(images),
        activation=classes.activation,
    )


def _boxes(parts: _Parts, classes: Classes) -> list[Float[Tensor, "_ 4"]]:
    boxes = regions.read_boxes(parts.boxes)
    says_form = hasattr(parts.boxes, "format") or any(hasattr(of_image, "format") for of_image in parts.boxes)
    if parts.box_form != "XYXY" and not says_form:
        form = parts.box_form if parts.box_form != COCO_BOX_KEY else _proven_form(boxes, parts)
        boxes = [regions.convert_boxes(of_image, form) for of_image in boxes]
    if isinstance(parts.labels, _Ragged):
        return [
            _of_label(boxes[item], parts.labels[item], label)
            for item, label in zip(classes.items, classes.labels, strict=True)
        ]
    shared = _shared(classes)
    return [boxes[item] * (item not in shared) for item in classes.items]


def _of_label(entries: Tensor, labels: Sequence[int], label: int) -> Tensor:
    """Return the entries of a label's objects, where there is one per object."""
    if len(entries) != len(labels):
        return entries
    return entries[torch.tensor([index == label for index in labels], device=entries.device)]


def _shared(classes: Classes) -> set[int]:
    """Return the items with several rows: nothing says which class a single region belongs to."""
    return {item for item, after in zip(classes.items, classes.items[1:], strict=False) if item == after}


def _proven_form(boxes: Sequence[Tensor], parts: _Parts) -> str:
    """Return the format of boxes under COCO's key, if only one format puts all of them inside the images."""
    fits = []
    for form in ("XYXY", "XYWH"):
        read = [regions.convert_boxes(of_image, form).cpu() for of_image in boxes]
        try:
            regions.check_boxes(read, parts.size or size_of(parts.images))
        except ValueError:
            continue
        fits.append(form)
    if len(fits) == 2 and any(of_image.any() for of_image in boxes):
        raise ValueError(
            'boxes under "bbox", COCO\'s key for (x, y, w, h), may as well be (x0, y0, x1, y1): give those '
            'under "boxes", or torchvision\'s BoundingBoxes, which say their format.'
        )
    return fits[0] if fits else "XYXY"


def _masks(parts: _Parts, classes: Classes) -> Bool[Tensor, "B h w"]:
    masks, items, labels = parts.masks, classes.items, classes.labels
    if not isinstance(masks, Tensor) and all(mask is None for mask in masks):
        size = size_of(parts.images)
        return torch.zeros(len(items), *size, dtype=torch.bool, device=parts.images.device)
    if isinstance(parts.labels, _Ragged) and not isinstance(masks, Tensor):
        of_items = [regions.as_tensor(masks[item]) for item in items]
        chosen = [
            mask if mask is None else _of_label(mask, parts.labels[item], label)
            for mask, item, label in zip(of_items, items, labels, strict=True)
        ]
        return regions.read_masks(chosen, labels)
    by_class = isinstance(masks, Tensor) and masks.ndim == 4 and masks.shape[:2] == parts.labels.shape
    if by_class:
        return regions.read_masks(masks[items, labels], labels)
    given = masks[items] if isinstance(masks, Tensor) else [masks[item] for item in items]
    read = regions.read_masks(given, labels)
    for row in range(1, len(read)):
        if items[row] == items[row - 1] and torch.equal(read[row], read[row - 1]):
            read[[other for other, item in enumerate(items) if item == items[row]]] = False
    return read


def fit_logits(batch: Batch, logits: int | None) -> Batch:
    """Leave out rows whose label has no logit, such as 255 for unknown.

    Args:
        batch: As ``read_batch`` gives it.
        logits: Number of the model's logits; None leaves the batch as it is.

    Raises:
        ValueError: If they do not look like unknown labels: all labels, or a label equal to the number of
            classes.
    """
    if logits is None or not len(batch):
        return batch
    known = known_labels(batch.labels.tolist(), max(2, logits))
    if all(known):
        return batch
    items = range(len(batch)) if batch.items is None else batch.items
    rows = [row for row, is_known in enumerate(known) if is_known]
    return replace(batch.take(rows), items=[items[row] for row in rows], count=batch.loaded)


def check_boxes(batch: Batch) -> None:
    """Refuse boxes outside the images. Reads values: call it with a batch on the host.

    Raises:
        ValueError: Naming the first such box.
    """
    regions.check_boxes(batch.boxes or [], batch.size or size_of(batch.images))
