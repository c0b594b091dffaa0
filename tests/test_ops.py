import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2.functional import gaussian_blur

from formula import picture
from precision import precision_flags, reset_precision
from sess_lightning.methods import SESS, GradCAM, GroupCAM
from sess_lightning.ops import (
    blur,
    full_precision,
    min_max,
    min_max_upsampled,
    resize,
    resize_matrix,
    size_of,
    upper_percentile,
    upsample,
    wait_for,
)


def test_min_max_stretches_each_map_to_0_and_1():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[-4.0, 0.0], [0.0, 0.0]]])
    assert min_max(maps).tolist() == [[[0.0, 0.25], [0.5, 1.0]], [[0.0, 1.0], [1.0, 1.0]]]


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_min_max_makes_zeros_of_flat_and_of_broken_maps(odd):
    maps = torch.stack([torch.full((2, 2), 7.0), torch.tensor([[0.0, 1.0], [2.0, odd]])])
    assert min_max(maps).tolist() == [[[0.0, 0.0], [0.0, 0.0]]] * 2


def test_min_max_calls_a_map_flat_whose_span_is_below_the_smallest_normal_number():
    assert min_max(torch.tensor([[[0.0, 1e-45]]])).tolist() == [[[0.0, 0.0]]]
    assert min_max(torch.tensor([[[0.0, 1.2e-38]]])).tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("level", [1.0, -3e4, 1e-20])
def test_min_max_calls_a_map_flat_that_differs_by_rounding(level):
    one = torch.tensor([[[1.0, 1.0 + 2e-7], [1.0 - 2e-7, 1.0]]]) * level
    assert min_max(one).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]
    scaled, _ = min_max_upsampled(one, (8, 8))
    assert not scaled.any()


@pytest.mark.parametrize("size", [(7, 7), (224, 224), (50, 31), (5, 3)])
def test_min_max_upsampled_then_upsample_is_upsample_then_min_max(size):
    maps = torch.randn(4, 7, 7, generator=torch.Generator().manual_seed(0))
    drawn = upsample(min_max_upsampled(maps, size)[0], size)
    torch.testing.assert_close(drawn, min_max(upsample(maps, size)), atol=1e-6, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upsample(min_max_upsampled(maps, size)[0], size), drawn)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [(7, 224), (14, 224), (224, 150), (288, 224), (928, 224), (224, 7), (5, 5), (1, 4), (4, 1)],
)
def test_resize_matrix_resizes_as_interpolate_does(source, target, antialias):
    image = torch.randn(1, 1, source, 3, generator=torch.Generator().manual_seed(0))
    # In float64: the kernel's own float32 positions are off by up to 6e-5.
    expected = F.interpolate(
        image.double(), (target, 3), mode="bilinear", align_corners=False, antialias=antialias
    )
    got = resize_matrix(source, target, torch.device("cpu"), antialias) @ image[0, 0]
    torch.testing.assert_close(got, expected[0, 0].float(), atol=1e-6, rtol=0)


def test_resize_returns_an_image_of_the_same_size_untouched():
    image = torch.zeros(1, 3, 4, 5)
    assert resize(image, (4, 5)) is image
    assert upsample(image[0], (4, 5)).shape == (3, 4, 5)


def test_size_of_is_height_and_width():
    assert size_of(torch.zeros(2, 3, 4, 5)) == (4, 5)


@pytest.mark.parametrize(("kernel_size", "sigma"), [(11, 5.0), (51, 50.0), (3, 0.5), (1, 1.0)])
def test_blur_is_torchvisions_gaussian_blur(kernel_size, sigma):
    image = picture(96, 128, 4)
    expected = gaussian_blur(image, [kernel_size, kernel_size], [sigma, sigma])
    torch.testing.assert_close(blur(image, kernel_size, sigma), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (4, 30)])
def test_blur_mirrors_again_and_again_where_the_kernel_exceeds_the_image(height, width):
    image = torch.arange(float(height * width)).reshape(1, height, width)
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (25, 25), (25, 25)), mode="reflect"))
    weights = torch.exp(-(torch.arange(-25.0, 26.0) ** 2) / (2 * 50.0**2))
    weights = weights / weights.sum()
    expected = F.conv2d(padded[None], weights[None, None, :, None] * weights[None, None, None])[0]
    torch.testing.assert_close(blur(image, 51, 50.0), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel_size", "sigma", "named"), [(4, 1.0, "kernel_size"), (-1, 1.0, "kernel_size"), (3, 0.0, "sigma")]
)
def test_blur_refuses_an_impossible_kernel_by_name(kernel_size, sigma, named):
    with pytest.raises(ValueError, match=f"blur: {named} must be"):
        blur(torch.zeros(1, 4, 4), kernel_size, sigma)


