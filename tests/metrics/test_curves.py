"""Insertion and deletion curves."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from formula import build, picture
from lightning_models import Counter, filled_net
from sess_lightning.introspection.logits import score
from sess_lightning.metrics.curves import _Item, _Painter
from sess_lightning.metrics.functional import (
    blurred_baseline,
    curve_auc,
    deletion_curve,
    insertion_curve,
    pixel_steps,
    tied_share,
)

GOLDEN = Path(__file__).parents[1] / "golden"


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
    with pytest.raises(ValueError, match=r"targets must have shape \(1,\), .* got \(2,\)"):
        deletion_curve(Sum(), four, maps, ONE.repeat(2))
    with pytest.raises(TypeError, match=r"targets must be an integer tensor .* got int"):
        insertion_curve(Sum(), four, maps, 1)


@pytest.mark.parametrize("curve", [insertion_curve, deletion_curve])
def test_a_baseline_of_another_shape_is_refused(curve, four, unchecked):
    with pytest.raises(
        ValueError, match=r"baseline has shape \(1, 1, 3, 3\); .* that of images, \(1, 1, 2, 2\)"
    ):
        curve(Sum(), four, four[:, 0], ONE, baseline=torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize("curve", [insertion_curve, deletion_curve])
def test_nan_is_refused_at_either_end_of_a_curve(curve, four, unchecked):
    nan = four * torch.nan
    for images, baseline in ((nan, four), (four, nan)):
        with pytest.raises(ValueError, match="images hold NaN"):
            curve(Sum(), images, four[:, 0], ONE, baseline=baseline)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_an_accelerator_paints_the_images_that_a_cpu_paints(batch):
    generator = torch.Generator().manual_seed(0)
    start, end = torch.rand(2, 3, 3, 6, 7, generator=generator)
    steps = pixel_steps(torch.rand(3, 6, 7, generator=generator), 4)
    items = [_Item(row, 3 + row, row, step) for row in (2, 0, 1) for step in range(1, 4)]
    items += [_Item(3 + row, row, 2 - row, step) for row in (0, 1) for step in range(5)]
    here, there = (_Painter((start, end), steps, items, together) for together in (False, True))
    for begin in range(0, len(items), batch):
        which = slice(begin, min(begin + batch, len(items)))
        painted = there.paint(which)
        assert torch.equal(here.paint(which), painted)
        assert painted.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("curve", [insertion_curve, deletion_curve])
def test_no_images_have_no_curves(curve, four):
    none = four[:0]
    assert curve(Sum(), none, none[:, 0], ONE[:0], steps=3).shape == (0, 4)
