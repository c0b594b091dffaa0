"""Nothing between the images and the maps waits for the device: shown without one.

The meta device has shapes and no values: whatever reads a value, or needs one for a shape, fails there. The
spy fails on the operators that do so, on any device.
"""

import pytest
import torch
from torchvision.models import resnet18

from formula import picture
from sess_lightning.methods import SESS, CentreGaussian, GradCAM, GroupCAM, GuidedBackprop, RandomMap

METHODS = [
    GradCAM("layer4"),
    GuidedBackprop(),
    GroupCAM(4, "layer4"),
    CentreGaussian(),
    RandomMap(),
    SESS(GradCAM("layer4"), num_scales=3, prefilter_ratio=0.5),
    SESS(GradCAM("layer4"), num_scales=3, theta=0.2, fusion="max", smoothing=True),
    SESS(GuidedBackprop(), num_scales=2, prefilter_ratio=0.5),
    SESS(GroupCAM(4, "layer4"), num_scales=2, prefilter_ratio=0.5),
    SESS(GradCAM("layer4"), num_scales=3, prefilter_ratio=0.5, coarse_to_fine=0.5),
]
method_cases = pytest.mark.parametrize("method", METHODS, ids=lambda method: repr(method)[:30])


@method_cases
@pytest.mark.parametrize("size", [(64, 64), (64, 90)], ids=["square", "wide"])
def test_on_a_device_without_values(method, size, sync_spy):
    with torch.device("meta"):
        model = resnet18(num_classes=5)
        images, targets = torch.empty(2, 3, *size), torch.zeros(2, dtype=torch.long)
    with sync_spy:
        maps, scores = method.explain(model, images, targets)
    assert (maps.shape, maps.device.type, maps.dtype) == ((2, *size), "meta", torch.float32)
    assert (scores.shape, scores.device.type, scores.dtype) == ((2,), "meta", torch.float32)


@method_cases
def test_no_operator_makes_a_host_wait(method, sync_spy):
    model = resnet18(num_classes=5)
    images = torch.stack([picture(64, 90, 1), picture(64, 90, 2)])
    with sync_spy:
        method(model, images, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: x.long().bincount(),
        lambda x: x.to("meta"),
        lambda x: torch.empty(3, device="meta").copy_(x),
    ],
)
def test_the_spy_sees_what_waits(waits, sync_spy):
    with pytest.raises(pytest.fail.Exception, match="makes the host wait"), sync_spy:
        waits(torch.ones(3))
