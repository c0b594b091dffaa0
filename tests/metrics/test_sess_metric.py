import pickle
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from formula import picture
from lightning_models import Counter, filled_net, gathered
from sess_lightning import SESS, SESSMetric
from sess_lightning.introspection.logits import score
from sess_lightning.methods import CentreGaussian, GradCAM, RandomMap
from sess_lightning.metrics.functional import (
    blurred_baseline,
    class_mean,
    curve_auc,
    deletion_curve,
    insertion_curve,
    pointing_hits,
    relevance_mass,
    tied_share,
)
from sess_lightning.ops import min_max
from sess_lightning.types import Activation, Explanation, SaliencyMethod


@dataclass(frozen=True)
class Channel(SaliencyMethod):
    """A map without a forward: one of the image's own channels."""

    channel: int = 0
    activation: Activation = "softmax"
    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        return Explanation(min_max(images[:, self.channel]), torch.ones(len(images)))


@dataclass(frozen=True)
class Flat(SaliencyMethod):
    """Flat on images that begin with a negative pixel."""

    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        lively = images[:, 0, 0, 0] >= 0
        return Explanation(min_max(images[:, 0]) * lively[:, None, None], torch.ones(len(images)))


TARGETS = torch.tensor([0, 1, 2, 3, 1, 0])
FIGURES = {"insertion", "deletion", "overall"}


def with_intervals(names):
    return {f"{name}{end}" for name in names for end in ("", "_ci_low", "_ci_high")}


@pytest.fixture
def model():
    return filled_net()


@pytest.fixture
def images():
    return torch.stack([picture(32, 32, i) for i in range(6)])


@pytest.fixture
def boxes():
    return [torch.tensor([[4.0 * i, 4, 4 * i + 6, 12]]) for i in range(6)]


def run(metric, model, images, regions=None, parts=(slice(0, 6),), **kwargs):
    for part in parts:
        metric.update(
            model, images[part], TARGETS[part], None if regions is None else regions[part], **kwargs
        )
    return metric.compute()


def areas(model, images, maps, targets=TARGETS):
    insertion = curve_auc(insertion_curve(model, images, maps, targets)).double()
    deletion = curve_auc(deletion_curve(model, images, maps, targets)).double()
    return insertion, deletion


TWO_SCALES = SESS(GradCAM(), num_scales=2)


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


def test_an_image_costs_56_forwards_a_further_map_54_and_zeros_one_per_run(model, images):
    counter, metric = Counter(model), SESSMetric(Channel(0))
    run(metric, model, images, parts=(slice(0, 2), slice(2, 6)))
    assert counter.images == 1 + 6 * 56
    counter.images = 0
    metric.reset()
    run(metric, model, images, parts=(slice(0, 2),))
    assert counter.images == 1 + 2 * 56
    counter.images = 0
    run(SESSMetric(Channel(0), compare={"green": Channel(1)}), model, images)
    assert counter.images == 1 + 6 * (56 + 54)


def test_methods_add_their_own_forwards_and_nothing_else(model, images):
    GradCAM()(model, images[:1], TARGETS[:1])  # Finding the layer is paid once.
    counter = Counter(model)
    run(SESSMetric(TWO_SCALES), model, images)
    windows = TWO_SCALES.count_forwards(model, (32, 32))
    assert windows == 5
    assert counter.images == 1 + 6 * (56 + windows + 54)  # The base's map comes with the first window.


BESIDE = {"base": GradCAM(), "red": Channel(0)}


@pytest.mark.parametrize("several", [False, True], ids=["one class", "several classes"])
@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        ({}, False),
        ({"prefilter_ratio": 0.7}, False),
        ({"coarse_to_fine": 0.8}, False),
        ({"smoothing": True, "channel_weights": False}, False),
        ({"scales": (48, 32)}, True),
        ({"window": 24}, True),
        ({"base": GradCAM(activation="sigmoid")}, True),
    ],
    ids=str,
)
def test_the_base_is_read_off_the_first_window_where_that_is_the_image(
    model, images, settings, alone, several
):
    method = replace(TWO_SCALES, **settings)
    given, targets = (images[:1], TARGETS[1:4]) if several else (images, TARGETS)
    counter = Counter(model)
    shared, apart = (SESSMetric(method, compare=BESIDE, clock=clock) for clock in (None, lambda _: 0.0))
    forwards = []
    for metric in (apart, apart, shared):  # Twice: finding layers is paid once.
        metric.reset()
        counter.images = 0
        metric.update(model, given, targets)
        forwards.append(counter.images)
    assert forwards[1] - forwards[2] == len(targets) * (not alone)
    assert list(shared.latest) == ["", "base", "red"]
    for name, found in shared.latest.items():
        torch.testing.assert_close(found.maps, apart.latest[name].maps, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.insertion, apart.latest[name].insertion, atol=1e-3, rtol=0)  # Ties.


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


