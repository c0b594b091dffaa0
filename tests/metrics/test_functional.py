import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from formula import build, picture
from lightning_models import Counter, filled_net
from sess_lightning.introspection.logits import score
from sess_lightning.metrics.functional import (
    blurred_baseline,
    box_masks,
    class_mean,
    curve_auc,
    deletion_curve,
    has_region,
    insertion_curve,
    pad_boxes,
    pixel_steps,
    pointing_hits,
    rank_correlation,
    relevance_mass,
    tied_share,
)

GOLDEN = Path(__file__).parents[1] / "golden"
POINTING = json.loads((GOLDEN / "pointing.json").read_text())
AGGREGATE = json.loads((GOLDEN / "pointing_aggregate.json").read_text())


class Sum(nn.Module):
    """Speaks for class 1 by the sum of the pixels: its curves can be had by hand."""

    def forward(self, images):
        total = images.sum((1, 2, 3))
        return torch.stack([torch.zeros_like(total), total], 1)


def sigmoids(*values):
    return torch.tensor([[1 / (1 + math.exp(-value)) for value in values]])


@pytest.fixture
def four():
    """One picture of 2 x 2 pixels; as a map of itself it ranks them 0.4, 0.3, 0.2, 0.1."""
    return torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])


ONE = torch.tensor([1])


