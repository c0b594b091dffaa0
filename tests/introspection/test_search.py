"""Layers are found, and their features read, by what hangs on what: each odd model beside its plain twin."""

import pytest
import torch
from torch import nn

from formula import picture
from odd_models import (
    Adapted,
    ClassToken,
    Flattened,
    Planes,
    Queries,
    Recurrent,
    Tokens,
    Views,
    cropped,
    padded,
    squared,
)
from sess_lightning.introspection import Grid, OnGrid, find_target_layer, read_features
from sess_lightning.methods import SESS, GradCAM, HiResCAM, LayerCAM, PytorchGradCAM
from sess_lightning.methods.evidence import layer_evidence
from sess_lightning.methods.excitation import ExcitationBackprop


def square(stream=1):
    return picture(64, 64, stream)[None]


def name_of(model, layer):
    return next(name for name, module in model.named_modules() if module is layer)


def grid_of(model, layer=None, images=None):
    (grid,) = read_features(model, layer, square() if images is None else images)[2].grids.values()
    return grid


def explained(model, images, layer=None):
    """Maps of every class on the layer's own grid: what a twin must equal."""
    targets = torch.arange(5)
    features, gradients, logits = layer_evidence(model, layer, images.repeat(5, 1, 1, 1), targets)
    return (features * gradients).sum(1), logits


def assert_twins(one, other, layer=None, images=None, others=None):
    images = square() if images is None else images
    expected, got = (
        explained(other, images if others is None else others, layer),
        explained(one, images, layer),
    )
    assert expected[0].abs().amax() > 1e-4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # Sums in another order.


@pytest.mark.parametrize("layer", [None, "norm", "blocks.0"])
@pytest.mark.parametrize(("before", "behind"), [(1, 4), (0, 1), (0, 5), (5, 0), (25, 0), (1, 30)])
def test_tokens_of_no_place_may_stand_anywhere(before, behind, layer):
    model, plain = Tokens(before, behind), Tokens(before + behind)
    grid = grid_of(model, layer)
    assert (grid.height, grid.width, grid.extra, grid.after) == (8, 8, before, behind)
    assert_twins(model, plain, layer)


@pytest.mark.parametrize("layer", [None, "norm", "blocks.0"])
def test_tokens_may_come_before_the_batch(layer):
    assert grid_of(Tokens(sequence_first=True), layer).layout == "sequence_first"
    assert_twins(Tokens(sequence_first=True), Tokens(), layer)


def test_tokens_may_have_their_channels_first():
    model = Flattened()
    plain = nn.Sequential(model.patches, nn.GELU(), nn.Conv2d(24, 24, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), model.head)  # fmt: skip
    plain[2].weight.data, plain[2].bias.data = model.mix[1].weight[..., None].data, model.mix[1].bias.data
    assert grid_of(model).layout == grid_of(model, "mix").layout == "tokens_last"
    maps, expected = explained(model, square())[0], explained(plain, square())[0]
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("net", [Tokens, Planes])
@pytest.mark.parametrize("size", [(48, 96), (96, 64), (64, 160), (32, 32)])
def test_a_model_may_square_the_image_inside(net, size):
    image = picture(*size, 1)[None]
    assert_twins(net(view=squared), net(), images=image, others=squared(image))
    for layer in (None, "norm" if net is Tokens else "features"):
        maps = SESS(GradCAM(layer), num_scales=2)(net(view=squared), image, torch.tensor([0]))
        assert maps.shape == (1, *size)


