"""Log-odds as evidence, maps in their own strength, coverage instead of votes."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from formula import picture
from sess_lightning.engine.fusion import coverage_strips, fuse
from sess_lightning.engine.windows import plan_windows
from sess_lightning.introspection.lending import explaining
from sess_lightning.methods import SESS, ContrastiveSESS, GradCAM, GuidedBackprop, HiResCAM, LayerCAM
from sess_lightning.methods.evidence import RIVALS, TEMPERATURE, layer_evidence, log_odds
from sess_lightning.ops import min_max, upsample

CONTRAST = GradCAM("features.5", of="log_odds")
CONTRASTIVE = ContrastiveSESS(CONTRAST, num_scales=3)


def test_log_odds_are_the_logit_less_the_mean_of_its_rivals_by_hand():
    logits = torch.tensor([[3.0, 1.0, 1.0], [0.0, 2.0, 4.0]])
    weights = torch.tensor([0.0, 2.0]).div(TEMPERATURE).softmax(0)  # Of rivals 0 and 1 in the second row.
    expected = [3.0 - 1.0, 4.0 - float(weights[0] * 0 + weights[1] * 2)]
    weighed = (log_odds(logits, torch.tensor([0, 2])) * logits).sum(1)
    torch.testing.assert_close(weighed, torch.tensor(expected))


def test_log_odds_of_two_classes_and_of_a_single_logit_are_what_their_names_say():
    logits = torch.tensor([[2.0, -1.0]])
    probability = logits.softmax(1)[:, 0]
    weighed = (log_odds(logits, torch.tensor([0])) * logits).sum(1)
    torch.testing.assert_close(weighed, (probability / (1 - probability)).log())
    assert log_odds(torch.tensor([[1.5]]), torch.tensor([1])).tolist() == [[1]]
    assert log_odds(torch.tensor([[1.5]]), torch.tensor([0])).tolist() == [[-1]]


def test_only_the_likeliest_rivals_count():
    weights = log_odds(torch.arange(100.0)[None], torch.tensor([99]))
    assert weights[0, 99] == 1
    assert int((weights[0, :99] < 0).sum()) == RIVALS
    torch.testing.assert_close(weights.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)  # A common shift cancels.


@pytest.mark.parametrize("method", [GradCAM, HiResCAM, LayerCAM])
def test_the_cam_family_differentiates_the_log_odds(method, tiny, images, targets):
    with explaining(tiny):
        found, gradients, logits = layer_evidence(tiny, "features.5", images, targets, log_odds)
    _, plain, _ = layer_evidence(tiny, "features.5", images, targets)
    per_class = torch.stack([
        layer_evidence(tiny, "features.5", images, torch.full_like(targets, c))[1]
        for c in range(logits.shape[1])
    ])  # fmt: skip
    rivals = (logits / TEMPERATURE).masked_fill(F.one_hot(targets, logits.shape[1]).bool(), -torch.inf)
    expected = plain - torch.einsum("bc,cbkhw->bkhw", rivals.softmax(1), per_class)
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)
    maps = method("features.5", of="log_odds")(tiny, images, targets)
    drawn = min_max(upsample(method("features.5").combine(found, expected), (224, 224)))
    torch.testing.assert_close(maps, drawn, atol=1e-4, rtol=0)


def test_a_sigmoid_heads_logit_is_its_log_odds_already(tiny, images, targets):
    plain = GradCAM("features.5", activation="sigmoid")
    assert torch.equal(replace(plain, of="log_odds")(tiny, images, targets), plain(tiny, images, targets))


@pytest.mark.usefixtures("unchecked")
def test_what_is_differentiated_must_have_a_name():
    with pytest.raises(ValueError, match='GradCAM: of must be "logit" or "log_odds", got \'odds\''):
        GradCAM(of="odds")


def test_extracted_maps_can_be_read_in_their_own_strength(tiny, images, targets):
    method = GradCAM("features.5")
    with explaining(tiny):
        extraction = method.extract(tiny, images, targets)
        features, gradients, _ = layer_evidence(tiny, "features.5", images, targets)
    torch.testing.assert_close(extraction.unscaled, method.combine(features, gradients), atol=1e-6, rtol=1e-4)


def test_a_flat_map_keeps_its_value_and_a_map_without_strength_says_so(tiny, images, targets):
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    nn.init.zeros_(flat[0].weight)
    with explaining(flat):
        extraction = GradCAM("0").extract(flat, images[:, :, :32, :32], targets)
    assert torch.equal(extraction.maps, torch.zeros_like(extraction.maps))
    assert torch.equal(extraction.unscaled[0], extraction.unscaled[0, 0, 0].expand(16, 16))
    with explaining(tiny), pytest.raises(ValueError, match="their own strength is not known"):
        _ = GuidedBackprop().extract(tiny, images.clone(), targets).unscaled


def test_coverage_is_the_mean_over_covering_windows_then_over_scales():
    plan = plan_windows((8, 10), 8, 8, (8, 13))
    generator = torch.Generator().manual_seed(0)
    maps, weights = (torch.rand(*size, generator=generator) for size in ((len(plan), 8, 8), (len(plan),)))
    means, place = [], 0
    for (height, width), boxes in zip(plan.scales, plan.boxes, strict=True):
        total = covered = torch.zeros(8, 10)
        for x0, y0, x1, y1 in boxes:
            canvas = torch.zeros(2, height, width)
            canvas[0, y0:y1, x0:x1], canvas[1, y0:y1, x0:x1] = maps[place] * weights[place], 1
            drawn = F.interpolate(canvas[None], (8, 10), mode="bilinear")[0]
            total, covered, place = total + drawn[0], covered + drawn[1], place + 1
        means.append(total / covered)
    strips = coverage_strips(plan, (8, 8), torch.device("cpu"))
    (mean,) = fuse([maps[None]], weights[None], strips, torch.arange(len(plan))[None], fusion="average")
    summed = mean * len(plan)
    torch.testing.assert_close(summed, torch.stack(means).mean(0))


def test_one_full_size_scale_is_the_base_itself(tiny, images, targets):
    whole = ContrastiveSESS(CONTRAST, num_scales=1)(tiny, images, targets)
    torch.testing.assert_close(whole, CONTRAST(tiny, images, targets), atol=1e-5, rtol=0)


def test_a_window_costs_one_forward_pass_and_classes_share_them(tiny, images):
    sizes = []
    CONTRASTIVE(tiny, images[:1], torch.tensor([0]))
    tiny.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    targets = torch.tensor([0, 3])
    together = CONTRASTIVE.explain_classes(tiny, images[:1], targets).maps
    assert sum(sizes) == CONTRASTIVE.count_forwards(tiny, (224, 224)) == 9
    alone = [CONTRASTIVE(tiny, images[:1], target[None])[0] for target in targets]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"prefilter_ratio": 0.5}, {"coarse_to_fine": 0.7}], ids=str)
def test_batches_do_not_matter_nor_does_the_share_of_windows_break_anything(settings, tiny, images, targets):
    method = replace(CONTRASTIVE, **settings)
    together = method(tiny, images, targets)
    alone = [replace(method, batch_size=1)(tiny, images[i : i + 1], targets[i : i + 1])[0] for i in range(2)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)
    assert together.flatten(1).amax(1).tolist() == pytest.approx([1, 1])


def test_the_base_is_read_off_the_first_window_stretched(tiny, images, targets):
    own, base = CONTRASTIVE.maps_beside(tiny, images, targets, [CONTRAST])
    torch.testing.assert_close(base, CONTRAST(tiny, images, targets), atol=1e-4, rtol=0)
    assert torch.equal(own, CONTRASTIVE(tiny, images, targets))


def test_weights_are_a_power_of_the_scores(tiny, targets):
    image = picture(224, 224, 3)[None]
    squared = SESS(GradCAM("features.5"), num_scales=2, weight_power=2.0)
    plain = replace(squared, weight_power=1e-6)
    even = replace(squared, weight_power=1.0, channel_weights=False)
    assert not torch.allclose(squared(tiny, image, targets[:1]), plain(tiny, image, targets[:1]), atol=1e-2)
    torch.testing.assert_close(
        plain(tiny, image, targets[:1]), even(tiny, image, targets[:1]), atol=1e-3, rtol=0
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base": GuidedBackprop(), "fusion": "coverage", "stretch": False},
            "needs a base whose maps have a str",
        ),
        ({"stretch": False}, r'needs fusion="coverage" or "average" and theta=0: .* fusion=\'mean\''),
        ({"stretch": False, "fusion": "coverage", "theta": 0.1}, "theta=0.1"),
        ({"weight_power": 0.0}, "weight_power must be positive, got 0.0; channel_weights=False gives all"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SESS(**{"base": GradCAM(), **settings})
