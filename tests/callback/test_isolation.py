import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

from holdings import HOLDINGS
from isolation import Ledger, difference
from lightning_models import Classifier, Recorder, fit, small_net, squares
from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import GradCAM

# beartype's checks of lists draw from Python's generator.
pytestmark = pytest.mark.usefixtures("unchecked")


def moving_average():
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("Lightning has it since 2.6")
    return callbacks.EMAWeightAveraging(decay=0.5)


class Attentive(Classifier):
    def __init__(self):
        super().__init__()
        self.net = VisionTransformer(32, 8, 2, 2, 16, 32, dropout=0.1, num_classes=4)
        nn.init.normal_(self.net.heads.head.weight)  # Zeros as it comes.


class PartlyFrozen(Classifier):
    def __init__(self):
        super().__init__()
        self.net[:3].requires_grad_(False)

    def on_train_epoch_start(self):
        self.net[1].eval()

    def on_validation_model_train(self):
        self.train()
        self.net[1].eval()


class WithoutGradients(Classifier):
    """Runs its first half under no_grad."""

    def forward(self, images):
        with torch.no_grad():
            features = self.net[:3](images)
        return self.net[3:](features)


class Checkpointed(Classifier):
    def forward(self, images):
        return self.net[3:](checkpoint(self.net[:3], images, use_reentrant=False))


class ChannelsLast(Classifier):
    def __init__(self):
        super().__init__()
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return super().forward(images.contiguous(memory_format=torch.channels_last))


class CompiledNet(Classifier):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(small_net(), backend="eager")


class Accumulating(Classifier):
    """Optimises by hand, as GANs do."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def compiled():
    if torch.__version__ < "2.7":
        pytest.skip("torch 2.6 fails to compile Lightning's log, with and without the callback")
    return torch.compile(Classifier(), backend="eager")


class TwoLoaders(Classifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


class Holding(Classifier):
    """Holds what its forward changes."""

    def __init__(self, kinds):
        super().__init__()
        self.changes = [HOLDINGS[kind][1] for kind in kinds]
        self.held = [HOLDINGS[kind][0]() for kind in kinds]

    def forward(self, images):
        for held, change in zip(self.held, self.changes, strict=True):
            change(held)
        return super().forward(images)


class Late(Classifier):
    """Writes to a parameter behind autograd's back, but not yet in its first epoch."""

    def forward(self, images):
        if not self.training and self.current_epoch > 0:
            self.net[0].weight.data.mul_(1.001)
        return super().forward(images)


class Watched(Classifier):
    """Its user watches a part of it by hooks that keep what they see beside it."""

    def __init__(self):
        super().__init__()
        seen = {"images": 0, "means": []}
        Watched.held = seen  # Not the model's own.
        self.net[0].register_forward_pre_hook(
            lambda _, inputs: seen.update(images=seen["images"] + len(inputs[0]))
        )
        self.net[0].register_forward_hook(lambda *call: seen["means"].append(call[2].mean().item()))


def holding(*kinds, **options):
    return partial(Holding, kinds), {"max_epochs": 1, **options}


CASES = {
    "batch norm and dropout": (Classifier, {}),
    "a vision transformer": (Attentive, {}),
    "partly frozen, batch norm in eval": (PartlyFrozen, {}),
    "accumulated gradients, validation amidst": (
        Classifier, {"accumulate_grad_batches": 3, "val_check_interval": 2},
    ),
    "manual optimisation": (Accumulating, {"val_check_interval": 2, "max_epochs": 1}),
    "stochastic weight averaging": (
        Classifier, {"max_epochs": 3, "others": lambda: [callbacks.StochasticWeightAveraging(0.01, 1)]},
    ),
    "exponential moving average": (Classifier, {"others": lambda: [moving_average()]}),
    "64-true": (Classifier, {"precision": "64-true"}),
    "bf16-mixed": (Classifier, {"precision": "bf16-mixed"}),
    "bf16-true": (Classifier, {"precision": "bf16-true"}),
    "a compiled network": (CompiledNet, {}),
    "a compiled module": (compiled, {}),
    "channels last": (ChannelsLast, {}),
    "activation checkpointing": (Checkpointed, {}),
    "a backbone under no_grad": (WithoutGradients, {}),
    "anomaly detection, deterministic": (Classifier, {"detect_anomaly": True, "deterministic": True}),
    "validation every second epoch": (Classifier, {"check_val_every_n_epoch": 2}),
    "no sanity check, limited validation": (
        Classifier, {"num_sanity_val_steps": 0, "limit_val_batches": 2},
    ),
    "fast dev run": (Classifier, {"fast_dev_run": 2}),
    "two loaders": (TwoLoaders, {"val": lambda: [squares(8), squares(8)]}),
    "no logger": (Classifier, {"logger": lambda folder: False}),
    "two loggers": (Classifier, {"logger": lambda folder: [Recorder(), CSVLogger(folder)]}),
    "buffers and data": holding("batch norm on buffers, data and parameters without gradients"),
    "data that only later epochs write": (Late, {"max_epochs": 3}),
    "gradients of a forward": holding("gradients", inference_mode=False),
    "lists": holding("a list", "a list of tensors", "a list with attributes"),
    "dicts": holding("nested dicts", "a defaultdict", "a Counter", "an order"),
    "sets, deques and bytes": holding("a set", "a deque", "bytes", "an array of Python's"),
    "arrays": holding("an array", "an array of objects"),
    "torch's generator": holding("torch's generator"),
    "NumPy's generators": holding("NumPy's generator", "NumPy's old generator"),
    "Python's generator": holding("Python's generator"),
    "objects in a cycle": holding("a plain object in a cycle"),
    "slots and dataclasses": holding("slots", "a frozen dataclass"),
    "a closure": holding("a closure"),
    "a module in a box": holding("a module in a box"),
    "a metric": holding("a metric"),
    "a user's hooks": (Watched, {"max_epochs": 1}),
    "odd tensors": holding("tensors in a tuple", "a sparse tensor", "a resized tensor"),
}  # fmt: skip


