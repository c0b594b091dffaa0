import json
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torchvision.ops import box_convert

from sess_lightning.metrics.functional import (
    box_masks,
    class_mean,
    has_region,
    pad_boxes,
    pointing_hits,
    rank_correlation,
    relevance_mass,
)

GOLDEN = Path(__file__).parents[1] / "golden"
POINTING = json.loads((GOLDEN / "pointing.json").read_text())
AGGREGATE = json.loads((GOLDEN / "pointing_aggregate.json").read_text())


def peak(height, width, x, y):
    maps = torch.zeros(1, height, width)
    maps[0, y, x] = 1
    return maps


def region_mask(height, width, boxes):
    """The union of boxes of inclusive pixels."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        mask[0, y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


def half_open(boxes):
    return [torch.tensor([[x0, y0, x1 + 1, y1 + 1] for x0, y0, x1, y1 in boxes]).float().reshape(-1, 4)]


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_pointing_agrees_with_brute_force(kind):
    for case in POINTING:
        size = case["h"], case["w"]
        regions = half_open(case["boxes"]) if kind == "boxes" else region_mask(*size, case["boxes"])
        hit = pointing_hits(peak(*size, *case["point"]), regions, float(case["tol"])).item()
        assert hit == case["hit"], case


@pytest.mark.parametrize("kind", ["boxes", "masks"])
@pytest.mark.parametrize(
    ("offset", "hit"), [((9, 12), False), ((15, 0), False), ((10, 11), True), ((14, 0), True)]
)
def test_pointing_tolerance_is_exclusive(kind, offset, hit):
    point = 20 + offset[0], 20 + offset[1]
    regions = half_open([[20, 20, 20, 20]]) if kind == "boxes" else region_mask(48, 48, [[20, 20, 20, 20]])
    assert pointing_hits(peak(48, 48, *point), regions).tolist() == [hit]


def test_the_point_is_the_first_maximum_in_raster_order():
    maps = torch.zeros(1, 40, 40)
    maps[0, 5, 30] = maps[0, 5, 35] = maps[0, 30, 5] = 1
    near = {
        point: pointing_hits(maps, half_open([[*point, *point]]), 1.0).item()
        for point in ((30, 5), (35, 5), (5, 30))
    }
    assert near == {(30, 5): True, (35, 5): False, (5, 30): False}


def test_a_flat_map_is_a_miss_wherever_the_region_is():
    everywhere = torch.ones(2, 8, 8, dtype=torch.bool)
    maps = torch.stack([torch.zeros(8, 8), torch.full((8, 8), 0.5)])
    assert pointing_hits(maps, everywhere).tolist() == [False, False]
    assert pointing_hits(maps, half_open([[0, 0, 7, 7]]) * 2).tolist() == [False, False]


def test_nan_counts_as_zero_when_pointing():
    maps = torch.full((2, 40, 40), torch.nan)
    maps[0, 30, 30] = 0.5
    region = region_mask(40, 40, [[30, 30, 30, 30]]).expand(2, -1, -1)
    assert pointing_hits(maps, region, 2.0).tolist() == [True, False]


def test_a_map_is_resized_to_the_regions_own_resolution():
    maps = peak(8, 8, 6, 1)  # Its centre lies at x = 6.5 * 10, y = 1.5 * 5 of the original.
    mask = region_mask(40, 80, [[64, 7, 65, 8]])
    assert pointing_hits(maps, mask, 2.0).tolist() == [True]
    assert pointing_hits(maps, half_open([[64, 7, 65, 8]]), 2.0, size=(40, 80)).tolist() == [True]
    assert pointing_hits(maps, half_open([[6, 1, 6, 1]]), 2.0, size=(40, 80)).tolist() == [False]


def test_boxes_count_in_the_maps_own_pixels_where_no_size_is_given():
    assert pointing_hits(peak(8, 8, 6, 1), half_open([[6, 1, 6, 1]]), 1.0).tolist() == [True]


def test_any_box_of_an_image_will_do_and_the_filling_of_short_lists_never_does():
    maps = peak(64, 64, 0, 0).expand(3, -1, -1)
    far, near = [40.0, 40, 50, 50], [5.0, 5, 9, 9]
    regions = [torch.tensor([far, near]), torch.tensor([far]), torch.zeros(0, 4)]
    assert pointing_hits(maps, regions).tolist() == [True, False, False]


def test_boxes_of_no_area_are_no_region():
    regions = [
        torch.tensor([[3.0, 3, 3, 9]]),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0, 0, 0], [1, 1, 2, 2]]),
    ]
    assert has_region(regions, torch.device("cpu")).tolist() == [False, False, True]
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[1, 3, 3] = True
    assert has_region(masks, torch.device("cpu")).tolist() == [False, True]


def test_masks_of_numbers_are_read_as_masks(unchecked):
    masks = torch.zeros(2, 4, 4, dtype=torch.uint8)
    masks[1, 3, 3] = 255
    found = has_region(masks, torch.device("cpu"))
    assert found.dtype == torch.bool
    assert found.tolist() == [False, True]


def test_pad_boxes_fills_up_with_empty_boxes():
    padded = pad_boxes([torch.ones(2, 4), torch.zeros(0, 4), torch.full((1, 4), 2.0)], torch.device("cpu"))
    assert padded[..., 0].tolist() == [[1, 1], [0, 0], [2, 0]]


def test_rounding_does_not_choose_the_point_of_a_plateau():
    low_right = torch.zeros(1, 4, 4, dtype=torch.bool)
    low_right[0, 3, 3] = True
    plateau = torch.full((1, 4, 4), 0.9)
    plateau[0, 0, 0] = 0
    for highest in ((0, 1), (3, 3)):
        maps = plateau.clone()
        maps[0][highest] += 1e-7
        assert pointing_hits(maps, low_right, tolerance=3.0).tolist() == [False]


def test_a_map_flat_but_for_rounding_is_a_miss():
    maps = torch.full((1, 4, 4), 0.3)
    maps[0, 1, 1] += 3e-8
    assert pointing_hits(maps, torch.ones(1, 4, 4, dtype=torch.bool)).tolist() == [False]


def test_relevance_mass_takes_a_negative_rounding_for_zero():
    maps, region = torch.tensor([[[1.0, -1e-8], [1.0, 0.0]]]), torch.tensor([[[True, False], [False, False]]])
    torch.testing.assert_close(relevance_mass(maps, region), torch.tensor([0.5]))
    assert relevance_mass(maps - 0.1, region).isnan().all()


def test_pointing_refuses_what_does_not_fit(unchecked):
    maps = peak(8, 8, 1, 1)
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        pointing_hits(maps, half_open([[1, 1, 1, 1]]), 0.0)
    with pytest.raises(ValueError, match="regions: got 2 for 1 maps; give one per map"):
        pointing_hits(maps, torch.ones(2, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"boxes must be \(N, 4\) per image, \(x0, y0, x1, y1\), got \(5,\)"):
        pointing_hits(maps, torch.ones(1, 5))


@pytest.mark.parametrize("score", [pointing_hits, relevance_mass])
def test_maps_of_another_form_are_refused_or_read(score, unchecked):
    maps, masks = torch.rand(3, 4, 9), torch.rand(3, 4, 9) > 0.5
    with pytest.raises(ValueError, match=r"maps must be \(B, h, w\), got \(3, 1, 4, 9\); use maps\[:, 0\]"):
        score(maps[:, None], masks)
    with pytest.raises(ValueError, match=r"maps must be \(B, h, w\), got \(4, 9\); .*maps\[None\]"):
        score(maps[0], masks[:1])
    with pytest.raises(ValueError, match="regions: got 1 for 3 maps; give one per map"):
        score(maps, masks[:1])
    grey = (maps * 255).byte()
    torch.testing.assert_close(score(grey, masks, size=(8, 18)), score(grey.float(), masks, size=(8, 18)))


def test_class_means_are_over_classes_seen_or_over_all_as_torchray_has_it():
    results = torch.tensor(AGGREGATE["results"])
    hits, misses = (
        torch.bincount(results[results[:, 1] == value, 0], minlength=AGGREGATE["num_classes"])
        for value in (1, -1)
    )
    assert class_mean(hits, hits + misses).item() == pytest.approx(AGGREGATE["mean_over_seen"])
    assert class_mean(hits, hits + misses, unseen_as_zero=True).item() == pytest.approx(
        AGGREGATE["torchray_mean"]
    )


def test_class_mean_of_no_trial_at_all_is_nan():
    assert class_mean(torch.zeros(3).long(), torch.zeros(3).long()).isnan().item()


def test_relevance_mass_is_the_share_of_the_sum_inside_the_region():
    maps = torch.tensor([[[1.0, 2], [3, 4]]]).expand(2, -1, -1)
    boxes = [torch.tensor([[0.0, 1, 2, 2]]), torch.tensor([[1.0, 0, 2, 1], [1, 0, 2, 2]])]
    assert relevance_mass(maps, boxes).tolist() == pytest.approx([0.7, 0.6])
    assert relevance_mass(maps, box_masks(boxes, (2, 2), maps.device)).tolist() == pytest.approx([0.7, 0.6])


def test_a_map_without_preference_has_the_regions_share_and_one_of_zeros_has_nothing_inside():
    boxes = [torch.tensor([[0.0, 0, 4, 2]])] * 3
    maps = torch.stack([torch.ones(4, 8), torch.zeros(4, 8), torch.full((4, 8), torch.nan)])
    assert relevance_mass(maps, boxes).tolist() == [0.25, 0, 0]


def test_a_map_with_negative_values_has_no_relevance_mass():
    maps = torch.stack([torch.ones(4, 4), torch.linspace(-1, 1, 16).view(4, 4)])
    mass = relevance_mass(maps, [torch.tensor([[0.0, 0, 4, 2]])] * 2)
    assert mass[0] == 0.5
    assert mass[1].isnan()


WRITTEN = torch.tensor([[8.0, 20, 24, 30], [1, 1, 31, 5], [-1, -1, -1, -1]])
OTHERS = {
    "shares": (WRITTEN[:2] / 32, lambda boxes: boxes * 32, "within one pixel, like fractions of the 32x32"),
    "x, y, w, h": (
        torch.tensor([[8.0, 20, 16, 10], [1, 1, 30, 4]]), lambda boxes: box_convert(boxes, "xywh", "xyxy"),
        r"\(8, 20, 16, 10\) of image 0 is inverted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
@pytest.mark.parametrize(
    "score", [lambda *args: pointing_hits(*args, tolerance=1.0), relevance_mass], ids=["pointing", "mass"]
)
def test_boxes_of_another_form_are_refused_and_the_remedy_works(form, score):
    boxes, remedy, text = OTHERS[form]
    maps = peak(32, 32, 9, 21)
    with pytest.raises(ValueError, match=f"{text}.*boxes are .x0, y0, x1, y1. in pixels"):
        score(maps, [boxes])
    assert score(maps, [remedy(boxes)]) == score(maps, [WRITTEN]) == 1


def test_boxes_that_reach_beyond_the_image_or_are_a_single_pixel_are_scored():
    assert pointing_hits(peak(32, 32, 31, 0), [torch.tensor([[30.0, -2, 35, 1]])], 1.0)
    assert pointing_hits(peak(32, 32, 0, 0), [torch.tensor([[0.0, 0, 1, 1]])], 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_relevance_mass_of_maps_of_other_types_does_not_overflow(dtype):
    maps = torch.ones(1, 300, 300, dtype=dtype)  # More pixels than float16 counts to.
    assert relevance_mass(maps, half_open([[0, 0, 149, 299]])).tolist() == [0.5]


def test_relevance_mass_of_an_empty_region_is_nan():
    empty = [torch.zeros(0, 4), torch.tensor([[1.0, 1, 1, 3]])]
    assert relevance_mass(torch.ones(2, 4, 4), empty).isnan().all()


def test_relevance_mass_is_taken_at_the_regions_own_resolution():
    halves = torch.tensor([[[1.0, 0]]])
    assert relevance_mass(halves, [torch.tensor([[0.0, 0, 50, 10]])], size=(10, 100)).item() > 0.8
    assert relevance_mass(halves, [torch.tensor([[0.0, 0, 1, 1]])]).item() == 1


def test_a_pixel_belongs_to_a_box_that_holds_its_centre():
    masks = box_masks([torch.tensor([[0.4, 0.6, 1.6, 2.0]])], (3, 3), torch.device("cpu"))
    assert masks.long().tolist() == [[[0, 0, 0], [1, 1, 0], [0, 0, 0]]]


def test_rank_correlation_is_spearmans_with_ties():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(6, (2, 5, 40), generator=generator).float()
    expected = [spearmanr(a, b).statistic for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    assert rank_correlation(first, second).tolist() == pytest.approx(expected, abs=1e-6)
    assert rank_correlation(first, first).tolist() == pytest.approx([1.0] * 5)
    assert rank_correlation(first, -first).tolist() == pytest.approx([-1.0] * 5)


def test_a_constant_map_correlates_with_nothing():
    assert rank_correlation(torch.zeros(1, 4), torch.rand(1, 4)).isnan().all()