@pytest.mark.parametrize("layer", [None, "features", "features.0"])
@pytest.mark.parametrize("channels", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 128), (128, 64), (128, 128)])
def test_strides_may_differ_by_axis(size, channels, layer):
    model = Planes((2, 4), channels)
    grid, image = grid_of(model, layer, picture(*size, 1)[None]), picture(*size, 1)[None]
    rows, columns = (size[0] // 2, size[1] // 4) if layer == "features.0" else (size[0] // 4, size[1] // 16)
    assert (grid.layout, grid.height, grid.width) == ("channels", rows, columns)
    maps = HiResCAM(layer)(model, image, torch.tensor([1]))
    assert maps.shape == (1, *size)


@pytest.mark.parametrize(("net", "named"), [(Queries, "norm"), (Queries, "attention"), (Recurrent, "cell")])
def test_what_has_no_places_is_passed_over_and_refused_by_name(net, named):
    model, target = net(), torch.tensor([1])
    assert name_of(model, find_target_layer(model, square())) == "patches"
    with pytest.raises(ValueError, match=r"lie on no grid over.*leave it out to have one found"):
        GradCAM(named)(model, square(), target)
    assert GradCAM()(model, square(), target).isfinite().all()  # The remedy.


FLIPS = {
    "mirrored": lambda images: images.flip(3),
    "upside down": lambda images: images.flip(2),
    "turned": lambda images: images.mT.flip(3),
}


@pytest.mark.parametrize("layer", ["net.norm", "net.features", None])
@pytest.mark.parametrize("view", FLIPS.values(), ids=FLIPS)
def test_views_of_an_image_are_summed_where_they_lie(view, layer):
    net = Tokens() if layer == "net.norm" else Planes()
    model = Views(net, lambda images: images, view)
    maps = explained(model, square(), layer)[0]
    one, other = (explained(net, each, layer and layer[4:])[0] / 2 for each in (square(), view(square())))
    back = {"mirrored": [2], "upside down": [1]}
    name = next(name for name, each in FLIPS.items() if each is view)
    other = other.flip(back[name]) if name in back else other.flip(2).mT
    torch.testing.assert_close(maps, one + other, atol=1e-5, rtol=1e-4)


def test_one_view_may_be_of_another_image_than_the_one_explained():
    reference = square(2)
    model = Views(Planes(), lambda images: images, lambda images: reference.expand_as(images))
    maps, expected = explained(model, square())[0], explained(Planes(), square(), "features")[0] / 2
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [None, "net.features"])
def test_views_of_parts_are_refused(layer):
    model = Views(Planes(), lambda images: images[..., :48, :48], lambda images: images[..., 16:, 16:])
    with pytest.raises(ValueError, match=r"crops, pads or moves the image in its forward.*spans 0% to 7"):
        GradCAM(layer)(model, square(), torch.tensor([1]))