@pytest.mark.parametrize("name", ["tiny", "resnet18"])
def test_curves_are_those_of_the_authors_code(name):
    golden = np.load(GOLDEN / f"causal_{name}.npz")
    meta = json.loads(str(golden["meta"]))
    image, target = picture(224, 224, meta["stream"])[None], torch.tensor([meta["cls"]])
    saliency = -torch.from_numpy(golden["rank"].astype(np.float32))[None]
    insertion = insertion_curve(build(name), image, saliency, target)
    deletion = deletion_curve(build(name), image, saliency, target)
    torch.testing.assert_close(insertion[0], torch.from_numpy(golden["insertion"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(deletion[0], torch.from_numpy(golden["deletion"]), atol=1e-5, rtol=0)
    assert curve_auc(insertion).item() == pytest.approx(meta["ins_auc"], abs=1e-5)
    assert curve_auc(deletion).item() == pytest.approx(meta["del_auc"], abs=1e-5)


def test_curve_auc_is_the_trapezoid_rule_by_hand():
    assert curve_auc(torch.tensor([0.0, 1.0, 1.0])).item() == 0.75
    assert curve_auc(torch.tensor([[1.0, 0.5, 0.25], [0.0, 0.0, 1.0]])).tolist() == [0.5625, 0.25]


def test_deletion_takes_the_highest_pixels_first(four):
    curve = deletion_curve(Sum(), four, four[:, 0], ONE, steps=4)
    torch.testing.assert_close(curve, sigmoids(1.0, 0.6, 0.3, 0.1, 0.0))


def test_insertion_shows_the_highest_pixels_first(four):
    curve = insertion_curve(Sum(), four, four[:, 0], ONE, steps=4, baseline=torch.zeros_like(four))
    torch.testing.assert_close(curve, sigmoids(0.0, 0.4, 0.7, 0.9, 1.0))


def test_a_curve_goes_towards_any_baseline_that_is_given(four):
    baseline = torch.full_like(four, 1.0)
    deletion = deletion_curve(Sum(), four, four[:, 0], ONE, steps=2, baseline=baseline)
    torch.testing.assert_close(deletion, sigmoids(1.0, 2.3, 4.0))


def test_the_two_curves_mirror_each_other_where_the_baseline_and_the_reversed_map_are_the_same(four):
    zeros = torch.zeros_like(four)
    deletion = deletion_curve(Sum(), four, four[:, 0], ONE, steps=4)
    insertion = insertion_curve(Sum(), four, -four[:, 0], ONE, steps=4, baseline=zeros)
    torch.testing.assert_close(insertion, deletion.flip(1))


def test_a_curve_has_28_steps_of_1792_pixels_at_224():
    steps = pixel_steps(torch.arange(224.0 * 224).view(1, 224, 224), 28)
    assert steps.flatten().bincount().tolist() == [1792] * 28
    assert steps[0, -1, -1] == 0
    assert steps[0, 0, 0] == 27


def test_steps_are_rounded_up_and_the_last_one_is_short():
    steps = pixel_steps(torch.arange(10.0).view(1, 2, 5), 4)
    assert steps.tolist() == [[[3, 2, 2, 2, 1], [1, 1, 0, 0, 0]]]


def test_both_ends_of_a_curve_are_the_baselines_and_the_images_own_scores():
    model, images, targets = (
        filled_net(),
        torch.stack([picture(32, 32, i) for i in (1, 2)]),
        torch.tensor([0, 3]),
    )
    maps = images[:, 0]
    own = score(model, images, targets).exp()
    blurred = score(model, blurred_baseline(images), targets).exp()
    zeros = score(model, torch.zeros_like(images), targets).exp()
    insertion = insertion_curve(model, images, maps, targets)
    deletion = deletion_curve(model, images, maps, targets)
    torch.testing.assert_close(insertion[:, [0, -1]], torch.stack([blurred, own], 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(deletion[:, [0, -1]], torch.stack([own, zeros], 1), atol=1e-6, rtol=0)
    assert insertion.shape == deletion.shape == (2, 29)


@pytest.mark.parametrize(
    ("known", "forwards"),
    [((False, False), 29), ((True, False), 28), ((False, True), 28), ((True, True), 27)],
)
def test_every_end_that_is_given_saves_one_forward(known, forwards):
    model, image = Sum(), picture(32, 32, 1)[None]
    ends = tuple(torch.tensor([0.125 * (i + 1)]) if given else None for i, given in enumerate(known))
    counter = Counter(model)
    curve = insertion_curve(model, image, image[:, 0], ONE, ends=ends)
    assert counter.images == forwards
    assert curve.shape == (1, 29)
    assert [curve[0, i].item() for i, given in zip((0, -1), known, strict=True) if given] == [
        0.125 * (i + 1) for i, given in enumerate(known) if given
    ]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_batch_size_does_not_matter(batch_size):
    model, images, targets = (
        filled_net(),
        torch.stack([picture(32, 32, i) for i in (1, 2, 3)]),
        torch.tensor([0, 1, 2]),
    )
    expected = deletion_curve(model, images, images[:, 1], targets)
    curve = deletion_curve(model, images, images[:, 1], targets, batch_size=batch_size)
    torch.testing.assert_close(curve, expected, atol=1e-6, rtol=0)


def test_at_most_batch_size_images_go_through_the_model_at_once():
    model, sizes = Sum(), []
    model.register_forward_hook(lambda _model, inputs, _output: sizes.append(len(inputs[0])))
    images = torch.stack([picture(32, 32, i) for i in (1, 2)])
    deletion_curve(model, images, images[:, 0], torch.tensor([0, 1]), batch_size=25)
    assert sizes == [25, 25, 8]


def test_ties_are_broken_in_raster_order():
    assert pixel_steps(torch.tensor([[[1.0, 2.0], [1.0, 2.0]]]), 4).tolist() == [[[2, 0], [3, 1]]]
    assert pixel_steps(torch.zeros(1, 2, 3), 6).tolist() == [[[0, 1, 2], [3, 4, 5]]]


def test_random_ties_keep_the_ranking_and_shuffle_only_what_is_tied():
    maps = torch.tensor([[[1.0] * 4, [2.0] * 4, [0.0] * 4]])
    steps = pixel_steps(maps, 12, ties="random")[0]
    assert [sorted(row.tolist()) for row in steps] == [[4, 5, 6, 7], [0, 1, 2, 3], [8, 9, 10, 11]]
    assert pixel_steps(torch.zeros(1, 4, 8), 32, ties="random").flatten().tolist() != list(range(32))


def test_random_ties_are_reproducible_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = (pixel_steps(torch.zeros(2, 8, 8), 28, ties="random") for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_nan_in_a_map_ranks_as_zero():
    maps = torch.tensor([[[torch.nan, 1.0, -1.0]]])
    assert pixel_steps(maps, 3).tolist() == [[[1, 0, 2]]]


def test_tied_share_counts_the_pixels_whose_value_another_has():
    maps = torch.tensor([[[0.0, 0.0], [1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]], [[5.0, 5.0], [5.0, 5.0]]])
    assert tied_share(maps).tolist() == [0.5, 0.0, 1.0]


def test_a_sigmoid_head_is_read_with_a_sigmoid(four):
    class Two(nn.Module):
        def forward(self, images):
            total = images.sum((1, 2, 3))
            return torch.stack([5 + 0 * total, total], 1)

    curve = deletion_curve(Two(), four, four[:, 0], ONE, steps=2, activation="sigmoid")
    torch.testing.assert_close(curve, sigmoids(1.0, 0.3, 0.0))


def test_a_single_logit_speaks_for_class_1_and_against_class_0(four):
    class Single(nn.Module):
        def forward(self, images):
            return images.sum((1, 2, 3))

    both = four.expand(2, -1, -1, -1)
    curve = deletion_curve(Single(), both, both[:, 0], torch.tensor([1, 0]), steps=2)
    torch.testing.assert_close(curve, torch.cat([sigmoids(1.0, 0.3, 0.0), sigmoids(-1.0, -0.3, 0.0)]))


def test_the_model_is_given_back_as_it_was(four):
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), Sum()).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deletion_curve(model, four, four[:, 0], ONE)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_curves_are_the_same_under_inference_mode(four):
    expected = insertion_curve(Sum(), four, four[:, 0], ONE)
    with torch.inference_mode():
        assert torch.equal(insertion_curve(Sum(), four.clone(), four[:, 0].clone(), ONE), expected)


@pytest.mark.parametrize(("size", "kernel", "sigma"), [((224, 224), 51, 50.0), ((112, 140), 25, 25.0)])
def test_the_blurred_baseline_is_51_px_and_sigma_50_at_224_and_in_proportion_elsewhere(size, kernel, sigma):
    image = picture(*size, 3)[None]
    expected = gaussian_blur(image, [kernel, kernel], [sigma, sigma])  # Its border mirrors as ours.
    torch.testing.assert_close(blurred_baseline(image), expected, atol=1e-5, rtol=0)


def test_curves_refuse_what_does_not_fit(four, unchecked):
    maps = four[:, 0]
    with pytest.raises(
        ValueError, match=r"maps must be \(B, H, W\) like the images, \(1, 2, 2\), got \(1, 3, 3\)"
    ):
        deletion_curve(Sum(), four, torch.zeros(1, 3, 3), ONE)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        deletion_curve(Sum(), four, maps, ONE, steps=0)
    with pytest.raises(ValueError, match='ties must be "first" or "random", got \'last\''):
        deletion_curve(Sum(), four, maps, ONE, ties="last")
    with pytest.raises(
        ValueError, match=r"images must be \(B, C, H, W\), got \(1, 2, 2\); use images\[None\]"
    ):
        deletion_curve(Sum(), four[0], maps, ONE)
    with pytest.raises(ValueError, match="images hold NaN"):
        insertion_curve(Sum(), four * torch.nan, maps, ONE)
    with pytest.raises(ValueError, match=r"targets must be class indices in 0\.\.1"):
        insertion_curve(Sum(), four, maps, ONE + 1)


@pytest.mark.parametrize("curve", [insertion_curve, deletion_curve])
def test_a_baseline_of_another_shape_is_refused(curve, four, unchecked):
    with pytest.raises(
        ValueError, match=r"baseline has shape \(1, 1, 3, 3\); .* that of images, \(1, 1, 2, 2\)"
    ):
        curve(Sum(), four, four[:, 0], ONE, baseline=torch.zeros(1, 1, 3, 3))


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
