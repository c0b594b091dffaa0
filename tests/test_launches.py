"""Operations of our own that an accelerator has to launch beside those of the model: each costs its host."""

import sys
from collections import Counter

import pytest
import torch
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet50

from sess_lightning import SESS, GradCAM, SESSMetric
from sess_lightning.methods import CentreGaussian, RandomMap

# The counts are those of torch 2.14; 2.6 to 2.9 split some operations in two, about a tenth more.
OLDER = 1.0 if torch.__version__ >= TorchVersion("2.14") else 1.15
NOT_LAUNCHED = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
    "resize_", "set_", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that are no mere views, apart from those in a model's forward pass."""

    def __init__(self, model):
        super().__init__()
        self.own, self.batches, self._inside = Counter(), [], False
        self._hooks = [model.register_forward_pre_hook(self._enter), model.register_forward_hook(self._leave)]

    def _enter(self, _, inputs):
        self._inside = True
        self.batches.append(len(inputs[0]))

    def _leave(self, *_):
        self._inside = False

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        if not (self._inside or is_view or name in NOT_LAUNCHED):
            frame = sys._getframe(1)
            while frame is not None and "/sess_lightning/" not in frame.f_code.co_filename:
                frame = frame.f_back
            place = frame and f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}"
            self.own[place, name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return resnet50().eval()


def given(count):
    images = torch.empty(count, 3, 224, 224, device="meta")
    boxes = [torch.zeros(2, 4, device="meta") for _ in range(count)]
    return images, torch.zeros(count, dtype=torch.long, device="meta"), boxes


def counted(model, run):
    run()  # What follows from the size alone is computed once.
    with Launches(model) as launches:
        run()
    return launches


@pytest.mark.parametrize(
    ("count", "scales", "batches", "most"), [(1, 6, 1, 69), (8, 6, 2, 83), (8, 12, 8, 149)]
)
def test_sess_launches_little_beside_the_model(model, count, scales, batches, most):
    images, targets, _ = given(count)
    method = SESS(GradCAM("layer4"), num_scales=scales, batch_size=128)
    launches = counted(model, lambda: method(model, images, targets))
    assert len(launches.batches) == batches
    assert launches.own.total() <= most * OLDER, launches.own.most_common()


def test_scoring_launches_little_beside_the_model(model):
    images, targets, boxes = given(8)
    compare = {"base": GradCAM("layer4"), "random": RandomMap(), "centre": CentreGaussian()}
    metric = SESSMetric(SESS(GradCAM("layer4"), batch_size=128), compare=compare, batch_size=128)
    launches = counted(model, lambda: metric.update(model, images, targets, boxes))
    assert sum(launches.batches) == 248 + 8 * (2 + 4 * 54)
    assert launches.own.total() <= 297 * OLDER, launches.own.most_common()
