from dataclasses import dataclass

import pytest
import torch
from torchvision import tv_tensors

from sess_lightning.callback.batches import check_boxes, read_batch
from sess_lightning.types import Batch

IMAGES = torch.zeros(2, 3, 8, 10)
LABELS = torch.tensor([3, 1])
FIRST, SECOND = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]
BOXES = torch.tensor([FIRST, SECOND])


@dataclass
class Photos:
    picture: torch.Tensor
    what: torch.Tensor


def box_lists(batch):
    return [box.tolist() for box in batch.boxes]


@pytest.mark.parametrize(
    "given",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        (IMAGES, LABELS[:, None]),
        (IMAGES, LABELS.int()),
        (IMAGES, LABELS, "more"),
        (IMAGES, {"label": LABELS}),
        (IMAGES, {"labels": LABELS}),
        (IMAGES, [{"label": torch.tensor(3)}, {"label": torch.tensor(1)}]),
        (IMAGES, [{"label": 3}, {"label": 1}]),
        (IMAGES, ({"category": 3}, {"category": 1})),
        {"image": IMAGES, "label": LABELS},
        {"pixel_values": IMAGES, "labels": LABELS},
        {"x": IMAGES, "y": LABELS},
        {"images": IMAGES, "target": {"label": LABELS}},
        {"images": IMAGES, "targets": [{"labels": torch.tensor([3])}, {"labels": torch.tensor([1])}]},
        Batch(IMAGES, LABELS),
    ],
    ids=str,
)  # fmt: skip
def test_batches_of_many_kinds_are_read_as_images_and_labels(given):
    batch = read_batch(given)
    assert batch.images is IMAGES
    assert batch.labels.tolist() == [3, 1]
    assert batch.labels.dtype == torch.int64
    assert (batch.boxes, batch.masks, batch.ids, batch.difficult) == (None, None, None, None)


def test_of_multi_hot_labels_each_positive_class_is_a_row():
    batch = read_batch((IMAGES, torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 0]])))
    assert batch.labels.tolist() == [2, 3, 1]
    assert (batch.items, batch.count, batch.activation) == ([0, 0, 1], 2, "sigmoid")
    assert torch.equal(batch.images, IMAGES[[0, 0, 1]])


def test_images_without_a_known_class_have_no_row():
    batch = read_batch((IMAGES, {"label": torch.tensor([-100, 1]), "ids": ["a", "b"], "boxes": BOXES}))
    assert (batch.labels.tolist(), batch.items, batch.count, batch.ids) == ([1], [1], 2, ["b"])
    assert box_lists(batch) == [[SECOND]]
    nothing = read_batch((IMAGES, torch.tensor([-1, -1])))
    assert (len(nothing), nothing.images.shape[1:], nothing.count) == (0, IMAGES.shape[1:], 2)


def test_whole_numbers_are_images_too():
    assert read_batch((IMAGES.byte(), LABELS)).images.dtype == torch.uint8


def test_a_batch_from_an_adapter_is_read_like_any_other(unchecked):
    masks = torch.zeros(2, 8, 10, dtype=torch.uint8)
    masks[:, 2, 5] = 255
    given = Batch(IMAGES, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), masks=masks, size=(80, 100))
    batch = read_batch("anything", lambda _: given)
    assert (batch.labels.tolist(), batch.size) == ([1, 2, 0], (80, 100))
    assert batch.masks.dtype == torch.bool
    # The first two rows are one image's classes: nothing says whose the object is.
    assert batch.masks.flatten(1).sum(1).tolist() == [0, 0, 1]


def test_an_adapter_comes_first():
    batch = read_batch({"a": LABELS, "b": IMAGES}, lambda given: (given["b"], given["a"]))
    assert batch.labels.tolist() == [3, 1]
    batch = read_batch("anything", lambda _: Batch(IMAGES, LABELS, ids=["u", "v"]))
    assert batch.ids == ["u", "v"]


def test_boxes_of_one_per_image_and_of_padded_tensors_are_read():
    one = read_batch((IMAGES, {"label": LABELS, "box": torch.tensor([FIRST, SECOND])}))
    assert box_lists(one) == [[FIRST], [SECOND]]
    padded = torch.tensor([[FIRST, SECOND], [SECOND, [0.0] * 4]])
    several = read_batch({"image": IMAGES, "label": LABELS, "bboxes": padded})
    assert box_lists(several) == [[FIRST, SECOND], [SECOND, [0, 0, 0, 0]]]
    check_boxes(several)