@pytest.mark.parametrize("percent", [0.0, 50.0, 99.0, 99.9, 100.0])
def test_upper_percentile_is_numpys(percent):
    maps = torch.randn(3, 17, 23, generator=torch.Generator().manual_seed(0))
    expected = np.percentile(maps.flatten(1).numpy(), percent, axis=1)
    np.testing.assert_allclose(upper_percentile(maps, percent).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_upper_percentile_refuses_what_is_no_percentage():
    with pytest.raises(ValueError, match=r"percentile must be in \[0, 100\], got 101"):
        upper_percentile(torch.zeros(1, 2, 2), 101.0)


def field(name, value):
    """Set a field of ``torch.backends``; torch before 2.9 has none."""

    def act():
        *path, last = name.split(".")
        owner = torch.backends
        for part in path:
            owner = getattr(owner, part, None)
        if not hasattr(owner, last):
            pytest.skip(f"this torch has no torch.backends.{name}")
        setattr(owner, last, value)

    return act


PRECISIONS = {
    "untouched": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": field("cuda.matmul.allow_tf32", True),
    "all tf32": field("fp32_precision", "tf32"),
    "cuda tf32": field("cuda.matmul.fp32_precision", "tf32"),
    "cudnn tf32": field("cudnn.fp32_precision", "tf32"),
    "mkldnn bf16": field("mkldnn.matmul.fp32_precision", "bf16"),
    "mkldnn tf32": field("mkldnn.matmul.fp32_precision", "tf32"),
    "cuda tf32, then ieee": lambda: [field("cuda.matmul.fp32_precision", v)() for v in ("tf32", "ieee")],
}


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """A training's own setting, and the flags as they stand with it."""
    fresh = precision_flags()
    try:
        PRECISIONS[request.param]()
        yield precision_flags()
    finally:
        reset_precision()
    assert precision_flags() == fresh


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_full_precision_means_float32_and_gives_every_flag_back(device, precision):
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    products = getattr(backend, "matmul", None)
    with full_precision(torch.device(device)):
        if hasattr(products, "fp32_precision"):
            assert products.fp32_precision in ("ieee", "none")
        else:
            assert torch.get_float32_matmul_precision() == "highest"
    assert precision_flags() == precision
    with pytest.raises(KeyError), full_precision(torch.device(device)):
        raise KeyError
    assert precision_flags() == precision


def test_full_precision_lets_a_broader_field_go_on_ruling():
    rule = field("fp32_precision", "tf32")
    try:
        rule()
        with full_precision(torch.device("cpu")):
            pass
        field("fp32_precision", "ieee")()
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        reset_precision()


def test_full_precision_ends_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(torch.device("cpu")):
            assert (torch.eye(2) @ torch.eye(2)).dtype == torch.float32
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16


METHODS = [GradCAM(), SESS(GradCAM(), num_scales=2), SESS(GroupCAM(8), num_scales=1)]


@pytest.mark.parametrize("method", METHODS, ids=["cam", "sess", "group"])
def test_methods_run_under_any_precision_and_give_every_flag_back(method, precision, tiny, images):
    maps = method(tiny, images, torch.tensor([2, 0]))
    assert precision_flags() == precision
    assert maps.amax((1, 2)).tolist() == pytest.approx([1, 1])


@pytest.fixture
def waited_for(monkeypatch):
    """The devices that were synchronised."""
    devices = []
    monkeypatch.setattr(torch.accelerator, "synchronize", devices.append)
    return devices


def test_nothing_is_waited_for_without_an_accelerator(monkeypatch, waited_for):
    def raise_as_torch_26():
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", raise_as_torch_26)
    wait_for("cpu")
    assert waited_for == []


def test_only_the_accelerator_is_waited_for(monkeypatch, waited_for):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    wait_for("cpu")
    wait_for(torch.device("mps", 0))
    assert waited_for == [torch.device("mps", 0)]
