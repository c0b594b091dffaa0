import pytest
import torch
from torch import nn

from formula import Tiny, fill, picture
from real_weights import EGYPTIAN_CAT, TABBY, cats, mobilenet
from sess_lightning.methods import (
    CAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    SmoothGradCAMPlusPlus,
    XGradCAM,
)
from sess_lightning.methods.evidence import layer_evidence
from sess_lightning.ops import min_max, upsample

FAMILY = [GradCAM(), CAM(), GradCAMPlusPlus(), LayerCAM(), HiResCAM(), XGradCAM()]
EARLY = "features.1"
"""Where gradients depend on the image, as they do not under a linear head."""
TARGETS = torch.tensor([EGYPTIAN_CAT, TABBY])


def named(method):
    return type(method).__name__


def close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def count_forwards(model, call):
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    call()
    handle.remove()
    return len(seen)


@pytest.mark.parametrize("layer", [18, 13], ids=["last", "early"])
@pytest.mark.parametrize("method", [GradCAM, GradCAMPlusPlus, LayerCAM, HiResCAM, XGradCAM])
def test_maps_are_those_of_grad_cam_on_real_weights(method, layer):
    package = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = mobilenet()
    with getattr(package, method.__name__)(model, [model.features[layer]]) as theirs:
        expected = theirs(cats().clone(), [ClassifierOutputTarget(target) for target in TARGETS.tolist()])
    model.zero_grad(set_to_none=True)
    explanation = method(f"features.{layer}").explain(model, cats(), TARGETS)
    # Measured: at most 1.5e-6 at the last layer, 3.3e-6 at the early one; with SSE4.1 kernels 2.2e-5 there,
    # by Grad-CAM++, whose third power of the gradient magnifies rounding. A wrong formula is hundredths off.
    close(explanation.maps, torch.from_numpy(expected), 1e-4)
    close(explanation.scores, model(cats()).softmax(1)[[0, 1], TARGETS].detach(), 1e-6)


def test_cam_is_zhous_sum_of_features_weighted_by_the_last_linear_layer():
    model = mobilenet()
    with torch.no_grad():
        features = model.features(cats())
    weights = model.classifier[1].weight[TARGETS].detach()
    expected = min_max(upsample(torch.einsum("bk,bkhw->bhw", weights, features), (224, 224)))
    close(CAM()(model, cats(), TARGETS), expected, 1e-5)  # Measured: 1.2e-6.


def test_hires_cam_and_x_grad_cam_are_grad_cam_where_gradients_are_the_same_everywhere(tiny, images, targets):
    expected = GradCAM()(tiny, images, targets)
    close(HiResCAM()(tiny, images, targets), expected, 1e-6)
    close(XGradCAM()(tiny, images, targets), expected, 1e-5)


def test_rectified_cam_is_grad_cam_under_a_linear_head(tiny, images, targets):
    size = (224, 224)
    features, gradients, _ = layer_evidence(tiny, None, images, targets)
    cam, grad_cam = (method.combine(features, gradients) for method in (CAM(), GradCAM()))
    close(min_max(upsample(cam.relu(), size)), min_max(upsample(grad_cam, size)), 1e-6)


def test_grad_cam_plus_plus_without_epsilon_is_the_papers_formula(tiny, images, targets):
    features, gradients, _ = layer_evidence(tiny, None, images, targets)
    maps = GradCAMPlusPlus(epsilon=0.0).combine(features, gradients)
    a, g = features.double().numpy(), gradients.double().numpy()
    places = (2, 3)
    # Equations 19, 14 and 20, exp(logit) divided out of the first.
    divisor = 2 * g**2 + a.sum(places, keepdims=True) * g**3
    alpha = g**2 / (divisor + (divisor == 0))
    weights = (alpha * g.clip(min=0)).sum(places, keepdims=True)
    expected = torch.from_numpy((weights * a).sum(1).clip(min=0))
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-6 * expected.max().item())