def test_boxes_of_whole_numbers_become_floats():
    batch = read_batch(
        (IMAGES, {"label": LABELS, "boxes": [torch.tensor([[1, 2, 3, 4]]), torch.zeros(0, 4).long()]})
    )
    assert [box.dtype for box in batch.boxes] == [torch.float32] * 2
    assert box_lists(batch) == [[FIRST], []]


def test_a_detection_target_is_read_as_its_first_label_and_that_labels_boxes():
    targets = [
        {"labels": torch.tensor([2, 0, 2]), "boxes": torch.tensor([FIRST, SECOND, SECOND])},
        {"labels": torch.tensor([1]), "boxes": torch.tensor([SECOND])},
    ]
    batch = read_batch((IMAGES, targets))
    assert batch.labels.tolist() == [2, 1]
    assert box_lists(batch) == [[FIRST, SECOND], [SECOND]]


def test_each_class_of_a_detection_target_is_a_row_where_the_model_is_multi_label():
    targets = [
        {"labels": torch.tensor([2, 0, 2]), "boxes": torch.tensor([FIRST, SECOND, SECOND])},
        {"labels": torch.tensor([1]), "boxes": torch.tensor([SECOND])},
    ]
    batch = read_batch((IMAGES, targets), activation="sigmoid")
    assert (batch.labels.tolist(), batch.items) == ([2, 0, 1], [0, 0, 1])
    assert box_lists(batch) == [[FIRST, SECOND], [SECOND], [SECOND]]


def test_a_detection_target_without_objects_has_no_row():
    targets = [
        {"labels": torch.tensor([1]), "boxes": torch.tensor([FIRST])},
        {"labels": torch.zeros(0), "boxes": torch.zeros(0, 4)},
    ]
    batch = read_batch((IMAGES, targets))
    assert (batch.labels.tolist(), batch.items, batch.count) == ([1], [0], 2)


def test_a_dict_per_image_may_hold_multi_hot_labels():
    hot = [{"labels": torch.tensor([0, 1, 1, 0])}, {"labels": torch.tensor([1, 0, 0, 0])}]
    assert read_batch((IMAGES, hot)).labels.tolist() == [1, 2, 0]
    per_object = [{"labels": torch.tensor([0, 1, 1]), "boxes": torch.zeros(3, 4)}] * 2
    assert read_batch((IMAGES, per_object)).labels.tolist() == [0, 0]


def test_several_classes_share_no_region_unless_it_is_said_whose_it_is():
    hot, masks = torch.tensor([[0.0, 1, 1], [1, 0, 0]]), torch.zeros(2, 3, 8, 10, dtype=torch.bool)
    masks[0, 1, 0], masks[0, 2, 1], masks[1, 0, 2] = True, True, True
    by_class = read_batch((IMAGES, {"label": hot, "masks": masks}))
    assert [mask.nonzero()[0, 0].item() for mask in by_class.masks] == [0, 1, 2]
    boxes = read_batch((IMAGES, {"label": hot, "boxes": BOXES}))
    assert box_lists(boxes) == [[[0.0] * 4], [[0.0] * 4], [SECOND]]


XYWH = {"XYXY": BOXES, "XYWH": torch.tensor([[1.0, 2, 2, 2], [5, 6, 2, 2]])}


def test_boxes_under_cocos_key_are_cocos_where_the_rest_is_coco_too():
    for beside in ({"area": torch.ones(2)}, {"iscrowd": torch.zeros(2)}, {"category_id": LABELS}):
        batch = read_batch({"image": IMAGES, "label": LABELS, "bbox": XYWH["XYWH"], **beside})
        assert box_lists(batch) == [[FIRST], [SECOND]]
    targets = [{"category_id": 3, "bbox": [1, 2, 2, 2], "area": 4}, {"category_id": 1, "bbox": [5, 6, 2, 2]}]
    targets[1]["area"] = 4
    assert box_lists(read_batch((IMAGES, targets))) == [[FIRST], [SECOND]]


@pytest.mark.parametrize("form", XYWH)
def test_boxes_under_cocos_key_alone_are_what_they_can_be(form):
    batch = read_batch({"image": IMAGES, "label": LABELS, "bbox": XYWH[form]})
    assert box_lists(batch) == [[FIRST], [SECOND]]


def test_boxes_under_cocos_key_that_could_be_either_are_refused_and_the_remedies_work():
    either = torch.tensor([[1.0, 1, 4, 4]] * 2)
    with pytest.raises(ValueError, match=r'may as well be \(x0, y0, x1, y1\): give those under "boxes"'):
        read_batch({"image": IMAGES, "label": LABELS, "bbox": either})
    renamed = read_batch({"image": IMAGES, "label": LABELS, "boxes": either})
    assert box_lists(renamed) == [[[1.0, 1, 4, 4]]] * 2
    said = tv_tensors.BoundingBoxes(either, format="XYWH", canvas_size=(8, 10))
    assert box_lists(read_batch({"image": IMAGES, "label": LABELS, "bbox": said})) == [[[1.0, 1, 5, 5]]] * 2


