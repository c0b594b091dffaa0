import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from sess_lightning.methods import SESS, Blurred, CentreGaussian, GradCAM, RandomMap
from sess_lightning.ops import blur, min_max


def close(got, expected, tolerance=1e-6):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_blurred_is_the_bases_map_under_a_gaussian(tiny, images, targets):
    base = GradCAM().explain(tiny, images, targets)
    got = Blurred(GradCAM()).explain(tiny, images, targets)
    offsets = torch.arange(41.0) - 20
    kernel = torch.exp(-(offsets**2) / (2 * 12.0**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(base.maps[:, None], (20,) * 4, mode="reflect")
    close(got.maps, min_max(F.conv2d(padded, kernel[None, None])[:, 0]), 1e-5)
    assert torch.equal(got.scores, base.scores)


def test_the_blur_grows_with_the_image_unless_it_is_told(tiny, images, targets):
    small = F.interpolate(images, (112, 112), mode="bilinear")
    base = GradCAM()(tiny, small, targets)
    close(Blurred(GradCAM())(tiny, small, targets), min_max(blur(base, 21, 6.0)))
    close(Blurred(GradCAM(), 5, 2.0)(tiny, small, targets), min_max(blur(base, 5, 2.0)))
    close(Blurred(GradCAM(), sigma=3.0)(tiny, small, targets), min_max(blur(base, 11, 3.0)))


def test_blurred_costs_and_reads_the_model_as_its_base_does(tiny):
    base = SESS(GradCAM(activation="sigmoid"), num_scales=2)
    blurred = Blurred(base)
    assert blurred.count_forwards(tiny, (224, 300)) == base.count_forwards(tiny, (224, 300)) == 5
    assert blurred.activation == "sigmoid"
    assert Blurred(RandomMap()).forwards == 0


def test_blurred_goes_under_sess(tiny, images, targets):
    one = SESS(Blurred(GradCAM()), num_scales=1)(tiny, images, targets)
    close(one, Blurred(GradCAM())(tiny, images, targets), 1e-5)


@pytest.mark.usefixtures("unchecked")
def test_blurred_refuses_what_is_no_method():
    with pytest.raises(TypeError, match="Blurred: base must be a saliency method"):
        Blurred("GradCAM")


def test_the_random_map_is_the_same_for_every_image_and_another_for_another_seed(tiny, images, targets):
    first, second = RandomMap()(tiny, images, targets)
    assert torch.equal(first, second)
    assert (RandomMap(seed=1)(tiny, images, targets)[0] - first).abs().mean() > 0.1


def test_the_centre_gaussian_peaks_in_the_middle_and_is_symmetric(tiny, images, targets):
    maps = CentreGaussian()(tiny, images[..., :200], targets)
    close(maps, maps.flip(1))
    close(maps, maps.flip(2))
    assert divmod(maps[0].argmax().item(), 200) in {(y, x) for y in (111, 112) for x in (99, 100)}
    y, x = ((torch.arange(n) + 0.5) / n - 0.5 for n in (224, 200))
    close(maps[0], min_max(torch.exp(-(y[:, None] ** 2 + x**2) / (2 * 0.25**2))[None])[0])


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_gaussian_without_width_is_refused(sigma):
    with pytest.raises(ValueError, match=f"CentreGaussian: sigma must be positive, .* got {sigma}"):
        CentreGaussian(sigma)
