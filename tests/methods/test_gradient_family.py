from dataclasses import replace

import pytest
import torch
from torch import nn

from formula import Tiny, fill
from real_weights import EGYPTIAN_CAT, TABBY, cats, mobilenet
from sess_lightning.methods import (
    SESS,
    GradCAM,
    Gradient,
    GuidedBackprop,
    IntegratedGradients,
    SmoothGrad,
)
from sess_lightning.methods.gradient import generator
from sess_lightning.ops import min_max, upper_percentile

TARGETS = torch.tensor([EGYPTIAN_CAT, TABBY])


def close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.fixture
def captum():
    return pytest.importorskip("captum.attr")


@pytest.mark.parametrize("real", [False, True], ids=["tiny", "mobilenet"])
def test_gradient_is_captums_saliency_at_its_largest_channel(real, tiny, images, targets, captum):
    model, images, targets = (mobilenet(), cats(), TARGETS) if real else (tiny, images, targets)
    expected = captum.Saliency(model).attribute(images.clone(), targets).amax(1)
    explanation = Gradient().explain(model, images, targets)
    close(explanation.maps, min_max(expected), 1e-6)
    close(explanation.scores, model(images).softmax(1)[[0, 1], targets].detach(), 1e-6)


def test_guided_backprop_is_captums_on_modules_it_can_hook(tiny, images, targets, captum):
    expected = captum.GuidedBackprop(tiny).attribute(images.clone(), targets).abs().sum(1)
    close(GuidedBackprop(percentile=100.0)(tiny, images, targets), min_max(expected), 1e-6)
    clipped = expected.clamp(max=upper_percentile(expected, 99.0)[:, None, None])
    close(GuidedBackprop()(tiny, images, targets), min_max(clipped), 1e-6)


@pytest.mark.parametrize("real", [False, True], ids=["tiny", "mobilenet"])
def test_integrated_gradients_are_captums(real, tiny, images, targets, captum):
    model, images, targets = (mobilenet(), cats(96), TARGETS) if real else (tiny, images, targets)
    method = IntegratedGradients(steps=8, baseline=0.25, batch_size=6)
    expected = captum.IntegratedGradients(model).attribute(
        images, torch.full_like(images, 0.25), targets, n_steps=8, internal_batch_size=2
    )
    got = method.attributions(model, images, targets, torch.full_like(images, 0.25))
    close(got, expected.float(), 1e-5 * expected.abs().max().item())
    close(method(model, images, targets), min_max(expected.float().abs().sum(1)), 1e-5)


def test_integrated_gradients_sum_to_the_difference_of_logits(tiny, images, targets):
    blank = torch.zeros_like(images)
    summed = IntegratedGradients(steps=200).attributions(tiny, images, targets, blank).sum((1, 2, 3))
    with torch.no_grad():
        expected = (tiny(images) - tiny(blank))[[0, 1], targets]
    assert expected[0] > 2.4
    close(summed, expected, 3e-3)  # 50 steps: 8e-3; captum's error at 200 is the same.


def test_integrated_gradients_of_a_line_are_exact_after_one_step(images, targets):
    line = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    images = images[..., :32, :32]
    got = IntegratedGradients(steps=1).attributions(line, images, targets, torch.zeros_like(images))
    close(got, images * line[1].weight.detach()[targets].view_as(images), 1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("method", [IntegratedGradients(7), SmoothGrad(Gradient(), 5)], ids=str)
def test_the_batch_size_changes_nothing_but_memory(method, batch_size, tiny, images, targets):
    whole = replace(method, batch_size=64)(tiny, images, targets)
    close(replace(method, batch_size=batch_size)(tiny, images, targets), whole, 1e-5)


@pytest.mark.parametrize(
    "base",
    [
        Gradient(),
        GuidedBackprop(),
        IntegratedGradients(4),
        GradCAM("features.2"),
        SESS(GradCAM("features.2"), num_scales=2),
    ],
    ids=str,
)
def test_smoothgrad_with_one_noiseless_sample_is_its_base(base, tiny, images, targets):
    got = SmoothGrad(base, num_samples=1, noise=0.0).explain(tiny, images, targets)
    expected = base.explain(tiny, images, targets)
    close(got.maps, expected.maps, 1e-6)  # A map whose top is 1 - 1e-7 is stretched once more.
    close(got.scores, model_scores(tiny, images, targets), 1e-6)


def model_scores(model, images, targets):
    return model(images).softmax(1).detach()[range(len(targets)), targets]


def test_smoothgrad_averages_the_raw_maps_of_noisy_copies(tiny, images, targets, captum):
    source = generator(images.device, 3)
    noise = torch.stack([torch.randn(images.shape[1:], generator=source) for _ in range(6)])
    span = images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)
    saliency = captum.Saliency(tiny)
    expected = sum(saliency.attribute(images + 0.2 * span * n, targets).amax(1) for n in noise) / 6
    close(SmoothGrad(Gradient(), 6, 0.2, seed=3)(tiny, images, targets), min_max(expected), 1e-5)