def test_a_detection_targets_masks_are_those_of_its_first_label():
    masks = torch.zeros(3, 8, 10, dtype=torch.uint8)
    masks[0, 0, 0] = masks[1, 1, 1] = masks[2, 2, 2] = 1
    targets = [
        {"labels": torch.tensor([2, 0, 2]), "masks": masks},
        {"labels": torch.tensor([1]), "masks": masks[1:2]},
    ]
    batch = read_batch((IMAGES, targets))
    assert [mask.nonzero().tolist() for mask in batch.masks] == [[[0, 0], [2, 2]], [[1, 1]]]


@pytest.mark.parametrize(
    ("form", "written"), [("XYXY", [1.0, 2, 3, 6]), ("XYWH", [1.0, 2, 2, 4]), ("CXCYWH", [2.0, 4, 2, 4])]
)
@pytest.mark.parametrize("kind", ["one box", "boxes", "boxes of two labels"])
def test_boxes_that_say_how_they_are_written_are_converted(form, written, kind):
    def boxes(*rows):
        return tv_tensors.BoundingBoxes(torch.tensor(rows), format=form, canvas_size=(8, 10))

    target = {
        "one box": {"label": 3, "boxes": boxes(written)},
        "boxes": {"labels": torch.tensor([3]), "boxes": boxes(written)},
        "boxes of two labels": {"labels": torch.tensor([3, 0]), "boxes": boxes(written, [1.0, 1, 1, 1])},
    }[kind]
    batch = read_batch((IMAGES, [target, target]))
    assert box_lists(batch) == [[[1.0, 2, 3, 6]]] * 2
    assert type(batch.boxes[0]) is torch.Tensor


def test_a_whole_batchs_boxes_that_say_how_they_are_written_are_converted():
    boxes = tv_tensors.BoundingBoxes(torch.tensor([[1.0, 2, 2, 4]] * 2), format="XYWH", canvas_size=(8, 10))
    assert box_lists(read_batch((IMAGES, {"label": LABELS, "boxes": boxes}))) == [[[1.0, 2, 3, 6]]] * 2


