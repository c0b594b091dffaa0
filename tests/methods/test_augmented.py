from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from formula import Tiny, fill, picture
from real_weights import EGYPTIAN_CAT, TABBY, cats, mobilenet
from sess_lightning.methods import AugmentedGradCAM, GradCAM
from sess_lightning.methods.augmented import Poses, View, take_copies
from sess_lightning.ops import min_max

BASE = GradCAM("features.2")
FAST = AugmentedGradCAM(BASE, num_copies=4, steps=5)


def close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def poses(*each):
    return Poses(torch.tensor([angle for angle, _ in each]), torch.tensor([shift for _, shift in each]))


def test_the_first_copy_is_the_image():
    image = picture(20, 30, 1)[None]
    drawn = AugmentedGradCAM(num_copies=3).draw((20, 30), image.device)
    copies = take_copies(image, drawn)
    close(copies[0], image, 1e-5)
    assert (copies[1] - image).abs().max() > 0.5


def test_a_shift_moves_the_picture_down_and_right_and_lets_zeros_in():
    image = picture(8, 10, 1)[None]
    (copy,) = take_copies(image, poses((0.0, (2.0, 3.0))))
    close(copy[..., 2:, 3:], image[..., :-2, :-3], 1e-5)
    assert not copy[..., :2, :].any()
    assert not copy[..., :3].any()


def test_a_quarter_turn_turns_the_pixels():
    image = picture(9, 9, 1)[None]
    (copy,) = take_copies(image, poses((torch.pi / 2, (0.0, 0.0))))
    close(copy, image.rot90(1, (2, 3)), 1e-4)


def test_poses_stay_within_their_limits_and_fill_them():
    drawn = AugmentedGradCAM(num_copies=1000, max_angle=0.4, max_shift=0.1).draw(
        (50, 80), torch.device("cpu")
    )
    assert drawn.angles.abs().max().item() == pytest.approx(0.4, abs=0.01)
    assert drawn.shifts.abs().amax(0).tolist() == pytest.approx([5.0, 5.0], abs=0.05)


def test_what_a_pixelwise_grid_sees_is_the_copy_itself():
    image = picture(12, 15, 1)[None]
    posed = poses((0.3, (1.5, -2.25)), (-0.5, (0.0, 4.0)))
    seen = View.of(posed, (12, 15), (12, 15)).read(image[0])
    close(seen.transpose(0, 1), take_copies(image, posed)[:, 0], 1e-4)


def test_a_cell_is_the_mean_of_nine_bilinear_reads():
    ndimage = pytest.importorskip("scipy.ndimage")
    image = picture(20, 24, 2)[:1]
    angle, (down, right) = 0.4, (2.0, -3.5)
    (seen,) = View.of(poses((angle, (down, right))), (20, 24), (4, 3)).read(image)[0]
    y, x = np.meshgrid(
        (np.arange(12) + 0.5) * 20 / 12 - 10, (np.arange(9) + 0.5) * 24 / 9 - 12, indexing="ij"
    )
    y, x = y - down, x - right
    places = np.cos(angle) * y + np.sin(angle) * x + 9.5, np.cos(angle) * x - np.sin(angle) * y + 11.5
    reads = ndimage.map_coordinates(image[0].double().numpy(), places, order=1, mode="grid-constant")
    np.testing.assert_allclose(seen, reads.reshape(4, 3, 3, 3).mean((1, 3)), atol=1e-5)


@pytest.fixture
def blob():
    """A small off-centre blob on 112 px, and what 40 posed 7 x 7 grids see of it."""
    y, x = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
    blob = torch.exp(-((y - 40) ** 2 + (x - 66) ** 2) / (2 * 7.0**2))[None]
    method = AugmentedGradCAM(num_copies=40)
    posed = method.draw((112, 112), blob.device)
    return method, blob, posed, View.of(posed, (112, 112), (7, 7))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_super_resolution_finds_what_the_views_show(blob):
    method, sought, posed, views = blob
    maps = views.read(sought).transpose(0, 1)
    sharp = method.super_resolve(maps, posed, (112, 112))
    single = nn.functional.interpolate(maps[:1], (112, 112), mode="bilinear")[0]
    assert correlation(single, sought) < 0.91
    assert correlation(sharp, sought) > 0.97
    # The peak is a plateau, on which rounding decides which pixel is the highest.
    centre = (sharp[0] > sharp.max() / 2).nonzero().double().mean(0)
    assert centre.tolist() == pytest.approx([40, 66], abs=1)