def several(boxes, part=slice(0, 6), method=TWO_SCALES, numbered=True, **kwargs):
    """Explain three classes on each of some images."""
    metric, classes = SESSMetric(method, **kwargs), torch.tensor([0, 1, 2])
    for i in range(6)[part]:
        numbers = [i] if numbered else None
        metric.update(filled_net(), picture(32, 32, i)[None], classes, [boxes[i]] * 3, numbers=numbers)
    return metric


def test_trials_of_one_image_are_drawn_together(boxes):
    single = several(boxes, method=Channel(0), compare={"green": Channel(1)})
    several_times, apart = single.clone(), single.clone()
    first = {name: each[::3] for name, each in single.take_rows().items()}  # A class of each image.
    for metric in (several_times, apart):
        metric.reset()
    four_times = {name: each.repeat_interleave(4, 0) for name, each in first.items()}
    single.load_rows(first)
    several_times.load_rows({**four_times, "begins": torch.tensor([1, 0, 0, 0] * 6)})
    apart.load_rows({**four_times, "begins": torch.ones(24, dtype=torch.int64)})
    once, together, naive = (metric.compute() for metric in (single, several_times, apart))
    for name in ("insertion", "overall", "pointing_game", "green/deletion", "minus_green/overall"):
        ends = [f"{name}_ci_low", f"{name}_ci_high"]
        assert [together[end] for end in ends] == pytest.approx([once[end] for end in ends], abs=1e-12)
    width = {key: each["insertion_ci_high"] - each["insertion_ci_low"] for key, each in
             (("together", together), ("naive", naive))}  # fmt: skip
    assert width["together"] > 1.7 * width["naive"] > 0


def test_images_of_several_processes_and_merged_ones_do_not_collide(boxes):
    whole, first, last = several(boxes).compute(), slice(0, 4), slice(4, 6)
    assert gathered([several(boxes, last), several(boxes, first)]).compute() == whole
    merged = several(boxes, last)
    merged.merge_state(several(boxes, first))
    assert merged.compute() == whole


def test_images_of_equal_numbers_stay_apart_and_the_first_process_comes_first(boxes):
    parts = slice(0, 4), slice(4, 6)
    metric = gathered([several(boxes, part, numbered=False) for part in parts])
    assert metric.compute()["insertion"] == pytest.approx(several(boxes).compute()["insertion"], abs=1e-12)
    samples, order = metric.samples(), [0, 4, 1, 5, 2, 3]  # Each counts its rows: 0, 3, 6, 9 and 0, 3.
    assert samples.numbers.tolist() == [0] * 6 + [3] * 6 + [6] * 3 + [9] * 3
    assert samples.targets.tolist() == [0, 1, 2] * 6
    assert samples.scores[::3].tolist() == several(boxes).samples().scores[::3][order].tolist()


def test_rows_travel_from_one_metric_to_another(model, images, boxes):
    one, other = SESSMetric(TWO_SCALES), SESSMetric(TWO_SCALES)
    values = run(one, model, images, boxes)
    rows = one.take_rows()
    assert len(one.targets) == 0
    other.load_rows({name: each.tolist() for name, each in rows.items()})
    assert other.compute() == values
    with pytest.raises(ValueError, match=r"SESSMetric: rows must be those of \['begins', .*got \['hits'\]"):
        other.load_rows({"hits": rows["targets"]})


def test_a_mean_of_one_sample_is_its_own_interval():
    metric = SESSMetric(Channel())
    metric.update(Bright(), bright_images(1.0), torch.tensor([1]), hits(1))
    values = metric.compute()
    for name in (*FIGURES, "pointing_game"):
        assert values[f"{name}_ci_low"] == values[name] == values[f"{name}_ci_high"]


