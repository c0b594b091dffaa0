import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from formula import Tiny, fill
from real_weights import EGYPTIAN_CAT, TABBY, cats, mobilenet
from sess_lightning.methods import RISE, ExtremalPerturbation, GroupCAM, ScoreCAM
from sess_lightning.methods.extremal import Bumps, fading_blur, perturbed
from sess_lightning.methods.perturbation import rise_masks
from sess_lightning.ops import upsample

TARGETS = torch.tensor([EGYPTIAN_CAT, TABBY])


def close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


class Counting(Tiny):
    total = largest = 0  # On the class: what a forward writes on the model is taken back.

    def forward(self, images):
        Counting.total += len(images)
        Counting.largest = max(Counting.largest, len(images))
        return super().forward(images)


@pytest.fixture
def counting():
    Counting.total = Counting.largest = 0
    return fill(Counting())


def score_cam_by_hand(model, features, image, target):
    """The authors' loop over channels, one masked image at a time."""
    total = np.zeros(image.shape[-2:])
    for channel in features:
        mask = upsample(channel[None], image.shape[-2:])[0]
        if mask.max() == mask.min():
            continue
        mask = mask.numpy()
        stretched = (mask - mask.min()) / (mask.max() - mask.min())
        probability = model(image[None] * torch.from_numpy(stretched)).softmax(1)[0, target].item()
        total += probability * mask
    total = np.maximum(total, 0)
    return (total - total.min()) / (total.max() - total.min())


def test_score_cam_is_the_authors_loop(tiny, images, targets):
    got = ScoreCAM("features.4", batch_size=7)(tiny, images, targets)  # Before the ReLU: of both signs.
    with torch.no_grad():
        features = tiny.features[:5](images)
        assert features.amin() < 0
        for map_, channels, image, target in zip(got, features, images, targets, strict=True):
            expected = score_cam_by_hand(tiny, channels, image, target)
            np.testing.assert_allclose(map_, expected, atol=2e-6)


@pytest.mark.parametrize("real", [False, True], ids=["tiny", "mobilenet"])
def test_score_cam_with_softmax_is_grad_cams(real, tiny, images, targets, monkeypatch):
    package = pytest.importorskip("pytorch_grad_cam")
    # The package enlarges with corners aligned, the authors' code and ours without.
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size=size, mode="bilinear"))
    model, images, targets = (mobilenet(), cats(48)[:1], TARGETS[:1]) if real else (tiny, images, targets)
    name, layer = (
        ("features.7.conv.1", model.features[7].conv[1]) if real else ("features.5", model.features[5])
    )
    outputs = [package.utils.model_targets.ClassifierOutputTarget(target.item()) for target in targets]
    with package.ScoreCAM(model, [layer]) as cam:
        cam.batch_size = 64
        expected = torch.from_numpy(cam(images, outputs))
    close(ScoreCAM(name, weighting="softmax", batch_size=64)(model, images, targets), expected, 2e-5)


def test_score_cam_leaves_flat_channels_out(tiny, images, targets):
    with torch.no_grad():
        tiny.features[4].weight[0] = 0
        tiny.features[4].bias[0] = 3.0
        expected = tiny.features(images).clone()
    assert (expected[:, 0] == 3).all()
    maps = ScoreCAM("features.5")(tiny, images, targets)
    with torch.no_grad():
        for map_, channels, image, target in zip(maps, expected, images, targets, strict=True):
            np.testing.assert_allclose(map_, score_cam_by_hand(tiny, channels, image, target), atol=2e-6)


def test_score_cam_costs_a_forward_per_channel(counting, images, targets):
    method = ScoreCAM("features.5", batch_size=8)
    assert method.count_forwards(counting, (224, 224)) == 1 + 24
    Counting.total = Counting.largest = 0
    method(counting, images, targets)
    assert Counting.total == 2 * 25
    assert Counting.largest == 8