@pytest.mark.parametrize("shape", [(2, 8, 10), (2, 1, 8, 10), (2, 3, 8, 10)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_with_and_without_channels_are_read_as_one_mask_per_image(shape, dtype):
    masks = torch.zeros(shape, dtype=dtype)
    masks[..., 2, 5] = 1
    batch = read_batch((IMAGES, {"label": LABELS, "mask": masks}))
    assert batch.masks.shape == (2, 8, 10)
    assert batch.masks.dtype == torch.bool
    assert batch.masks.nonzero().tolist() == [[0, 2, 5], [1, 2, 5]]


def test_masks_given_as_a_list_are_read():
    masks = [torch.ones(8, 10), torch.zeros(8, 10)]
    batch = read_batch({"image": IMAGES, "label": LABELS, "masks": masks})
    assert batch.masks.flatten(1).all(1).tolist() == [True, False]


@pytest.mark.parametrize(("ids", "read"), [(["a", "b"], ["a", "b"]), (torch.tensor([7, 9]), ["7", "9"])])
def test_ids_become_names(ids, read):
    assert read_batch({"image": IMAGES, "label": LABELS, "image_id": ids}).ids == read


def test_difficult_marks_are_read():
    batch = read_batch((IMAGES, {"label": LABELS, "difficult": torch.tensor([1, 0])}))
    assert batch.difficult.tolist() == [True, False]


def test_a_batch_gives_away_the_samples_that_are_taken():
    batch = read_batch((IMAGES, {"label": LABELS, "boxes": torch.tensor([FIRST, SECOND]), "ids": ["a", "b"]}))
    taken = batch.take([1])
    assert (len(taken), taken.labels.tolist(), box_lists(taken), taken.ids) == (1, [1], [[SECOND]], ["b"])
    assert taken.masks is None


def test_a_batch_moves_with_all_it_holds():
    batch = Batch(IMAGES, LABELS, boxes=[torch.zeros(1, 4)] * 2, ids=["a", "b"], size=(80, 100)).to("meta")
    assert {batch.images.device.type, batch.labels.device.type, batch.boxes[1].device.type} == {"meta"}
    assert (batch.ids, batch.size) == (["a", "b"], (80, 100))


@pytest.mark.parametrize(
    ("given", "error", "names"),
    [
        (IMAGES, TypeError, "The batch is a Tensor without labels"),
        ((IMAGES,), TypeError, "The batch is a tuple without labels"),
        ({"picture": IMAGES, "label": LABELS}, TypeError, r"keys \['label', 'picture'\]; none of \('image'"),
        ({"image": IMAGES}, TypeError, r"a dict with keys \['image'\]"),
        ((IMAGES, {"name": LABELS}), TypeError, "labels as NoneType"),
        ((IMAGES, [{"name": 1}, {"name": 2}]), TypeError, r"The targets are dicts with keys \['name'\]"),
        (
            ([IMAGES[0], IMAGES[1]], [{"labels": torch.tensor([1, 2])}] * 2),
            TypeError,
            "images as list and labels as a list for each image; both must be tensors",
        ),
        (Photos(IMAGES, LABELS), TypeError, r"is a Photos with keys \['picture', 'what'\]"),
        ((IMAGES, ["cat", "dog"]), TypeError, "labels as list; both must be tensors"),
        ((IMAGES, torch.tensor([[0, 2, 1]] * 2)), ValueError, "labels hold 0, 2, 1, 0, ...: neither"),
        ((IMAGES[0], LABELS), ValueError, r"images are \(3, 8, 10\), torch.float32; expected \(B, C"),
        ((IMAGES.bool(), LABELS), ValueError, r"torch.bool; expected \(B, C, H, W\)"),
        ((IMAGES, LABELS[:1]), ValueError, r"labels have shape \(1,\) for 2 images"),
        ((IMAGES, torch.zeros(2, 8, 10)), ValueError, r"labels have shape \(2, 8, 10\); expected class"),
        ((IMAGES, {"label": LABELS, "boxes": torch.zeros(3, 4)}), ValueError, "boxes: got 3 for 2 images"),
        ((IMAGES, {"label": LABELS, "masks": torch.zeros(1, 8, 10)}), ValueError, "masks: got 1 for 2"),
        ((IMAGES, {"label": LABELS, "ids": ["a"]}), ValueError, "ids: got 1 for 2 images"),
    ],
)
def test_what_cannot_be_read_is_named_with_a_way_out(given, error, names, unchecked):
    with pytest.raises(error, match=names) as caught:
        read_batch(given)
    assert "batch_adapter=lambda batch: (images, labels)" in str(caught.value)
    assert "models that do not classify images cannot be explained" in str(caught.value)


def test_an_adapter_that_fails_is_named():
    with pytest.raises(TypeError, match="list indices must be") as caught:
        read_batch([IMAGES, LABELS], lambda batch: (batch["image"], batch["label"]))
    assert caught.value.__notes__ == ["This was batch_adapter=, called with one of validation's batches."]


@pytest.mark.parametrize(
    "box",
    [[-1.0, 0, 3, 3], [0.0, -2, 3, 3], [0.0, 0, 12, 3], [0.0, 0, 3, 10], [3.0, 0, 1, 3], [0.0, 3, 3, 1]],
)
def test_boxes_outside_of_the_image_or_inside_out_are_refused(box):
    batch = read_batch(
        (IMAGES, {"label": LABELS, "boxes": [torch.tensor([FIRST]), torch.tensor([FIRST, box])]})
    )
    told = ", ".join(f"{value:g}" for value in box)
    with pytest.raises(
        ValueError, match=rf"boxes: \({told}\) of image 1 does not lie in the 8x10 image; .* convert"
    ):
        check_boxes(batch)


def test_boxes_may_reach_to_the_very_border_and_refer_to_the_original_size():
    boxes = [torch.tensor([[0.0, 0, 10, 8]]), torch.tensor([[0.0, 0, 0, 0]])]
    check_boxes(Batch(IMAGES, LABELS, boxes=boxes))
    check_boxes(Batch(IMAGES, LABELS, boxes=[torch.tensor([[0.0, 0, 100, 80]])] * 2, size=(80, 100)))
    with pytest.raises(ValueError, match="does not lie in the 4x5 image"):
        check_boxes(Batch(IMAGES, LABELS, boxes=boxes, size=(4, 5)))


def test_a_failing_adapters_own_notes_are_kept():
    def adapt(batch):
        error = KeyError("label")
        error.__notes__ = ["first"]
        raise error

    with pytest.raises(KeyError) as caught:
        read_batch((IMAGES, LABELS), adapt)
    assert caught.value.__notes__ == [
        "first",
        "This was batch_adapter=, called with one of validation's batches.",
    ]