def test_intervals_are_reproducible_and_leave_the_global_generator_alone(model, images, boxes):
    before = torch.get_rng_state()
    metric = SESSMetric(TWO_SCALES, compare={"random": RandomMap()})
    first = run(metric, model, images, boxes)
    second = run(SESSMetric(TWO_SCALES, compare={"random": RandomMap()}), model, images, boxes)
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


def test_before_the_first_update_there_is_nothing_to_tell():
    metric = SESSMetric(TWO_SCALES)
    assert metric.compute() == {}


@pytest.mark.parametrize("limits", [None, {"base": 3}], ids=["", "limited"])
def test_forward_tells_of_the_batch_and_accumulates(limits, model, images, boxes):
    make = partial(SESSMetric, TWO_SCALES, limits=limits)
    metric, whole, parts = make(), make(), (slice(0, 2), slice(2, 6))
    for part in parts:
        alone = make()
        alone.update(model, images[part], TARGETS[part], boxes[part], numbers=range(6)[part])
        assert metric(model, images[part], TARGETS[part], boxes[part]) == alone.compute()
    assert metric.compute() == run(whole, model, images, boxes, parts)


def test_clone_pickle_and_reset(model, images, boxes):
    metric = SESSMetric(TWO_SCALES)
    values = run(metric, model, images, boxes)
    clone, pickled = metric.clone(), pickle.loads(pickle.dumps(metric))
    metric.reset()
    assert metric.latest == {}
    assert run(metric, model, images, boxes) == clone.compute() == pickled.compute() == values


def test_neither_the_model_nor_any_state_enters_a_checkpoint(model, images):
    metric = SESSMetric(TWO_SCALES)
    run(metric, model, images)
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == list(metric.buffers()) == []
    model.train()
    metric.eval()
    assert model.training


def test_updates_under_inference_mode_are_the_same(model, images, boxes):
    expected = run(SESSMetric(TWO_SCALES), model, images, boxes, (slice(0, 3), slice(3, 6)))
    metric = SESSMetric(TWO_SCALES)
    with torch.inference_mode():
        first = images[:3].clone()
        metric.update(model, first, TARGETS[:3].clone(), boxes[:3])
    metric.update(model, images[3:], TARGETS[3:], boxes[3:])
    assert metric.compute() == expected


APART = {
    "method": ({"method": Channel(0)}, {"method": Channel(1)}),
    "tolerance": ({"tolerance": 1.0}, {"tolerance": 40.0}),
    "limits": ({"compare": {"one": Channel(1)}, "limits": {"one": 2}}, {"compare": {"one": Channel(1)}}),
}


@pytest.mark.parametrize("forward", [False, True], ids=["update", "forward"])
@pytest.mark.parametrize("option", APART)
def test_a_collection_keeps_two_of_them_apart(option, forward, model, images, boxes):
    make = {
        name: partial(SESSMetric, **{"method": Channel(0), **options})
        for name, options in zip(("a", "b"), APART[option], strict=True)
    }
    collection, parts = (
        MetricCollection({name: made() for name, made in make.items()}),
        (slice(0, 1), slice(1, 6)),
    )
    for part in parts:
        (collection if forward else collection.update)(model, images[part], TARGETS[part], boxes[part])
    alone = {name: run(made(), model, images, boxes, parts) for name, made in make.items()}
    assert alone["a"] != alone["b"]
    assert collection.compute() == {
        f"{name}_{figure}": value for name, values in alone.items() for figure, value in values.items()
    }


def test_two_processes_states_merge_into_that_of_one(model, images, boxes):
    whole = run(SESSMetric(TWO_SCALES), model, images, boxes)
    one, other = SESSMetric(TWO_SCALES), SESSMetric(TWO_SCALES)
    one.update(model, images[4:], TARGETS[4:], boxes[4:], numbers=[4, 5])
    other.update(model, images[:4], TARGETS[:4], boxes[:4])
    one.merge_state(other)
    assert one.compute() == pytest.approx(whole, abs=1e-6)


def test_uneven_processes_are_gathered_also_where_one_saw_no_sample(model, images, boxes):
    processes = [SESSMetric(TWO_SCALES) for _ in range(3)]
    processes[1].update(model, images[:4], TARGETS[:4], boxes[:4])
    processes[2].update(model, images[4:], TARGETS[4:], boxes[4:], numbers=[4, 5])
    metric, whole = gathered(processes), SESSMetric(TWO_SCALES)
    assert metric.compute() == pytest.approx(run(whole, model, images, boxes), abs=1e-6)
    for name, curves in whole.curves().items():
        torch.testing.assert_close(metric.curves()[name], curves, atol=1e-6, rtol=0)
    assert len(metric.targets) == 0  # Its own state is back.