def test_smooth_grad_cam_plus_plus_without_noise_is_grad_cam_plus_plus(tiny, images, targets):
    smooth = SmoothGradCAMPlusPlus(noise=0.0, num_samples=3)
    close(smooth(tiny, images, targets), GradCAMPlusPlus()(tiny, images, targets), 1e-6)


def test_smooth_grad_cam_plus_plus_averages_powers_of_the_gradients_of_noisy_images(tiny, images, targets):
    method = SmoothGradCAMPlusPlus(EARLY, num_samples=2, noise=0.2, seed=3)
    chance = torch.Generator().manual_seed(3)
    spread = 0.2 * (images.amax((1, 2, 3)) - images.amin((1, 2, 3))).view(2, 1, 1, 1)
    noisy = [images + spread * torch.randn(3, 224, 224, generator=chance) for _ in range(2)]
    drawn = [layer_evidence(tiny, EARLY, each, targets)[1] for each in noisy]
    first, second, third = (sum(g**k for g in drawn) / 2 for k in (1, 2, 3))
    features, _, _ = layer_evidence(tiny, EARLY, images, targets)
    alpha = second / (2 * second + features.sum((2, 3), keepdim=True) * third + 1e-6)
    weights = (alpha * first.relu()).sum((2, 3), keepdim=True)
    expected = min_max(upsample((weights * features).sum(1).relu(), (224, 224)))
    close(method(tiny, images, targets), expected, 1e-5)


def test_the_noise_is_the_methods_own_and_the_same_for_every_image_of_a_batch(tiny, images, targets):
    method = SmoothGradCAMPlusPlus(EARLY, num_samples=2)
    before = torch.get_rng_state()
    maps = method(tiny, images, targets)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(method(tiny, images, targets), maps)
    close(method(tiny, images[1:], targets[1:]), maps[1:], 1e-5)
    other = SmoothGradCAMPlusPlus(EARLY, num_samples=2, seed=1)(tiny, images, targets)
    assert (other - maps).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"noise": -0.1}])
def test_smooth_grad_cam_plus_plus_refuses_what_makes_no_sense(options):
    with pytest.raises(ValueError, match="num_samples must be at least 1 and noise not negative"):
        SmoothGradCAMPlusPlus(**options)


@pytest.mark.parametrize("method", FAMILY, ids=named)
def test_scores_and_maps_come_out_of_one_forward(method, tiny, images, targets):
    assert method.single_forward
    method(tiny, images, targets)  # The layer is found, and the head looked at, once.
    assert count_forwards(tiny, lambda: method.explain(tiny, images, targets)) == 1


def test_smooth_grad_cam_plus_plus_costs_a_forward_per_copy_and_one_for_the_image(tiny, images, targets):
    method = SmoothGradCAMPlusPlus(num_samples=4)
    method(tiny, images, targets)
    assert not method.single_forward
    assert method.count_forwards(tiny, (224, 224)) == 5
    assert count_forwards(tiny, lambda: method.explain(tiny, images, targets)) == 5


@pytest.mark.parametrize("method", [*FAMILY, SmoothGradCAMPlusPlus(num_samples=2)], ids=named)
def test_nothing_between_image_and_map_waits_for_the_host(method, tiny, sync_spy):
    method = type(method)("features", **({"num_samples": 2} if type(method) is SmoothGradCAMPlusPlus else {}))
    method(tiny, torch.zeros(1, 3, 224, 224), torch.tensor([0]))  # Once per model it may.
    tiny.to("meta")
    with sync_spy:
        maps = method(tiny, torch.zeros(2, 3, 224, 224, device="meta"), torch.zeros(2, device="meta").long())
    assert maps.shape == (2, 224, 224)


class TwoLayerHead(Tiny):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))


class MaxPooled(Tiny):
    def forward(self, images):
        return self.fc(self.features(images).amax((2, 3)))


class Tempered(Tiny):
    def forward(self, images):
        return super().forward(images).tanh()