@pytest.mark.parametrize(("views", "hints"), [(2, True), (1, False)])
def test_views_are_suspected_only_where_most_layers_run_several_times(views, hints):
    relu = nn.ReLU()  # Used twice, as in a block of ResNet.
    net = nn.Sequential(nn.Conv2d(3, 4, 64), relu, nn.Conv2d(4, 4, 1), relu, nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(ValueError, match="No layer with spatial features") as caught:
        find_target_layer(Views(net, *[lambda images: images] * views), square())
    assert ("Most layers run 2 times" in str(caught.value)) is hints


def test_views_are_refused_by_packages_that_know_one_layer_call():
    model = Views(Planes(), lambda images: images, FLIPS["mirrored"])
    with pytest.raises(ValueError, match=r"net.features runs on several views"):
        PytorchGradCAM("GradCAM")(model, square(), torch.tensor([1]))


@pytest.mark.parametrize(("net", "layer"), [(Planes, "features"), (Tokens, "norm")])
@pytest.mark.parametrize("view", [cropped, padded])
def test_a_model_that_crops_or_pads_inside_is_refused_and_the_remedy_works(view, net, layer):
    with pytest.raises(
        ValueError, match=r"crops, pads or moves the image in its forward: its first layer, .*spans"
    ):
        GradCAM()(net(view=view), square(), torch.tensor([1]))
    assert GradCAM()(net(), view(square()), torch.tensor([1])).isfinite().all()
    grid = grid_of(net(), layer, view(square()))
    assert GradCAM(OnGrid(layer, grid))(net(view=view), square(), torch.tensor([1])).isfinite().all()


def standardised(images):
    return (images - images.mean((1, 2, 3), keepdim=True)) / images.std((1, 2, 3), keepdim=True)


def inner(images):
    return images[..., 4:-4, 4:-4]


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding"), [(28, 5, 1, 0), (32, 7, 2, 0), (56, 7, 2, 0), (28, 7, 2, 3)]
)
def test_large_kernels_on_small_images_crop_nothing(side, kernel, stride, padding):
    torch.manual_seed(0)
    images, targets = picture(side, side, 2)[None], torch.tensor([1])
    net = nn.Sequential(
        nn.Conv2d(3, 6, kernel, stride, padding), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    assert find_target_layer(net, images) is net[4]  # LeNet-5 and SqueezeNet 1.0 begin like this.
    expected = GradCAM()(net, standardised(images), targets)
    torch.testing.assert_close(GradCAM()(Views(net, standardised), images, targets), expected)
    with pytest.raises(ValueError, match="crops, pads or moves the image in its forward"):
        GradCAM()(Views(net, inner), images, targets)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("names", [("value",), ("query", "key", "value"), ("value", "out")])
def test_an_adapter_without_effect_moves_nothing(names, bare):
    model, plain = ClassToken(), ClassToken()
    for block in model.blocks:
        for name in names:
            block[name] = Adapted(block[name], bare)
    assert name_of(plain, find_target_layer(plain, square())) == "blocks.1.norm"
    assert name_of(model, find_target_layer(model, square())) == "blocks.1.norm"
    assert_twins(model, plain)


def test_a_layer_must_hang_on_the_image():
    class Prompted(Planes):
        """Scores features by prompts, which a text tower gives: it runs last, and knows no image."""

        def __init__(self):
            super().__init__()
            self.register_buffer("prompts", torch.randn(1, 16, 16))
            self.tower = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.eval()

        def forward(self, images):
            features = self.features(images).mean((2, 3))
            return features @ self.tower(self.prompts)[0, :5].T

    model = Prompted()
    assert find_target_layer(model, square()) is model.features
    with pytest.raises(ValueError, match="target_layer TransformerEncoderLayer gives features of shape"):
        GradCAM("tower")(model, square(), torch.tensor([1]))


@pytest.mark.parametrize("method", [GradCAM, LayerCAM, ExcitationBackprop])
def test_a_stated_grid_is_taken_at_its_word(method):
    grid = Grid("tokens", 8, 8, extra=5)
    model, target = Tokens(5), torch.tensor([1])
    stated = method(OnGrid("norm", grid))
    torch.testing.assert_close(stated(model, square(), target), method("norm")(model, square(), target))
    other = method(OnGrid("norm", Grid("tokens", 8, 8, extra=1, after=4)))
    assert not torch.equal(other(model, square(), target), stated(model, square(), target))
    with pytest.raises(ValueError, match="lie on no grid"):
        method(OnGrid("norm", Grid("tokens", 7, 8)))(model, square(), target)


@pytest.mark.parametrize("layer", [None, "norm"])
def test_a_grid_is_checked_once_per_model_and_size(layer):
    model, seen = Tokens(1, 4), []
    model.register_forward_hook(lambda *_: seen.append(1))
    for size, runs in (((64, 64), 2), ((64, 64), 1), ((64, 96), 2), ((64, 64), 1)):
        seen.clear()
        GradCAM(layer)(model, picture(*size, 1)[None], torch.tensor([0]))
        assert len(seen) == runs


def test_a_name_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'features' is unknown.*Did you mean 'net.features'"):
        GradCAM("features")(Views(Planes(), lambda images: images), square(), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"'blocks.O' is unknown.*Did you mean .*'blocks.0'"):
        GradCAM("blocks.O")(Tokens(), square(), torch.tensor([1]))