def test_the_misfit_is_the_formula(blob):
    method, _, _, views = blob
    sharp, maps = picture(112, 112, 3)[:2], picture(40, 49, 4)[:2].view(2, 40, 7, 7).transpose(0, 1)
    h = sharp.double().numpy()
    expected = ((views.read(sharp) - maps.transpose(0, 1)).double().numpy() ** 2).mean((1, 2, 3))
    expected += (
        0.0023 * (np.abs(np.diff(h, axis=1)).sum((1, 2)) + np.abs(np.diff(h, axis=2)).sum((1, 2))) / 112
    )
    expected += 0.0256 * (h**2).mean((1, 2))
    np.testing.assert_allclose(method.misfit(sharp, maps, views), expected, rtol=1e-5)


def test_without_variation_it_is_ridge_regression():
    method = AugmentedGradCAM(num_copies=10, variation=0.0, energy=0.1, steps=1200, learning_rate=0.02)
    posed = method.draw((16, 16), torch.device("cpu"))
    views = View.of(posed, (16, 16), (4, 4))
    maps = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    basis = torch.eye(256).view(256, 16, 16)
    matrix = views.read(basis).flatten(1).T.double().numpy()
    normal = matrix.T @ matrix / 160 + 0.1 * np.eye(256) / 256
    expected = np.linalg.solve(normal, matrix.T @ maps.flatten().double().numpy() / 160)
    got = method.super_resolve(maps, posed, (16, 16))
    np.testing.assert_allclose(got.flatten(), expected, atol=2e-3)


def test_it_is_the_bases_maps_of_the_copies_super_resolved():
    images, targets = cats(96), torch.tensor([EGYPTIAN_CAT, TABBY])
    method = AugmentedGradCAM(num_copies=5, steps=20)
    explanation = method.explain(mobilenet(), images, targets)
    posed = method.draw((96, 96), images.device)
    copies = take_copies(images, posed)
    maps = torch.stack([GradCAM().extract(mobilenet(), copy, targets).maps for copy in copies])
    close(explanation.maps, min_max(method.super_resolve(maps, posed, (96, 96))), 1e-4)
    close(explanation.scores, mobilenet()(images).softmax(1)[[0, 1], targets].detach(), 1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing_but_memory(batch_size, tiny, images, targets):
    whole = FAST(tiny, images, targets)
    close(replace(FAST, batch_size=batch_size)(tiny, images, targets), whole, 1e-4)


def test_it_depends_on_its_seed_alone(tiny, images, targets):
    before = torch.get_rng_state()
    first = FAST(tiny, images, targets)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(FAST(tiny, images, targets), first)
    assert not torch.equal(replace(FAST, seed=1)(tiny, images, targets), first)


def test_it_costs_the_base_once_per_copy(images, targets):
    class Counting(Tiny):
        seen = largest = 0

        def forward(self, images):
            Counting.seen += len(images)
            Counting.largest = max(Counting.largest, len(images))
            return super().forward(images)

    replace(FAST, batch_size=4)(fill(Counting()), images, targets)
    assert Counting.seen == 2 * FAST.count_forwards(Counting(), (224, 224)) == 2 * 4
    assert Counting.largest == 4
    assert AugmentedGradCAM().count_forwards(Counting(), (224, 224)) == 100


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_model_that_says_nothing_gets_zeros(value, tiny, images, targets):
    nn.init.constant_(tiny.fc.weight, value)
    assert not FAST(tiny, images, targets).any()


@pytest.mark.usefixtures("unchecked")
def test_nothing_between_image_and_map_waits_for_the_host(tiny, images, targets, sync_spy):
    method = replace(FAST, base=GradCAM(tiny.features[2]))
    with sync_spy:
        method(tiny, images, targets)


def test_wrong_hyper_parameters_are_refused():
    with pytest.raises(ValueError, match=r"AugmentedGradCAM: num_copies must be at least 1, got 0"):
        AugmentedGradCAM(num_copies=0)
    assert str(AugmentedGradCAM(BASE, 10)) == (
        "AugmentedGradCAM(base=GradCAM(target_layer=features.2), num_copies=10)"
    )