def rise_mask_by_hand(grid, shift, size):
    """Bilinear at half-pixel centres, one pixel at a time."""
    cells = len(grid)
    mask = np.empty(size)
    for y in range(size[0]):
        for x in range(size[1]):
            weight = 1.0
            places = []
            for axis, at in enumerate((y + shift[0], x + shift[1])):
                enlarged = (cells + 1) * -(-size[axis] // cells)
                place = np.clip((at + 0.5) * cells / enlarged - 0.5, 0, cells - 1)
                low = min(int(place), cells - 2)
                places.append((low, place - low))
            (i, v), (j, u) = places
            weight = [(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u]
            mask[y, x] = np.dot(weight, [grid[i, j], grid[i, j + 1], grid[i + 1, j], grid[i + 1, j + 1]])
    return mask


def test_rise_masks_are_enlarged_grids_cropped_at_their_shift():
    grids, shifts = RISE(5, cells=3).draw((20, 31), torch.device("cpu"))
    assert shifts.amax(0).tolist() <= [6, 10]
    assert set(grids.unique().tolist()) == {0.0, 1.0}
    for mask, grid, shift in zip(rise_masks(grids, shifts, (20, 31)), grids, shifts, strict=True):
        np.testing.assert_allclose(mask, rise_mask_by_hand(grid.numpy(), shift.numpy(), (20, 31)), atol=1e-6)


def test_rise_masks_agree_with_scikit_image_inside_the_mirrored_border():
    transform = pytest.importorskip("skimage.transform")
    grids, shifts = RISE(4).draw((224, 224), torch.device("cpu"))
    for mask, grid, (y, x) in zip(rise_masks(grids, shifts, (224, 224)), grids, shifts, strict=True):
        enlarged = transform.resize(grid.numpy(), (256, 256), order=1, mode="reflect", anti_aliasing=False)
        inside = slice(32, 192)
        cropped = enlarged[y : y + 224, x : x + 224]
        np.testing.assert_allclose(mask[inside, inside], cropped[inside, inside], atol=1e-6)


@pytest.mark.parametrize("real", [False, True], ids=["tiny", "mobilenet"])
def test_rise_is_the_formula(real, tiny, images, targets):
    model, images, targets = (mobilenet(), cats(64), TARGETS) if real else (tiny, images, targets)
    method = RISE(20, batch_size=7)
    masks = rise_masks(*method.draw(images.shape[-2:], images.device), tuple(images.shape[-2:])).numpy()
    got = method.explain(model, images, targets)
    with torch.no_grad():
        for map_, image, target in zip(got.maps, images, targets, strict=True):
            masked = torch.from_numpy(image.numpy() * masks[:, None])
            scores = model(masked).softmax(1)[:, target].numpy()
            expected = np.tensordot(scores, masks, 1) / len(masks) / 0.5
            expected = (expected - expected.min()) / (expected.max() - expected.min())
            # 20 masks' float32 sums differ by 5.2e-6 between kinds of CPU; four times as much is let pass.
            np.testing.assert_allclose(map_, expected, atol=2e-5)
        close(got.scores, model(images).softmax(1)[[0, 1], targets], 1e-6)


def test_rise_finds_the_half_that_matters(images):
    class LeftHalf(nn.Module):
        def forward(self, images):
            left = images[..., : images.shape[-1] // 2].square().mean((1, 2, 3))
            return torch.stack([20 * (left - 0.4), 0 * left], 1)

    maps = RISE(500)(LeftHalf(), torch.ones_like(images), torch.zeros(2).long())
    assert maps[:, :, :112].mean() > 2 * maps[:, :, 112:].mean()


def test_masks_have_their_expected_value_and_come_in_any_number(tiny, images, targets):
    grids, shifts = RISE(8000, probability=0.3).draw((224, 224), torch.device("cpu"))
    assert grids.shape == (8000, 7, 7)
    assert grids.mean().item() == pytest.approx(0.3, abs=0.005)
    assert shifts.float().mean(0).tolist() == pytest.approx([15.5, 15.5], abs=0.5)
    assert shifts.amax().item() == 31


def test_rise_depends_on_its_seed_alone(tiny, images, targets):
    method = RISE(16)
    before = torch.get_rng_state()
    first = method(tiny, images, targets)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(method(tiny, images, targets), first)
    assert not torch.equal(RISE(16, seed=1)(tiny, images, targets), first)
    close(method(tiny, images.flip(0), targets.flip(0)).flip(0), first, 1e-5)


def test_rise_costs_a_forward_per_mask(counting, images, targets):
    method = RISE(10, batch_size=6)
    method(counting, images, targets)
    assert Counting.total == 2 * method.count_forwards(counting, (224, 224)) == 2 * 10
    assert Counting.largest == 6
    assert RISE().forwards == 8000


def test_rise_takes_any_size(tiny, targets):
    assert RISE(4)(tiny, torch.ones(2, 3, 61, 97), targets).shape == (2, 61, 97)


def bump_mask_by_hand(heights, size, step, sigma):
    """TorchRay's rules, one padded pixel at a time."""
    radius, padding = 1 + -(-sigma // step), 1 + -(-2 * sigma // step)
    padded = [step * (-(-n // step) + 2 * (padding - radius) - 1) + 1 for n in size]
    mask = np.empty(padded)
    around = range(2 * radius + 1)
    for y in range(padded[0]):
        for x in range(padded[1]):
            values = []
            for i in (y // step + k - padding for k in around):
                for j in (x // step + k - padding for k in around):
                    inside = 0 <= i < heights.shape[0] and 0 <= j < heights.shape[1]
                    apart = np.hypot(y - sigma - step * i, x - sigma - step * j) / sigma
                    kernel = np.exp(-2 * max(apart - 0.5, 0) ** 2)
                    values.append(kernel * heights[i, j] if inside else 0.0)
            values = np.array(values)
            shares = np.exp(20 * values)
            mask[y, x] = np.clip((values * shares).sum() / shares.sum(), 0, 1)
    return mask


@pytest.mark.parametrize(("size", "step", "sigma"), [((10, 13), 3, 6), ((14, 21), 7, 7)])
def test_masks_are_soft_maxima_of_bumps(size, step, sigma):
    bumps = Bumps(size, step, sigma)
    heights = torch.rand(2, *bumps.grid, generator=torch.Generator().manual_seed(0))
    got = bumps.mask(heights)
    for mask, height in zip(got, heights, strict=True):
        expected = bump_mask_by_hand(height.double().numpy(), size, step, sigma)
        np.testing.assert_allclose(mask, expected, atol=1e-5)
    assert bumps.crop(got).shape[1:] == size


def test_torchrays_sizes_at_224_px():
    bumps = Bumps((224, 224), 7, 21)
    assert (bumps.grid, bumps.padded) == ((32, 32), (260, 260))


def test_the_blur_lets_zeros_in_from_the_border():
    ndimage = pytest.importorskip("scipy.ndimage")
    image = cats(48)[:1]
    expected = ndimage.gaussian_filter(image.double().numpy(), (0, 0, 3, 3), mode="constant", truncate=4)
    np.testing.assert_allclose(fading_blur(image, 3.0), expected, atol=1e-5)
    assert torch.equal(fading_blur(image, 0.0), image)


@pytest.mark.parametrize("kind", ["blur", "fade"])
def test_perturbed_pixels_lie_between_the_two_nearest_levels(kind):
    image = cats(32)
    levels = ExtremalPerturbation(perturbation=kind)._levels(image)
    close(levels[-1], image, 0.0)
    close(levels[0], 0 * image if kind == "fade" else fading_blur(image, 20.0), 1e-6)
    masks = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks[:, 0, :4], masks[:, 0, 4:8] = 1, 0
    got = perturbed(levels, masks)
    stack, values = levels.double().numpy(), masks.double().numpy()
    for b, a, y, x in np.ndindex(2, 3, 32, 32):
        expected = [np.interp(7 * values[b, a, y, x], np.arange(8), stack[:, b, c, y, x]) for c in range(3)]
        np.testing.assert_allclose(got[b, a, :, y, x], expected, atol=1e-5)


@pytest.fixture
def in_float64(monkeypatch):
    """What asks for float32 gets float64: rounding, which an ascent magnifies, is then no excuse."""
    mobilenet(), cats(64)  # Kept for all tests, in float32.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float)


@pytest.mark.parametrize("reward", ["simple", "contrastive"])
@pytest.mark.parametrize("real", [False, True], ids=["tiny", "mobilenet"])
def test_the_ascent_is_torchs_sgd_on_the_formula(real, reward, tiny, images, targets, in_float64):
    model, images = (mobilenet(), cats(64)) if real else (tiny, images[..., 80:144, 80:144])
    model, images, steps = copy.deepcopy(model).double(), images.double(), 3 if real else 12
    method = ExtremalPerturbation((0.1, 0.3), steps=steps, reward=reward, step=8, sigma=16)
    got = method.masks(model, images, targets)
    bumps, levels = Bumps((64, 64), 8, 16), method._levels(images)
    for i, target in enumerate(targets.tolist()):
        for j, area in enumerate(method.areas):
            heights = torch.ones(1, *bumps.grid, requires_grad=True)
            sgd = torch.optim.SGD([heights], lr=0.01, momentum=0.9, dampening=0.9)
            for step in range(steps):
                whole = bumps.mask(heights)
                mask = bumps.crop(whole)
                seen = perturbed(levels[:, i : i + 1], mask[:, None])[0]
                logits = model(seen.flip(3) if step % 2 == 0 else seen)[0]
                others = torch.cat([logits[:target], logits[target + 1 :]])
                gain = logits[target] - (others.max() if reward == "contrastive" else 0)
                ordered = whole.flatten().sort().values
                ideal = torch.cat([torch.zeros(int(len(ordered) * (1 - area))), torch.ones(len(ordered))])
                loss = 300 * 1.0035**step * (ordered - ideal[: len(ordered)]).square().mean() - gain
                sgd.zero_grad()
                (heights.grad,) = torch.autograd.grad(loss, heights)
                sgd.step()
                heights.data.clamp_(0, 1)
            close(got[i, j], mask[0].detach(), 1e-10)


class Patch(nn.Module):
    """Class 0 is how bright the pixels around (12, 16) are: the ascent mirrors the image."""

    def forward(self, images):
        inside = images[..., 8:16, 12:20].mean((1, 2, 3))
        return torch.stack([20 * inside, 0 * inside], 1)


def test_masks_have_the_areas_asked_for_and_keep_what_matters():
    images = torch.ones(1, 3, 32, 32)
    method = ExtremalPerturbation((0.1, 0.2), steps=400, step=4, sigma=4, perturbation="fade", smooth=0.0)
    masks = method.masks(Patch(), images, torch.tensor([0]))[0]
    padded = Bumps((32, 32), 4, 4).padded
    shares = masks.sum((1, 2)) / (padded[0] * padded[1])
    assert shares.tolist() == pytest.approx([0.1, 0.2], abs=0.03)
    inside = masks[:, 8:16, 12:20].sum((1, 2))
    outside = (masks.sum((1, 2)) - inside) / (32 * 32 - 64)
    assert (inside / 64 > 4 * outside).all()
    assert (inside / 64 > 0.85).all()
    assert method(Patch(), images, torch.tensor([0]))[0, 8:16, 12:20].mean() > 0.7


def test_extremal_perturbation_costs_a_forward_per_step_and_area(counting, images, targets):
    method = ExtremalPerturbation((0.1, 0.2, 0.3), steps=4, step=32, sigma=32, batch_size=3)
    method(counting, images, targets)
    assert Counting.total == 2 * method.count_forwards(counting, (224, 224)) == 2 * 12
    assert Counting.largest == 3
    assert ExtremalPerturbation().forwards == 3200


EXTREMAL = ExtremalPerturbation((0.1, 0.3), steps=2, step=28, sigma=28)
METHODS = [ScoreCAM("features.5"), ScoreCAM("features.5", "softmax"), RISE(6), EXTREMAL]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_nothing_but_memory(method, batch_size, tiny, images, targets):
    whole = replace(method, batch_size=64)(tiny, images, targets)
    close(replace(method, batch_size=batch_size)(tiny, images, targets), whole, 1e-5)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("value", [0.0, torch.nan, -100.0])
def test_odd_heads_give_finite_maps(method, value, tiny, images, targets):
    nn.init.constant_(tiny.fc.weight, value)
    assert method(tiny, images, targets).isfinite().all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_that_says_nan_gets_zeros(method, tiny, images, targets):
    nn.init.constant_(tiny.features[0].weight, torch.nan)
    assert not method(tiny, images, targets).any()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_nothing_between_image_and_map_waits_for_the_host(method, tiny, images, targets, sync_spy, unchecked):
    method = replace(method, target_layer=tiny.features[5]) if hasattr(method, "target_layer") else method
    method(tiny, images, targets)
    with sync_spy:
        method(tiny, images, targets)


def test_wrong_hyper_parameters_are_refused():
    with pytest.raises(ValueError, match="RISE: num_masks must be at least 1, got 0"):
        RISE(0)
    with pytest.raises(ValueError, match=r"RISE: probability must be between 0 and 1, got 1\.0"):
        RISE(probability=1.0)
    with pytest.raises(ValueError, match=r"ExtremalPerturbation: areas must be shares .* got \(1\.5,\)"):
        ExtremalPerturbation((1.5,))
    with pytest.raises(
        ValueError, match="ExtremalPerturbation: sigma must be a multiple of step, got 20 and 7"
    ):
        ExtremalPerturbation(sigma=20)
    with pytest.raises(ValueError, match=r"ExtremalPerturbation: smooth must not be negative, got -0\.1"):
        ExtremalPerturbation(smooth=-0.1)
    with pytest.raises(ValueError, match="GroupCAM: groups must be at least 1, got 0"):
        GroupCAM(groups=0)
    with pytest.raises(ValueError, match="ScoreCAM: batch_size must be at least 1, got 0"):
        ScoreCAM(batch_size=0)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match='ScoreCAM: weighting must be "probability" or "softmax"'):
        ScoreCAM(weighting="sum")
