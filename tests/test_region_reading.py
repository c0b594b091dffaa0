import numpy as np
import pytest
import torch

from sess_lightning.regions import check_boxes, describe_regions, read_boxes, read_masks, read_regions


def test_a_mask_as_wide_as_a_box_is_told_from_boxes_by_the_size_of_the_images():
    masks = torch.zeros(2, 6, 4, dtype=torch.uint8)
    masks[:, 1, 2] = 1
    assert read_regions(masks, size=(6, 4)).nonzero().tolist() == [[0, 1, 2], [1, 1, 2]]
    assert [each.tolist() for each in read_regions(masks, size=(9, 9))] == masks.tolist()
    assert read_regions(masks.bool(), size=(9, 9)).dtype == torch.bool


def test_masks_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match=r"masks have the sizes \[\(4, 5\), \(5, 5\)\]; resize them to one"):
        read_masks([torch.ones(5, 5), torch.ones(4, 5)])


def test_what_is_neither_masks_nor_boxes_is_refused():
    with pytest.raises(ValueError, match=r"masks must be \(B, h, w\), got \(1, 1, 2, 8, 8\)"):
        read_regions(torch.ones(1, 1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"boxes must be \(N, 4\) per image, \(x0, y0, x1, y1\), got \(7,\)"):
        read_regions(torch.ones(2, 7))


def test_one_value_beside_zero_and_void_must_fill_a_block_to_be_a_class():
    mask = torch.zeros(1, 9, 9, dtype=torch.uint8)
    mask[0, :, 4], mask[0, :, 5:] = 85, 255  # An edge, as resizing leaves it.
    assert read_masks(mask).sum((1, 2)).tolist() == [36]
    mask[0, :, 2:5] = 85
    assert torch.equal(read_masks(mask), mask == 85)


def test_class_indices_are_read_by_labels_unless_they_may_count_objects():
    masks = torch.zeros(2, 8, 8, dtype=torch.long)
    masks[:, :4, :4], masks[:, 4:, 4:] = 1, 2
    with pytest.raises(ValueError, match="masks hold the values 0, 1, 2: no convention"):
        read_masks(masks, labels=[2, 1])
    masks[1][masks[1] == 2] = 6
    assert read_masks(masks, labels=torch.tensor([2, 1])).flatten(1).sum(1).tolist() == [16, 16]
    assert torch.equal(read_masks(masks, labels=[2, 6])[1], masks[1] == 6)


def test_an_image_without_anything_on_its_mask_stays_empty_beside_class_indices():
    masks = torch.zeros(3, 8, 8, dtype=torch.long)
    masks[0, :4, :4], masks[0, 4:], masks[1, 4:] = 5, 6, 3
    assert read_masks(masks, labels=[5, 3, 4]).flatten(1).sum(1).tolist() == [16, 32, 0]


def test_masks_without_any_zero_are_everywhere_only_where_that_is_a_yes():
    assert read_masks(torch.full((1, 4, 4), 255)).all()
    assert read_masks(torch.ones(1, 4, 4)).all()
    with pytest.raises(ValueError, match="masks hold the values 3: no convention"):
        read_masks(torch.full((1, 4, 4), 3))


def test_boxes_are_read_whatever_holds_them():
    expected = [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
    flat = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    for given in (flat, flat[:, None], list(flat), [[[1, 2, 3, 4]], [[5.0, 6, 7, 8]]]):
        read = read_boxes(given)
        assert [each.tolist() for each in read] == expected
        assert {each.dtype for each in read} == {torch.float32}


def test_arrays_are_read_and_none_is_an_image_without_regions():
    mask = np.zeros((6, 8), dtype=bool)
    mask[1, 2:5] = True
    for nothing in (None, np.zeros((0, 6, 8), dtype=bool)):
        assert read_regions([mask, nothing]).flatten(1).sum(1).tolist() == [3, 0]
    assert read_masks(np.stack([mask, mask])).flatten(1).sum(1).tolist() == [3, 3]
    boxes = read_regions([None, np.array([[1, 2, 3, 4]]), None])
    assert [each.tolist() for each in boxes] == [[], [[1, 2, 3, 4]], []]
    with pytest.raises(ValueError, match=r"masks have the sizes \[\]"):
        read_masks([None, None])


@pytest.mark.parametrize("share", [[0.1, 0.2, 0.5, 0.9], [0.0, 0, 1, 1]])
def test_boxes_that_look_like_shares_of_the_sides_are_refused(share):
    padded = torch.tensor([share, [0.0] * 4, [-1.0] * 4])
    in_pixels = torch.cat([padded[:1] * torch.tensor([10.0, 8, 10, 8]), padded[1:]])
    with pytest.raises(
        ValueError, match="all others lie within one pixel, like fractions of the 8x10 image's"
    ):
        check_boxes([padded, torch.zeros(0, 4)], (8, 10))
    check_boxes([in_pixels], (8, 10))


def test_regions_say_how_large_they_are():
    boxes = [torch.tensor([[0.0, 0, 20, 10], [5, 5, 5, 5]]), torch.tensor([[2.0, 0, 32, 40], [0, 0, 10, 12]])]
    assert describe_regions(boxes) == "boxes 20 x 12 px"
    assert describe_regions([torch.zeros(0, 4)]) == "no box with an area"
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, 0], masks[1, :2] = True, True
    assert describe_regions(masks[[0, 2]]) == "masks over 10% of the image"
    assert describe_regions(masks[2:]) == "empty masks"
    assert describe_regions(None) == "no boxes or masks"