def test_smoothgrad_averages_the_finished_maps_of_any_other_base(tiny, images, targets):
    source = generator(images.device, 0)
    noise = torch.stack([torch.randn(images.shape[1:], generator=source) for _ in range(3)])
    span = images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)
    base = GradCAM("features.2")
    expected = sum(base(tiny, images + 0.1 * span * n, targets) for n in noise) / 3
    close(SmoothGrad(base, 3, 0.1)(tiny, images, targets), min_max(expected), 1e-6)


def test_smoothgrad_depends_on_its_seed_alone(tiny, images, targets):
    method = SmoothGrad(Gradient(), 4)
    before = torch.get_rng_state()
    first = method(tiny, images, targets)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(method(tiny, images, targets), first)
    assert not torch.equal(SmoothGrad(Gradient(), 4, seed=1)(tiny, images, targets), first)
    # Nor on an image's place in the batch.
    close(method(tiny, images.flip(0), targets.flip(0)).flip(0), first, 1e-5)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Gradient(), 1),
        (IntegratedGradients(5), 5),
        (SmoothGrad(IntegratedGradients(5), 3), 15),
        (SmoothGrad(GradCAM("features.2"), 3), 3),
    ],
    ids=str,
)
def test_forwards_are_as_many_as_told(method, count, images, targets):
    class Counting(Tiny):
        seen = 0

        def forward(self, images):
            Counting.seen += len(images)
            return super().forward(images)

    model = fill(Counting())
    method(model, images, targets)
    assert Counting.seen == count * len(images)
    assert method.count_forwards(model, (224, 224)) == count


METHODS = [Gradient(), IntegratedGradients(3), SmoothGrad(Gradient(), 2), SmoothGrad(GuidedBackprop(), 2)]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_that_says_nothing_gets_zeros(method, tiny, images, targets):
    nn.init.zeros_(tiny.fc.weight)
    explanation = method.explain(tiny, images, targets)
    assert not explanation.maps.any()
    assert explanation.scores.isfinite().all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_that_says_nan_gets_zeros(method, tiny, images, targets):
    nn.init.constant_(tiny.fc.weight, torch.nan)
    assert not method(tiny, images, targets).any()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_flat_image_is_explained_without_nan(method, tiny, targets):
    assert method(tiny, torch.zeros(2, 3, 224, 224), targets).isfinite().all()


def test_wrong_hyper_parameters_are_refused():
    with pytest.raises(ValueError, match=r"IntegratedGradients: steps must be at least 1, got 0"):
        IntegratedGradients(0)
    with pytest.raises(ValueError, match=r"SmoothGrad: noise must not be negative, got -0\.1"):
        SmoothGrad(Gradient(), noise=-0.1)
    with pytest.raises(ValueError, match=r"SmoothGrad: batch_size must be at least 1, got 0"):
        SmoothGrad(Gradient(), batch_size=0)


@pytest.mark.usefixtures("unchecked")
def test_a_base_that_is_no_method_is_refused():
    with pytest.raises(TypeError, match=r"SmoothGrad: base must be a saliency method such as Gradient\(\)"):
        SmoothGrad("gradient")


def test_methods_print_as_the_call_that_makes_them():
    assert str(SmoothGrad(IntegratedGradients(10), noise=0.1)) == (
        "SmoothGrad(IntegratedGradients(steps=10), noise=0.1)"
    )


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_maps_are_float32_whatever_the_model_is(method, dtype, tiny, images, targets):
    explanation = method.explain(tiny.to(dtype), images.to(dtype), targets)
    assert explanation.maps.dtype == explanation.scores.dtype == torch.float32
    assert explanation.maps.amax((1, 2)).tolist() == pytest.approx([1, 1])