def test_a_summary_is_all_that_is_told_at_the_price_of_one_gathering(model, images, boxes):
    processes, asked = [SESSMetric(TWO_SCALES, grid=4) for _ in range(2)], []
    processes[0].update(model, images[:4], TARGETS[:4], boxes[:4])
    processes[1].update(model, images[4:], TARGETS[4:], boxes[4:], numbers=[4, 5])
    metric = gathered(processes)
    answer = metric.dist_sync_fn
    metric.dist_sync_fn = lambda tensor, group: asked.append(tensor) or answer(tensor, group)
    summary, whole = metric.summary(), len(asked)
    assert summary.values == metric.compute()
    assert len(asked) == 2 * whole > 0
    for name, curves in metric.curves().items():
        torch.testing.assert_close(summary.curves[name], curves, equal_nan=True)
    torch.testing.assert_close(summary.samples, metric.samples(), equal_nan=True)


def test_a_summary_that_fails_gives_the_process_its_own_rows_back(model, images, monkeypatch):
    processes = [SESSMetric(TWO_SCALES) for _ in range(2)]
    for process in processes:
        process.update(model, images[:2], TARGETS[:2])
    metric = gathered(processes)
    monkeypatch.setattr(metric, "_rows", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        metric.summary()
    assert [len(each) for each in metric.targets] == [2]
    metric.reset()
    assert metric.targets == []


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


def test_the_model_is_given_back_as_it_was(images):
    model = filled_net().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    run(SESSMetric(TWO_SCALES), model, images)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_method_without_a_base_is_compared_with_nothing():
    assert list(SESSMetric(GradCAM()).methods) == [""]
    assert list(SESSMetric(TWO_SCALES, compare={}).methods) == [""]


def test_what_is_no_method_is_refused(unchecked):
    with pytest.raises(
        TypeError, match=r"method must be a saliency method such as SESS\(GradCAM\(\)\), got 'sess'"
    ):
        SESSMetric("sess")
    with pytest.raises(ValueError, match="a method cannot be called ''"):
        SESSMetric(TWO_SCALES, compare={"": GradCAM()})
    with pytest.raises(ValueError, match="'minus_blur': \"minus_\" begins the keys of differences"):
        SESSMetric(TWO_SCALES, compare={"minus_blur": GradCAM()})
    with pytest.raises(ValueError, match="cannot be told from 'SESS', the name of the explained method"):
        SESSMetric(TWO_SCALES, compare={"SESS": GradCAM()})


def test_an_update_that_fails_leaves_no_row_behind(model, images, monkeypatch):
    metric = SESSMetric(TWO_SCALES)
    run(metric, model, images)
    monkeypatch.setattr(
        "sess_lightning.metrics.sess_metric.insertion_and_deletion_curves", lambda *_, **__: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        metric.update(model, images, TARGETS)
    assert {name: len(metric.rows(name)) for name in metric.states} == dict.fromkeys(metric.states, 6)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"images": torch.zeros(3, 32, 32)}, ValueError, r"images must be \(B, C, H, W\), got \(3, 32, 32\)"),
        ({"images": torch.zeros(0, 3, 32, 32)}, ValueError, "images is empty"),
        ({"images": torch.full((2, 3, 32, 32), torch.nan)}, ValueError, "images hold NaN"),
        (
            {"images": torch.zeros(2, 1, 32, 32)},
            ValueError,
            "images have 1 channels, which the model does not take",
        ),
        ({"targets": torch.tensor([0, 4])}, ValueError, r"targets must be class indices in 0\.\.3"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, "targets must be an integer tensor"),
        ({"regions": [torch.zeros(1, 4)]}, ValueError, "regions: got 1 for 2 maps"),
    ],
)
def test_bad_input_is_named(change, error, names, model, images, unchecked):
    given = {"images": images[:2], "targets": TARGETS[:2], "regions": None} | change
    with pytest.raises(error, match=names):
        SESSMetric(Channel(0)).update(model, given["images"], given["targets"], given["regions"])