@pytest.mark.parametrize("model", [TwoLayerHead, MaxPooled, Tempered])
def test_cam_refuses_a_head_that_is_not_one_linear_layer_on_the_mean(model, images, targets):
    model = fill(model())
    with pytest.raises(ValueError, match=r"CAM: the head is not a single linear layer on the mean.*GradCAM"):
        CAM()(model, images, targets)
    assert not any(module._forward_hooks for module in model.modules())


def test_cam_refuses_a_layer_that_the_head_does_not_read(tiny, images, targets):
    with pytest.raises(ValueError, match="on the mean of target_layer Conv2d's features"):
        CAM("features.0")(tiny, images, targets)
    assert CAM("features.5")(tiny, images, targets).amax().item() == pytest.approx(1)


def test_cam_looks_again_when_the_head_is_another_one(tiny, images, targets):
    CAM()(tiny, images, targets)
    tiny.fc = nn.Sequential(tiny.fc, nn.Tanh(), nn.Linear(5, 5))
    with pytest.raises(ValueError, match="CAM: the head"):
        CAM()(tiny, images, targets)


@pytest.mark.parametrize("method", FAMILY, ids=named)
def test_a_single_logit_head_has_opposite_weights_for_its_two_classes(method, images):
    model = fill(Tiny())
    model.fc = nn.Linear(24, 1)
    explanation = method.explain(model, images[:1].repeat(2, 1, 1, 1), torch.tensor([0, 1]))
    close(explanation.scores.sum(), torch.tensor(1.0), 1e-6)
    if isinstance(method, CAM):
        close(explanation.maps[0], 1 - explanation.maps[1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", FAMILY, ids=named)
def test_other_precisions_give_nearly_the_same_float32_maps(method, dtype, tiny, images, targets):
    expected = method(tiny, images, targets)
    maps = method(tiny.to(dtype), images.to(dtype), targets)
    assert maps.dtype == torch.float32
    assert (maps - expected).abs().mean() < (0.03 if dtype == torch.bfloat16 else 1e-5)


def evidence(kind):
    chance = torch.Generator().manual_seed(0)
    features, gradients = (torch.randn(2, 4, 5, 5, generator=chance) for _ in range(2))
    return {
        "flat features": (torch.ones_like(features), gradients),
        "no features": (torch.zeros_like(features), gradients),
        "no gradients": (features, torch.zeros_like(gradients)),
        "all-negative features": (-features.abs(), gradients.abs()),
        "features that cancel": (features - features.mean((2, 3), keepdim=True), gradients),
        "tiny gradients": (features, gradients * 1e-30),
        "huge gradients": (features, gradients * 1e30),
        "NaN": (features.where(features < 1, torch.nan), gradients),
        "infinite": (features, gradients.where(gradients < 1, torch.inf)),
    }[kind]


KINDS = ("flat features", "no features", "no gradients", "all-negative features", "features that cancel",
         "tiny gradients", "huge gradients", "NaN", "infinite")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [*FAMILY, GradCAMPlusPlus(epsilon=0.0)], ids=named)
def test_maps_are_finite_for(kind, method):
    maps = min_max(upsample(method.combine(*evidence(kind)), (20, 20)))
    assert maps.isfinite().all()
    assert maps.amin() >= 0
    assert maps.amax() <= 1
    if kind in ("no features", "no gradients", "NaN", "infinite"):
        assert not maps.any()


def test_all_negative_evidence_rectifies_to_a_flat_map_and_only_cam_still_tells(tiny, images, targets):
    with torch.no_grad():
        tiny.fc.weight.copy_(-tiny.fc.weight.abs())
    for method in FAMILY:
        maps = method(tiny, images, targets)
        assert maps.isfinite().all()
        assert bool(maps.any()) == isinstance(method, CAM), named(method)


@pytest.mark.parametrize("size", [(96, 160), (333, 250)])
@pytest.mark.parametrize("method", FAMILY, ids=named)
def test_any_size_of_image(method, size, tiny):
    maps = method(tiny, picture(*size, 1)[None], torch.tensor([0]))
    assert maps.shape == (1, *size)
    assert maps.isfinite().all()
    assert maps.amax().item() == pytest.approx(1)
