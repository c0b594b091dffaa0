"""What the model was fed at validation is what its windows look like, whatever a configuration states."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from formula import fill, picture
from lightning_models import Counter, filled_net, validate
from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import GradCAM

LABELS = [1, 0, 3, 2, 1, 0]


class Plain(LightningModule):
    """Convolutions: takes images of any size."""

    def __init__(self, **states):
        super().__init__()
        self.net = filled_net()
        vars(self.net).update(states)

    def forward(self, images):
        return self.net(images)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Direct(Plain):
    """Has no forward: whether it takes images could not be tried by calling it."""

    forward = None

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class Patches(nn.Module):
    """A transformer with a position for each patch of 8 px: takes images of its own size only."""

    def __init__(self, height, width):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.positions = nn.Parameter(torch.zeros(1, height * width // 64, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT + self.positions
        return self.head(self.block(tokens).mean(1))


def run(tmp_path, module, size, method=None, **kwargs):
    data = [(picture(*size, seed), label) for seed, label in enumerate(LABELS)]
    method = SESS(GradCAM(), num_scales=3) if method is None else method
    callback = SESSCallback(method, num_samples=6, num_images=0, report=False, on_error="raise", **kwargs)
    its = validate(tmp_path, callback, module=module, val=DataLoader(data, 3))
    values = {name: value.item() for name, value in its.callback_metrics.items() if name.startswith("sess/")}
    return values, callback


STATES = {
    "a size for pretraining": {"pretrained_cfg": {"fixed_input_size": True, "input_size": (3, 224, 224)}},
    "a configuration": {"config": SimpleNamespace(image_size=518)},
    "a rectangle": {"config": SimpleNamespace(image_size=[64, 24])},
    "torchvision's": {"encoder": nn.Identity(), "image_size": 16},
}


@pytest.mark.parametrize("size", [(32, 32), (32, 48)], ids=["square", "wide"])
@pytest.mark.parametrize("states", STATES.values(), ids=STATES)
@pytest.mark.parametrize("module", [Plain, Direct], ids=lambda module: module.__name__)
def test_a_stated_size_moves_no_figure_of_a_model_that_was_fed_another(module, states, size, tmp_path):
    twin, _ = run(tmp_path / "twin", Plain(), size)
    assert run(tmp_path / "it", module(**states), size)[0] == pytest.approx(twin, abs=1e-6, nan_ok=True)


class OfOneSize(Plain):
    def __init__(self, *size):
        super().__init__()
        self.net = fill(Patches(*size))


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 64)])
def test_a_model_of_one_size_is_explained_in_windows_of_that_shape(size, tmp_path):
    module = OfOneSize(*size)
    counter = Counter(module.net)
    values, callback = run(tmp_path, module, size, max_forwards=2000)
    assert values["sess/n"] == 6
    plan = callback.settings.methods(module)[0].plan(module, size)
    assert plan.window_size == plan.scales[0] == size
    assert counter.images - 6 <= callback.examiner.plan.budget.forwards <= 2000


def test_an_image_of_another_size_in_a_later_batch_has_windows_of_its_own(tmp_path):
    class Both(Plain):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    data = [(picture(32, 32 + 16 * (seed > 2), seed), label) for seed, label in enumerate(LABELS)]
    method = SESS(GradCAM("net.3"), num_scales=2)
    callback = SESSCallback(method, num_samples=6, num_images=0, report=False, on_error="raise")
    its = validate(tmp_path, callback, module=Both(**STATES["a configuration"]), val=DataLoader(data, 3))
    assert its.callback_metrics["sess/n"] == 6
