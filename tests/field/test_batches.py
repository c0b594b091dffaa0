"""Each row of examples/README.md's table of batches."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes

from lightning_models import Classifier, squares, validate
from sess_lightning import SESS, SESSCallback
from sess_lightning.callback.batches import check_boxes, fit_logits, read_batch
from sess_lightning.methods import GradCAM
from sess_lightning.types import Batch

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 1])
BOXES = [torch.tensor([[2.0, 3, 9, 12]]), torch.tensor([[5.0, 1, 8, 15]])]
MASKS = torch.zeros(2, 16, 16, dtype=torch.bool)
MASKS[0, 3:12, 2:9] = MASKS[1, 1:15, 5:8] = True
HOT = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]])


def rows():
    text = (Path(__file__).parents[2] / "examples" / "README.md").read_text("utf-8")
    table = text.partition("## Batches it understands")[2].partition("## Limits")[0]
    return [row for row in re.findall(r"^\| (.+?) \| .+ \|$", table, re.M) if row != "batch"]


def is_plain(batch, boxes=None, masks=None):
    read = fit_logits(read_batch(batch), 4)
    check_boxes(read)
    assert torch.equal(read.images, IMAGES)
    assert read.labels.tolist() == [3, 1]
    assert read.activation is None
    if boxes is None:
        assert read.boxes is None
    else:
        assert all(torch.equal(one[one.any(1)], box) for one, box in zip(read.boxes, boxes, strict=True))
    assert (read.masks is None) if masks is None else torch.equal(read.masks, masks)


def pairs():
    is_plain((IMAGES, LABELS))
    is_plain([IMAGES, LABELS])


def more():
    is_plain((IMAGES, LABELS, ["a", "b"], torch.zeros(2)))


def usual_keys():
    for image in ("image", "pixel_values", "img", "x"):
        for label in ("label", "labels", "target", "y"):
            is_plain({image: IMAGES, label: LABELS, "boxes": BOXES}, BOXES)


@dataclass
class Fields:
    index: torch.Tensor
    image: torch.Tensor
    label: torch.Tensor
    boxes: list[torch.Tensor] | None = None


class Named(NamedTuple):
    index: torch.Tensor
    image: torch.Tensor
    label: torch.Tensor
    boxes: list[torch.Tensor] | None = None


class Nameless(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def named_fields():
    for kind in (Fields, Named):
        is_plain(kind(torch.arange(2), IMAGES, LABELS))
        is_plain(kind(torch.arange(2), IMAGES, LABELS, BOXES), BOXES)
    is_plain(Nameless(IMAGES, LABELS))


def a_list_of_one():
    is_plain([{"data": IMAGES, "label": LABELS[:, None].int()}])
    is_plain([(IMAGES, LABELS)])
    is_plain(([IMAGES, {"label": LABELS, "boxes": BOXES}],), BOXES)
    with pytest.raises(TypeError, match="The batch is a list without labels"):
        read_batch([IMAGES])


def targets():
    is_plain((IMAGES, {"label": LABELS, "boxes": BOXES}), BOXES)
    is_plain((IMAGES, {"labels": LABELS, "mask": MASKS}), masks=MASKS)


def a_dict_each():
    other = torch.tensor([[0.0, 0, 4, 4]])
    each = [
        {"labels": torch.tensor([label, 0, label]), "boxes": torch.cat([box, other, box + 1])}
        for label, box in zip(LABELS.tolist(), BOXES, strict=True)
    ]
    is_plain((IMAGES, each), [torch.cat([box, box + 1]) for box in BOXES])
    several = read_batch((IMAGES, each), activation="sigmoid")
    assert several.labels.tolist() == [3, 0, 1, 0]
    assert several.items == [0, 0, 1, 1]


def a_batch():
    is_plain(Batch(IMAGES, LABELS, boxes=BOXES), BOXES)
    adapted = read_batch({"a": IMAGES, "b": LABELS}, lambda batch: Batch(batch["a"], batch["b"]))
    assert adapted.labels.tolist() == [3, 1]


def a_column():
    is_plain((IMAGES, LABELS[:, None]))
    is_plain((IMAGES, LABELS[:, None].float()))


def soft():
    one_hot = torch.nn.functional.one_hot(LABELS, 4)
    for labels in (one_hot, one_hot.float(), one_hot * 0.8 + 0.05, one_hot * 0.7 + one_hot.flip(0) * 0.3):
        is_plain((IMAGES, labels))


def multi_hot():
    for labels in (HOT, HOT.float(), HOT.bool(), HOT * 0.8 + 0.1):
        read = read_batch((IMAGES, labels))
        assert (read.labels.tolist(), read.items, read.activation) == ([1, 3, 1], [0, 0, 1], "sigmoid")
    assert read_batch((IMAGES, torch.ones(2, 6))).labels.tolist() == [0, 1, 2, 3] * 2


def binary():
    assert read_batch((IMAGES, torch.tensor([0.7, 0.3]))).labels.tolist() == [1, 0]
    assert read_batch((IMAGES, torch.tensor([0.5, 0.0]))).labels.tolist() == [1, 0]


def unknown():
    for label in (-1, -100, torch.nan):
        read = read_batch((IMAGES, torch.tensor([label, 1])))
        assert (read.labels.tolist(), read.items, read.count) == ([1], [1], 2)
    none = read_batch((IMAGES, HOT * torch.tensor([[0], [1]])))
    assert (none.labels.tolist(), none.items, none.count) == ([1], [1], 2)


def without_logit():
    read = fit_logits(read_batch((IMAGES, torch.tensor([255, 1]))), 4)
    assert (read.labels.tolist(), read.items, read.count) == ([1], [1], 2)


def regression():
    with pytest.raises(ValueError, match="A regression target has no class to explain"):
        read_batch((IMAGES, torch.tensor([31.5, 22.0])))


def as_bytes():
    read = read_batch(((IMAGES * 255).byte(), LABELS))
    assert read.images.dtype == torch.uint8

    class Bytes(Classifier):
        def forward(self, images):
            assert images.dtype == torch.uint8
            return self.net(images.float() / 255)

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    def read_bytes(index, image, label, boxes):
        return (image.clamp(0, 1) * 255).byte(), label

    assert left_out(Bytes, read_bytes) == (4, 0)


def left_out(module, read):
    callback = SESSCallback(SESS(GradCAM(), num_scales=1), num_samples=4, report=False, on_error="raise")
    metrics = validate(".", callback, module=module, val=squares(4, read)).callback_metrics
    return int(metrics["sess/n"]), int(metrics.get("sess/left_out", 0))


def not_finite():
    assert left_out(Classifier, lambda i, image, *rest: (image / (0 if i == 1 else 1), rest[0])) == (3, 1)


def boxes():
    is_plain((IMAGES, {"label": LABELS, "boxes": torch.cat(BOXES)}), BOXES)
    padded = torch.stack([torch.cat([box, torch.zeros(1, 4)]) for box in BOXES])
    is_plain((IMAGES, {"label": LABELS, "boxes": padded}), BOXES)
    is_plain((IMAGES, {"label": LABELS, "boxes": [box.long() for box in BOXES]}), BOXES)
    negative = torch.stack([torch.cat([box, -torch.ones(1, 4)]) for box in BOXES])
    found = read_batch((IMAGES, {"label": LABELS, "boxes": negative}))
    check_boxes(found)


def by_corner_and_size(box):
    return torch.cat([box[:, :2], box[:, 2:] - box[:, :2]], 1)


def bounding_boxes():
    written = [BoundingBoxes(by_corner_and_size(box), format="XYWH", canvas_size=(16, 16)) for box in BOXES]
    is_plain((IMAGES, {"label": LABELS, "boxes": written}), BOXES)


def coco():
    written = [by_corner_and_size(box) for box in BOXES]
    is_plain((IMAGES, {"label": LABELS, "bbox": written, "area": torch.ones(2)}), BOXES)


def bbox():
    far = [torch.tensor([[9.0, 9, 5, 5]])] * 2
    is_plain((IMAGES, {"label": LABELS, "bbox": far}), [torch.tensor([[9.0, 9, 14, 14]])] * 2)
    with pytest.raises(ValueError, match=r"may as well be \(x0, y0, x1, y1\)"):
        read_batch((IMAGES, {"label": LABELS, "bbox": [torch.tensor([[1.0, 1, 5, 5]])] * 2}))


def boxes_elsewhere():
    for box in ([0.1, 0.2, 0.5, 0.6], [2.0, 3, 30, 12], [9.0, 9, 5, 5]):
        read = read_batch((IMAGES, {"label": LABELS, "boxes": [torch.tensor([box])] * 2}))
        with pytest.raises(ValueError, match="boxes:"):
            check_boxes(read)


def masks():
    for given in (MASKS, MASKS[:, None], MASKS.byte(), MASKS.float() * 255, MASKS.byte() * 255, list(MASKS)):
        is_plain((IMAGES, {"label": LABELS, "mask": given}), masks=MASKS)
    void = MASKS.long()
    void[:, :1] = 255
    is_plain((IMAGES, {"label": LABELS, "mask": void}), masks=MASKS)
    void[:, :1] = -1
    is_plain((IMAGES, {"label": LABELS, "mask": void}), masks=MASKS)


def conventions():
    trimap = torch.where(MASKS, 1, 2)
    trimap[:, :1] = 3
    is_plain((IMAGES, {"label": LABELS, "mask": trimap}), masks=MASKS)
    indices = MASKS * LABELS[:, None, None]
    indices[:, :1] = 2
    is_plain((IMAGES, {"label": LABELS, "mask": indices}), masks=MASKS)


def by_class():
    given = torch.stack([MASKS[i // 4].roll(i, 1) for i in range(8)]).unflatten(0, (2, 4))
    read = read_batch((IMAGES, {"label": HOT, "mask": given}))
    assert torch.equal(read.masks, given[[0, 0, 1], [1, 3, 1]])


def arrays_and_none():
    mask = np.zeros((8, 8), dtype=bool)
    mask[1:3] = True
    images = torch.rand(2, 3, 8, 8)
    for masks, area in (([mask, None], [16, 0]), ([None, None], [0, 0]), (np.stack([mask] * 2), [16, 16])):
        read = read_batch((images, [{"label": 1, "mask": one} for one in masks]))
        assert read.masks.flatten(1).sum(1).tolist() == area
    read = read_batch((images, [{"label": 1, "boxes": None}, {"label": 0, "boxes": np.ones((1, 4))}]))
    assert [len(boxes) for boxes in read.boxes] == [0, 1]


def undecided():
    with pytest.raises(ValueError, match="no convention says which of them are the object"):
        read_batch((IMAGES, {"label": LABELS, "mask": torch.where(MASKS, 7, 5)}))


CASES = dict(zip([
    "`(images, labels)`", "`(images, labels, ...)`", '`{"image": ..., "label": ...}`',
    "a dataclass or a named tuple with such fields", "a list of one of these, as NVIDIA DALI gives it",
    '`(images, {"label": ..., "boxes": ...})`', '`(images, [{"labels": ..., "boxes": ...}, ...])`',
    "`Batch(images, labels, ...)`", "labels (B, 1)", "labels (B, N), rows that sum to 1",
    "labels (B, N), 0 and 1", "labels (B,), floats in 0..1", "labels -1, -100, NaN, no positive class",
    "labels that the model has no logit for, such as 255", "labels of a regression", "images, bytes",
    "images with NaN or infinity", "boxes (B, 4), (B, N, 4), lists of (N, 4)", "`BoundingBoxes`",
    '`"bbox"` beside COCO\'s other keys', '`"bbox"` alone', "boxes in 0..1, or outside of the image",
    "masks (B, H, W) or (B, 1, H, W), bool, 0/1 or 0/255", "masks, trimaps or class indices",
    "masks (B, N, H, W) beside labels (B, N)", "boxes or masks in a list, as arrays or None",
    "masks that no convention decides",
], [
    pairs, more, usual_keys, named_fields, a_list_of_one, targets, a_dict_each, a_batch, a_column, soft,
    multi_hot, binary, unknown, without_logit, regression, as_bytes, not_finite, boxes, bounding_boxes, coco,
    bbox, boxes_elsewhere, masks, conventions, by_class, arrays_and_none, undecided,
], strict=True))  # fmt: skip


def test_every_row_is_tested():
    assert rows() == [*CASES]


@pytest.mark.parametrize("row", CASES)
def test_a_row_of_the_table_is_true(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CASES[row]()
