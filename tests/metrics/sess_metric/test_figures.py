"""What SESSMetric computes."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_models import filled_net
from scored import FIGURES, TARGETS, TWO_SCALES, Channel, Flat, areas, run, with_intervals
from sess_lightning import SESSMetric
from sess_lightning.introspection.logits import score
from sess_lightning.methods import CentreGaussian, GradCAM, RandomMap
from sess_lightning.metrics.functional import (
    blurred_baseline,
    class_mean,
    curve_auc,
    insertion_curve,
    pointing_hits,
    relevance_mass,
    tied_share,
)
from sess_lightning.ops import min_max
from sess_lightning.types import Explanation, SaliencyMethod


def test_every_figure_comes_with_its_interval_its_floor_and_its_counts(model, images, boxes):
    values = run(SESSMetric(TWO_SCALES, tolerance=3.0), model, images, boxes)
    played = FIGURES | {"pointing_game", "relevance_mass"}
    own = with_intervals(played) | {
        "n",
        "nan",
        "misclassified",
        "skipped",
        "pointing_game_n",
        "flat",
        "curves_n",
        "tied_share",
        "region_share",
    }
    base = {f"base/{name}" for name in with_intervals(played) | {"flat", "curves_n", "tied_share"}}
    minus = {f"minus_base/{name}" for name in with_intervals(played)}
    optional = {
        f"{prefix}{kind}_normalised" for prefix in ("", "base/") for kind in ("insertion", "deletion")
    }
    assert set(values) - optional == own | base | minus
    assert {type(value) for value in values.values()} == {float}


def test_without_regions_no_pointing_game_is_played(model, images):
    values = run(SESSMetric(TWO_SCALES), model, images)
    assert not [
        name for name in values if any(word in name for word in ("pointing", "skipped", "mass", "region"))
    ]
    assert values["n"] == 6


def test_overall_is_insertion_less_deletion(model, images):
    values = run(SESSMetric(TWO_SCALES), model, images)
    for prefix in ("", "base/", "minus_base/"):
        difference = values[f"{prefix}insertion"] - values[f"{prefix}deletion"]
        assert values[f"{prefix}overall"] == pytest.approx(difference, abs=1e-12)


@pytest.mark.parametrize(("prefix", "method"), [("", TWO_SCALES), ("base/", GradCAM())])
def test_figures_are_those_of_maps_and_functions_by_hand(prefix, method, model, images, boxes):
    values = run(SESSMetric(TWO_SCALES, tolerance=3.0), model, images, boxes, (slice(0, 4), slice(4, 6)))
    maps = method(model, images, TARGETS)
    insertion, deletion = areas(model, images, maps)
    # Equal to rounding; pixels that all but tie may change places on a curve.
    assert values[f"{prefix}insertion"] == pytest.approx(insertion.mean().item(), abs=2e-5)
    assert values[f"{prefix}deletion"] == pytest.approx(deletion.mean().item(), abs=2e-5)
    hits = pointing_hits(maps, boxes, 3.0).long()
    per_class = [torch.zeros(4).long().index_add(0, TARGETS, each) for each in (hits, torch.ones(6).long())]
    assert values[f"{prefix}pointing_game"] == pytest.approx(class_mean(*per_class).item())


def test_the_difference_to_another_method_is_the_mean_of_paired_differences(model, images):
    values = run(SESSMetric(TWO_SCALES, compare={"base": GradCAM(), "red": Channel(0)}), model, images)
    own = areas(model, images, TWO_SCALES(model, images, TARGETS))
    for name, method in (("base", GradCAM()), ("red", Channel(0))):
        other = areas(model, images, method(model, images, TARGETS))
        assert values[f"minus_{name}/insertion"] == pytest.approx((own[0] - other[0]).mean().item(), abs=2e-5)
        assert values[f"minus_{name}/deletion"] == pytest.approx((own[1] - other[1]).mean().item(), abs=2e-5)


def test_a_method_that_equals_the_one_it_is_compared_with_differs_by_nothing(model, images, boxes):
    values = run(SESSMetric(Channel(0), compare={"same": Channel(0)}), model, images, boxes)
    same = {name: value for name, value in values.items() if name.startswith("minus_same/")}
    assert len(same) == 15
    assert set(same.values()) == {0.0}


def test_limits_say_for_how_many_samples_a_floors_curves_are_drawn(model, images, boxes):
    metric = SESSMetric(
        Channel(0),
        compare={"random": RandomMap(), "centre": CentreGaussian()},
        limits={"random": 3, "centre": 0},
    )
    values = run(metric, model, images, boxes, (slice(0, 2), slice(2, 4), slice(4, 6)))
    assert (values["curves_n"], values["random/curves_n"], values["centre/curves_n"]) == (6, 3, 0)
    own, floor = (
        areas(model, images, method(model, images, TARGETS)) for method in (Channel(0), RandomMap())
    )
    assert values["random/insertion"] == pytest.approx(floor[0][:3].mean().item(), abs=1e-6)
    assert values["minus_random/insertion"] == pytest.approx((own[0] - floor[0])[:3].mean().item(), abs=1e-6)
    assert "centre/insertion" not in values
    # Pointing costs no forward: it is played on all.
    assert {"random/pointing_game", "centre/pointing_game"} <= set(values)


def test_limits_count_the_numbers_that_samples_have(model, images):
    metric = SESSMetric(Channel(0), compare={"random": RandomMap()}, limits={"random": 2})
    metric.update(model, images[:4], TARGETS[:4], numbers=[5, 0, 3, 2])
    metric.update(model, images[4:], TARGETS[4:], numbers=[4, 1])
    drawn = metric.rows("probabilities")[:, 1, 0, 0].isfinite()
    assert drawn.tolist() == [False, True, False, False, False, True]
    own, floor = (
        areas(model, images[[1, 5]], method(model, images[[1, 5]], TARGETS[[1, 5]]), TARGETS[[1, 5]])
        for method in (Channel(0), RandomMap())
    )
    values = metric.compute()
    assert values["random/deletion"] == pytest.approx(floor[1].mean().item(), abs=1e-6)
    assert values["minus_random/deletion"] == pytest.approx((own[1] - floor[1]).mean().item(), abs=1e-6)


def test_a_step_of_training_between_updates_is_noticed(model, images):
    metric, optimizer = SESSMetric(Channel(0)), torch.optim.SGD(model.parameters(), 1.0)
    metric.update(model, images, TARGETS)
    model(images).logsumexp(1).sum().backward()
    optimizer.step()
    metric.update(model, images, TARGETS)
    fresh = SESSMetric(Channel(0))
    fresh.update(model, images, TARGETS)
    assert torch.equal(metric.ends[1], fresh.ends[0])
    assert not torch.equal(metric.ends[0][:, 2], fresh.ends[0][:, 2])


def test_mean_curves_are_over_the_samples_that_have_one(model, images):
    metric = SESSMetric(Channel(0), compare={"random": RandomMap()}, limits={"random": 2})
    run(metric, model, images)
    curves = metric.curves()
    maps = RandomMap()(model, images, TARGETS)[:2]
    expected = insertion_curve(model, images[:2], maps, TARGETS[:2]).mean(0)
    torch.testing.assert_close(curves["random"][0], expected, atol=1e-6, rtol=0)
    assert {name: curve.shape for name, curve in curves.items()} == {"": (2, 29), "random": (2, 29)}
    assert curve_auc(curves[""][1]).item() == pytest.approx(metric.compute()["deletion"], abs=1e-6)


def test_areas_are_also_told_as_a_share_of_what_there_was_to_gain(model, images):
    metric = SESSMetric(Channel(0))
    values = run(metric, model, images)
    own = score(model, images, TARGETS).exp().mean()
    blurred = score(model, blurred_baseline(images), TARGETS).exp().mean()
    zeros = score(model, torch.zeros_like(images), TARGETS).exp().mean()
    for name, gain in (("insertion", (own - blurred).item()), ("deletion", (own - zeros).item())):
        if gain < 0.05:
            assert f"{name}_normalised" not in values
        else:
            assert values[f"{name}_normalised"] == pytest.approx(values[name] / gain, rel=1e-4)


class Bright(nn.Module):
    """Speaks for class 1 on bright images, for class 0 on dark ones, and for nothing where told so."""

    def __init__(self, gain=40.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, images):
        bright = self.gain * images.mean((1, 2, 3))
        bright = torch.where(images[:, 0, 0, 0] > 50, torch.nan, bright)
        return torch.stack([torch.zeros_like(bright), bright], 1)


def bright_images(*levels):
    ramp = torch.linspace(0, 1, 256).view(1, 16, 16)
    return torch.stack([level * ramp.expand(3, -1, -1) for level in levels])


def test_a_share_of_the_gain_is_left_out_where_there_was_next_to_nothing_to_gain():
    metric = SESSMetric(Channel())
    metric.update(Bright(), bright_images(1.0, 0.5), torch.tensor([1, 1]))
    values = metric.compute()
    assert "insertion_normalised" not in values  # Blurring leaves the brightness: nothing is gained.
    assert values["deletion_normalised"] == pytest.approx(values["deletion"] / 0.5, rel=1e-3)


def test_images_whose_logits_are_nan_are_counted_and_left_out(boxes):
    images = bright_images(1.0, -1.0, 0.5)
    broken = torch.cat([images, images[:1]])
    broken[3, 0, 0, 0] = 100.0
    targets = torch.tensor([1, 0, 1, 1])
    with_nan, without = SESSMetric(Channel()), SESSMetric(Channel())
    with_nan.update(Bright(), broken, targets)
    without.update(Bright(), images, targets[:3])
    found, expected = with_nan.compute(), without.compute()
    assert (found["n"], found["nan"], found["curves_n"]) == (4, 1, 3)
    assert (expected["n"], expected["nan"], expected["curves_n"]) == (3, 0, 3)
    for name in FIGURES:
        assert found[name] == expected[name]


def test_without_a_single_finite_curve_there_is_no_figure_but_the_counts():
    images = bright_images(1.0, 1.0)
    images[:, 0, 0, 0] = 100.0
    metric = SESSMetric(Channel())
    metric.update(Bright(), images, torch.tensor([1, 1]))
    counts = {"n": 2, "nan": 2, "misclassified": 0, "curves_n": 0, "flat": 0}
    assert metric.compute() == counts | {"tied_share": 0.0}


@dataclass(frozen=True)
class Signed(SaliencyMethod):
    """Negative where images begin with a negative pixel, as methods do that tell what speaks against."""

    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        below = images[:, 0, 0, 0] < 0
        return Explanation(min_max(images[:, 0]) - 0.5 * below[:, None, None], torch.ones(len(images)))


def test_signed_maps_have_no_relevance_mass_and_are_counted(model, images, boxes):
    images[:2, 0, 0, 0], images[2:, 0, 0, 0] = -1, 1
    values = run(SESSMetric(Signed(), compare={"red": Channel()}), model, images, boxes)
    rest = relevance_mass(min_max(images[2:, 0]), boxes[2:]).mean()
    assert values["signed"] == 2
    assert "red/signed" not in values
    assert values["relevance_mass"] == pytest.approx(rest.item(), abs=1e-6)
    assert "signed" not in run(SESSMetric(Signed(), compare={}), model, images)


def test_misclassified_and_flat_are_counted(model):
    images = bright_images(1.0, -1.0, 0.5, -0.5)
    images[:, :, 0, 0] = torch.tensor([[-1.0], [1], [-1], [-1]])
    metric = SESSMetric(Flat(), compare={"red": Channel()})
    metric.update(Bright(), images, torch.tensor([1, 0, 0, 1]))
    values = metric.compute()
    assert (values["misclassified"], values["flat"], values["red/flat"]) == (2, 3, 0)
    assert values["curves_n"] == 4


def hits(*told):
    """Regions that the maps of ``bright_images``, brightest at the right, hit (1), miss (0), or have not."""
    return [
        {
            1: torch.tensor([[14.0, 14, 16, 16]]),
            0: torch.tensor([[0.0, 0, 2, 2]]),
            None: torch.zeros(0, 4),
        }[each]
        for each in told
    ]


def pointed(targets, told, difficult=None):
    metric = SESSMetric(Channel(), tolerance=2.0)
    targets = torch.tensor(targets)
    images = bright_images(*[1.0] * len(targets))
    marks = None if difficult is None else torch.tensor(difficult).bool()
    metric.update(Bright(), images, targets, hits(*told), difficult=marks)
    return metric.compute()


def test_the_pointing_game_is_the_mean_over_classes_seen_not_over_images():
    values = pointed([0, 0, 0, 1], [1, 1, 0, 0])
    assert values["pointing_game"] == pytest.approx((2 / 3 + 0) / 2)
    assert (values["pointing_game_n"], values["skipped"]) == (4, 0)


def test_images_without_a_region_are_skipped_and_counted():
    values = pointed([0, 0, 1, 1], [1, None, 0, None])
    assert values["pointing_game"] == 0.5
    assert (values["pointing_game_n"], values["skipped"]) == (2, 2)


def test_the_difficult_subset_has_its_own_figure():
    values = pointed([0, 0, 1, 1], [1, 0, 1, None], difficult=[0, 1, 1, 1])
    assert values["pointing_game"] == 0.75
    assert values["pointing_game_difficult"] == 0.5
    assert (values["pointing_game_n"], values["pointing_game_difficult_n"]) == (3, 2)
    assert "pointing_game_difficult" not in pointed([0, 1], [1, 1], difficult=[0, 0])
    assert "pointing_game_difficult" not in pointed([0, 1], [1, 1])


def test_boxes_may_refer_to_the_original_size_and_masks_may_have_it():
    images, target = bright_images(1.0), torch.tensor([1])
    by_box, by_mask = SESSMetric(Channel(), tolerance=2.0), SESSMetric(Channel(), tolerance=2.0)
    by_box.update(Bright(), images, target, [torch.tensor([[62.0, 30, 64, 32]])], size=(32, 64))
    mask = torch.zeros(1, 32, 64, dtype=torch.bool)
    mask[0, 31, 63] = True
    by_mask.update(Bright(), images, target, mask)
    assert by_box.compute()["pointing_game"] == by_mask.compute()["pointing_game"] == 1.0


def test_small_integer_targets_do_as_well(unchecked):
    metric = SESSMetric(Channel())
    metric.update(Bright(), bright_images(1.0, -1.0), torch.tensor([1, 0], dtype=torch.uint8))
    values = metric.compute()
    assert values["misclassified"] == 0
    assert "pointing_game" not in values


def test_a_sigmoid_method_reads_all_scores_with_a_sigmoid(images):
    model = filled_net()
    values = run(SESSMetric(Channel(activation="sigmoid")), model, images)
    maps = Channel()(model, images, TARGETS)
    curve = insertion_curve(model, images, maps, TARGETS, activation="sigmoid")
    assert values["insertion"] == pytest.approx(curve_auc(curve).mean().item(), abs=1e-6)


def test_a_single_logit_head_predicts_class_1_where_its_logit_is_positive():
    class Single(Bright):
        def forward(self, images):
            return super().forward(images)[:, 1]

    images, targets = bright_images(1.0, -1.0, 1.0), torch.tensor([1, 0, 0])
    single, double = SESSMetric(Channel()), SESSMetric(Channel())
    single.update(Single(), images, targets)
    double.update(Bright(), images, targets)
    expected = double.compute()
    assert single.compute() == pytest.approx(expected, abs=1e-6)
    assert expected["misclassified"] == 1


def test_intervals_hold_their_mean_and_halve_with_four_times_the_samples():
    images = bright_images(0.02, 0.04, 0.06, 0.2)
    widths = []
    for repeats in (4, 16):
        metric = SESSMetric(Channel())
        for _ in range(repeats):
            metric.update(Bright(), images, torch.tensor([1] * 4))
        values = metric.compute()
        for name in FIGURES:
            assert values[f"{name}_ci_low"] < values[name] < values[f"{name}_ci_high"]
        widths.append(values["insertion_ci_high"] - values["insertion_ci_low"])
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.1)


def test_the_latest_maps_and_curves_are_at_hand(model, images, boxes):
    metric = SESSMetric(TWO_SCALES)
    run(metric, model, images, boxes, (slice(0, 4), slice(4, 6)))
    assert set(metric.latest) == {"", "base"}
    maps = GradCAM()(model, images[4:], TARGETS[4:])
    torch.testing.assert_close(metric.latest["base"].maps, maps, atol=1e-6, rtol=0)
    assert metric.latest["base"].insertion.shape == (2, 29)
    assert metric.latest["base"].hits.tolist() == pointing_hits(maps, boxes[4:]).long().tolist()


def test_relevance_mass_is_that_of_the_functions_over_images_with_a_region(model, images, boxes):
    boxes[5] = torch.zeros(0, 4)
    values = run(SESSMetric(TWO_SCALES), model, images, boxes, (slice(0, 4), slice(4, 6)))
    masses = [relevance_mass(method(model, images, TARGETS), boxes) for method in (TWO_SCALES, GradCAM())]
    assert values["relevance_mass"] == pytest.approx(masses[0].nanmean().item(), abs=1e-6)
    assert values["base/relevance_mass"] == pytest.approx(masses[1].nanmean().item(), abs=1e-6)
    difference = (masses[0] - masses[1]).nanmean().item()
    assert values["minus_base/relevance_mass"] == pytest.approx(difference, abs=1e-6)
    assert values["region_share"] == pytest.approx(6 * 8 / 32**2, abs=1e-6)


def test_tied_pixels_are_told_of_every_method(model, images):
    images[:2, 0, :16] = 0.5  # Half of the red channel has one value.
    values = run(SESSMetric(Channel(1), compare={"red": Channel(0)}), model, images)
    green = tied_share(Channel(1)(model, images, TARGETS)).mean().item()
    assert values["tied_share"] == pytest.approx(green)
    assert values["red/tied_share"] == pytest.approx((2 * 0.5 + 4 * 0) / 6)


def test_samples_tell_of_each_what_the_figures_tell_of_all(model, images, boxes):
    metric = SESSMetric(TWO_SCALES, grid=4)
    values = run(metric, model, images, boxes, (slice(0, 4), slice(4, 6)))
    samples = metric.samples()
    assert samples.targets.tolist() == TARGETS.tolist()
    assert samples.insertion.mean().item() == pytest.approx(values["insertion"], abs=1e-6)
    assert samples.deletion.mean().item() == pytest.approx(values["deletion"], abs=1e-6)
    assert samples.mass.mean().item() == pytest.approx(values["relevance_mass"], abs=1e-6)
    assert samples.share.tolist() == pytest.approx([48 / 1024] * 6)
    maps = TWO_SCALES(model, images, TARGETS)
    torch.testing.assert_close(samples.small, maps.unflatten(1, (4, 8)).unflatten(3, (4, 8)).mean((2, 4)))
    assert metric.small[0].shape == (4, 4, 4)


def test_a_mean_of_one_sample_is_its_own_interval():
    metric = SESSMetric(Channel())
    metric.update(Bright(), bright_images(1.0), torch.tensor([1]), hits(1))
    values = metric.compute()
    for name in (*FIGURES, "pointing_game"):
        assert values[f"{name}_ci_low"] == values[name] == values[f"{name}_ci_high"]
