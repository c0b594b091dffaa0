"""What only a CUDA device can show; ``make test-gpu``."""

import copy

import pytest
import torch
from torchvision.models import resnet18

from formula import picture
from sess_lightning.callback.gallery import Exhibit
from sess_lightning.methods import SESS, GradCAM, GroupCAM, GuidedBackprop
from sess_lightning.metrics.functional import deletion_curve, insertion_curve
from sess_lightning.ops import wait_for
from sess_lightning.types import Batch

METHODS = [
    GradCAM("layer4"),
    GuidedBackprop(),
    GroupCAM(4, "layer4"),
    SESS(GradCAM("layer4"), num_scales=3, prefilter_ratio=0.5, batch_size=8),
    SESS(GuidedBackprop(), num_scales=2, prefilter_ratio=0.5, batch_size=8),
]
method_cases = pytest.mark.parametrize("method", METHODS, ids=str)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def given():
    torch.manual_seed(0)
    model = resnet18(num_classes=5).eval()
    images = torch.stack([picture(64, 90, 1), picture(64, 90, 2)])
    targets = torch.tensor([0, 1])
    there = copy.deepcopy(model).cuda(), images.cuda(), targets.cuda()
    return (model, images, targets), there


@pytest.fixture
def waiting_is_an_error():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@method_cases
def test_a_gpu_gives_the_maps_of_a_cpu(method, given):
    here, there = given
    maps = method(*there)
    assert maps.device.type == "cuda"
    assert (maps.cpu() - method(*here)).abs().mean() < 0.01


@method_cases
def test_nothing_waits_for_the_device(method, given, waiting_is_an_error):
    _, there = given
    method(*there)  # What follows from the size alone is sent there once.
    waiting_is_an_error()
    method(*there)


@pytest.mark.parametrize("curve", [insertion_curve, deletion_curve])
def test_no_curve_waits_for_the_device(curve, given, waiting_is_an_error):
    _, (model, images, targets) = given
    maps = torch.rand(2, 64, 90, device="cuda")
    waiting_is_an_error()
    curve(model, images, maps, targets, steps=4, batch_size=4)


def test_a_panels_maps_are_whole_once_their_device_has_been_waited_for():
    maps = torch.rand(512, 512, device="cuda")
    for _ in range(3):
        sent = Exhibit(Batch(torch.zeros(1, 3, 2, 2), torch.tensor([0])), {"SESS": maps * 2}, maps[0]).sent()
        wait_for("cuda")
        assert sent.maps["SESS"].is_pinned()
        assert torch.equal(sent.maps["SESS"], maps.cpu() * 2)


def test_a_batch_is_whole_once_it_is_back_on_the_host():
    images = torch.rand(64, 3, 512, 512)
    for _ in range(3):
        back = Batch(images.cuda() * 2, torch.zeros(64, dtype=torch.long)).to("cpu")
        assert torch.equal(back.images, images * 2)
