from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sess_lightning.introspection.footprints import read_grid
from sess_lightning.introspection.layers import find_grid
from sess_lightning.introspection.sizes import input_window


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((1, 512, 7, 7), (224, 224), ("channels", 7, 7, 512, 0)),
        ((1, 7, 7, 768), (224, 224), ("channels_last", 7, 7, 768, 0)),
        ((1, 197, 768), (224, 224), ("tokens", 14, 14, 768, 1)),
        ((1, 198, 192), (224, 224), ("tokens", 14, 14, 192, 2)),
        ((1, 201, 384), (224, 224), ("tokens", 14, 14, 384, 5)),
        ((1, 196, 384), (224, 224), ("tokens", 14, 14, 384, 0)),
        ((1, 50, 768), (224, 224), ("tokens", 7, 7, 768, 1)),
        ((1, 257, 1024), (224, 224), ("tokens", 16, 16, 1024, 1)),
        ((1, 393, 768), (224, 448), ("tokens", 14, 28, 768, 1)),
        ((1, 392, 768), (448, 224), ("tokens", 28, 14, 768, 0)),
        ((1, 7, 14, 768), (224, 448), ("channels_last", 7, 14, 768, 0)),
        ((1, 512, 5, 8), (150, 225), ("channels", 5, 8, 512, 0)),
        ((1, 24, 7, 7), (32, 32), ("channels", 7, 7, 24, 0)),
        ((1, 7, 7, 24), (32, 32), ("channels_last", 7, 7, 24, 0)),
        ((1, 64, 32, 32), (32, 32), ("channels", 32, 32, 64, 0)),
        ((1, 512, 1, 2), (32, 64), ("channels", 1, 2, 512, 0)),
    ],
)
def test_a_shape_is_read_as_a_grid(shape, size, expected):
    grid = find_grid(torch.Size(shape), size)
    assert (grid.layout, grid.height, grid.width, grid.channels, grid.extra) == expected
    features = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    maps = grid.to_maps(features)
    assert maps.shape == (1, grid.channels, grid.height, grid.width)
    places = features.flatten(2).mT if grid.layout == "channels" else features.flatten(1, -2)
    assert torch.equal(maps.flatten(2).mT, places[:, grid.extra :])


@pytest.mark.parametrize(
    "shape",
    [
        (1, 512, 1, 1),
        (1, 1000),
        (1,),
        (1, 12, 197, 64),
        (1, 512, 300, 300),
        (1, 1, 512),
        (1, 2, 3, 4, 5),
        (1, 1, 49, 512),
    ],
)
def test_a_shape_that_lies_on_no_grid(shape):
    assert find_grid(shape, (224, 224)) is None


def stating(**attributes):
    model = nn.Module()
    vars(model).update(attributes)
    return model


@pytest.mark.parametrize(
    ("attributes", "window"),
    [
        ({"config": SimpleNamespace(image_size=384)}, 384),
        ({"config": SimpleNamespace(image_size=[224, 224])}, 224),
        ({"pretrained_cfg": {"fixed_input_size": True, "input_size": (3, 256, 256)}}, 256),
        ({"pretrained_cfg": {"fixed_input_size": False, "input_size": (3, 256, 256)}}, None),
        ({"encoder": nn.Identity(), "image_size": 112}, 112),
        ({"image_size": 112}, None),
        ({"config": {"image_size": 7}}, None),
        ({}, None),
    ],
)
def test_the_size_a_model_was_built_for_is_read_where_it_says_so(attributes, window):
    assert input_window(stating(**attributes)) == window
    wrapper = nn.Module()
    wrapper.model = stating(**attributes)
    assert input_window(wrapper) == window


@pytest.mark.parametrize("seed", [7, 17])
def test_tokens_of_scattered_pixels_are_no_grid_though_a_reading_fits_some_by_chance(seed):
    chance = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, 64, 64, generator=chance).requires_grad_()
    pixels = image[0].flatten(1)[:, torch.randint(64 * 64, (64,), generator=chance)]
    tokens = torch.einsum("cn, nkc -> nk", pixels, torch.randn(64, 32, 3, generator=chance))[None]
    assert read_grid(tokens, image) is None
