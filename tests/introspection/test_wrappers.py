import contextlib

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch.nn.parallel import DistributedDataParallel

from sess_lightning import SESS, SESSMetric
from sess_lightning.methods import GradCAM, GuidedBackprop
from small_nets import Net, made

TARGETS = torch.tensor([0, 1])
METHODS = [GradCAM(), GradCAM("features.2"), SESS(GuidedBackprop(), num_scales=2)]


def scored(model, images, method):
    metric = SESSMetric(method)
    metric.update(model, images, TARGETS)
    return metric.compute()


@pytest.mark.filterwarnings("ignore:.*you passed `Fabric.*precision='16-mixed'")
@pytest.mark.parametrize("method", METHODS, ids=["cam", "named", "guided"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_module_of_fabrics_is_explained_inside_and_in_its_precision(precision, method, images):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = made(Net)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    half = torch.autocast("cpu", torch.bfloat16) if "mixed" in precision else contextlib.nullcontext()
    with half:
        expected = scored(model, images, method)
    assert scored(wrapped, images, method) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    loss = wrapped(images).sum()
    if "mixed" in precision:
        with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
            loss.backward(retain_graph=True)
    fabric.backward(loss)
    optimizer.step()


@pytest.fixture
def process():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", [GradCAM(), SESS(GuidedBackprop(), num_scales=2)], ids=["cam", "guided"])
def test_a_module_of_ddp_is_explained_inside_so_that_its_training_goes_on(method, process, images):
    model = made(Net)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        assert scored(wrapped, images, method) == scored(model, images, method)
        # A forward of DDP's own would have made it wait for a backward.
        wrapped(images).sum().backward()
    assert "forward" not in vars(wrapped)
