import pytest
import torch

from formula import picture
from small_nets import Net, made, maps_of


@pytest.fixture
def images():
    return torch.stack([picture(32, 32, 1), picture(32, 32, 2)])


@pytest.fixture
def expected(images):
    explained = maps_of(made(Net), images)
    assert explained.maps.amax((1, 2)).tolist() == pytest.approx([1, 1])
    return explained