def train(folder, case, *callbacks):
    """Fit, and return the ledger and the Trainer."""
    make, options = CASES[case]
    options = {"max_epochs": 2, **options}
    ledger, others = Ledger(), options.pop("others", list)()
    if "logger" in options:
        options["logger"] = options["logger"](folder)
    if "val" in options:
        options["val"] = options["val"]()
    module = make
    if not isinstance(make, type):
        torch.manual_seed(0)
        module = make()
    its = fit(folder, *others, *callbacks, ledger, module=module, **options)
    return ledger, its


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("unchecked")  # The run-time checks of types draw from Python's generator.
def test_nothing_that_a_training_holds_differs_with_the_callback(tmp_path, case):
    without, _ = train(tmp_path / "without", case)
    method = SESS(GradCAM(), num_scales=2)
    mine = (
        SESSCallback(method, num_samples=4, on_error="raise"),
        SESSCallback(GradCAM(), num_samples=2, on_error="raise", prefix="sess2"),
    )
    ledger, its = train(tmp_path / "with", case, *mine)
    assert difference(ledger, without) == []
    assert len(ledger.pages) > 8
    assert math.isfinite(its.callback_metrics["sess/overall"])
    assert its.callback_metrics["sess/n"] == 4
    assert its.callback_metrics["sess2/n"] == 2
    assert its.callback_metrics["sess/failed"] == its.callback_metrics["sess2/failed"] == 0


MEDDLING = {
    "torch's generator": lambda trainer, module: torch.rand(1),
    "numpy's generator": lambda trainer, module: np.random.rand(),  # noqa: NPY002
    "python's generator": lambda trainer, module: random.random(),
    "net mode": lambda trainer, module: module.net.train(),
    "net.0.weight": lambda trainer, module: module.net[0].weight.data.mul_(1.001),
    "net.0.weight gradient": lambda trainer, module: module(torch.rand(1, 3, 32, 32)).sum().backward(),
    "net.0.weight requires gradient": lambda trainer, module: module.net[0].requires_grad_(False),
    "net.1.running_mean": lambda trainer, module: module.net[1].running_mean.add_(1),
    "net.0 hooks": lambda trainer, module: module.net[0].register_forward_hook(lambda *_: None),
    "net.0 attributes": lambda trainer, module: setattr(module.net[0], "mark", 1),
    "metric val_loss": lambda trainer, module: module.log("val_loss", 7.0),
    "0 0 lr": lambda trainer, module: trainer.optimizers[0].param_groups[0].update(lr=1.0),
    "0 0 0 momentum_buffer": lambda trainer, module: [
        state["momentum_buffer"].mul_(2) for state in trainer.optimizers[0].state.values()
    ],
    "held": lambda trainer, module: setattr(module, "held", [torch.ones(1)]),
    "attention's fast path": lambda trainer, module: torch.backends.mha.set_fastpath_enabled(False),
    "autocast cache": lambda trainer, module: torch.set_autocast_cache_enabled(False),
}


@pytest.mark.parametrize("name", MEDDLING)
def test_the_ledger_notices_who_meddles(tmp_path, name):
    class Meddler(Ledger):
        def on_validation_batch_end(self, trainer, module, *args):
            with torch.enable_grad():
                MEDDLING[name](trainer, module)
            super().on_validation_batch_end(trainer, module, *args)

    def pages(ledger):
        fit(tmp_path, ledger, num_sanity_val_steps=0)
        return ledger

    try:
        found = difference(pages(Meddler()), pages(Ledger()))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        torch.set_autocast_cache_enabled(True)
    assert any(line.endswith(f": {name}") for line in found)
