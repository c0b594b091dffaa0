"""What accelerators get of code of their own, shown without one: copies, window cutting, curves."""

import pytest
import torch
from torch import nn

from every_method import ON_DEVICE, made
from formula import Tiny, fill, picture
from isolation import Ledger, difference
from lightning_models import fit
from on_a_device import as_on_a_device
from sess_lightning import SESS, GradCAM, SESSCallback, SESSMetric
from sess_lightning.methods import CentreGaussian, RandomMap

IMAGES = torch.stack([picture(64, 64, 1), picture(64, 64, 2)])
TARGETS = torch.tensor([0, 1])


class Counting(Tiny):
    """Writes to a buffer and a parameter in its forward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("forwards", torch.zeros(()))
        self.last = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, images):
        self.forwards += 1
        self.last.data.copy_(images.detach().mean((0, 2, 3)))
        return super().forward(images)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_maps_are_those_of_a_cpu_and_the_model_is_given_back(name):
    method, model = made(name), fill(Counting())
    expected = method.explain(model, IMAGES, TARGETS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with as_on_a_device():
        maps, scores = method.explain(model, IMAGES, TARGETS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(maps, expected.maps, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores, expected.scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["none", "boxes", "masks"])
def test_scores_are_those_of_a_cpu(kind):
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 9:30, 20:50] = True
    regions = {"none": None, "masks": masks, "boxes": [torch.tensor([[20.0, 9, 50, 30]])] * 2}[kind]
    compare = {"base": GradCAM(), "random": RandomMap(), "centre": CentreGaussian()}

    def scored():
        metric = SESSMetric(SESS(GradCAM(), num_scales=3), compare=compare)
        metric.update(fill(Tiny()), IMAGES, TARGETS, regions, numbers=[0, 1])
        return metric.compute()

    expected = scored()
    with as_on_a_device():
        assert scored() == pytest.approx(expected, abs=1e-4, nan_ok=True)


@pytest.mark.usefixtures("unchecked")
def test_a_training_is_the_same_with_and_without_the_callback(tmp_path):
    with as_on_a_device():
        without, its = Ledger(), Ledger()
        fit(tmp_path / "without", without)
        fit(tmp_path / "with", SESSCallback(SESS(GradCAM(), num_scales=2), on_error="raise"), its)
    assert difference(its, without) == []
    assert len(its.pages) > 4
