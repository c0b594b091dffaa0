"""A small net and what it is shown."""

import pytest
import torch

from formula import picture
from lightning_models import filled_net


@pytest.fixture
def model():
    return filled_net()


@pytest.fixture
def images():
    return torch.stack([picture(32, 32, i) for i in range(6)])


@pytest.fixture
def boxes():
    return [torch.tensor([[4.0 * i, 4, 4 * i + 6, 12]]) for i in range(6)]
