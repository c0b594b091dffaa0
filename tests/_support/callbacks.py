"""Callbacks, saliency methods and modules that several tests of the callback share."""

import random
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from lightning.pytorch import Callback
from torchmetrics import MeanMetric

from lightning_models import Classifier, Knowing
from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import GradCAM
from sess_lightning.reporting.sink import Sink
from sess_lightning.scores import SCORES
from sess_lightning.types import Explanation, SaliencyMethod

WORST = {score.key: score.worst for score in SCORES.values() if score.worst is not None}
QUICK = SESS(GradCAM(), num_scales=2)


PICKED = [0, 6, 8, 15]
"""Which of 16 samples in batches of 4 are explained when there are to be 4."""


@dataclass(frozen=True)
class Spy(SaliencyMethod):
    """Costs nothing and remembers the pictures and targets it was asked to explain."""

    images: list = field(default_factory=list, compare=False, repr=False)
    targets: list = field(default_factory=list, compare=False, repr=False)
    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        self.images.extend(images.clone())
        self.targets.extend(targets.tolist())
        return Explanation(images[:, 0].clamp(0, 1), torch.ones(len(images)))

    def indices(self, data):
        """Where in a data set the pictures are from, in the order they came."""
        known = {data[i][0].flatten().sum().item(): i for i in range(len(data))}
        return [known[image.flatten().sum().item()] for image in self.images]


@dataclass(frozen=True)
class Broken(SaliencyMethod):
    """Draws from every generator, then fails from call ``since`` on, but for those from ``until`` on."""

    since: int = 0
    until: int = 10**6
    error: type = RuntimeError
    calls: list = field(default_factory=list, compare=False)

    def explain(self, model, images, targets):
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        self.calls.append(1)
        if self.since < len(self.calls) <= self.until:
            raise self.error("out of luck")
        return Explanation(images[:, 0].clamp(0, 1), torch.ones(len(images)))


def quick(**kwargs):
    """A callback that costs next to nothing; errors are not swallowed."""
    options = {"method": QUICK, "num_samples": 4, "compare": {"base": GradCAM()}, "on_error": "raise"}
    return SESSCallback(**{**options, **kwargs})


def spying(**kwargs):
    spy = Spy()
    return quick(method=spy, compare={}, **kwargs), spy


def numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


class Apart(Classifier):
    """Validates without its own forward, and counts the images that explanations send through it.

    On the class, since what an instance or a hook counts is given back.
    """

    images = 0

    def forward(self, images):
        Apart.images += len(images)
        return super().forward(images)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 0.5, batch_size=1)


class Watch(Callback):
    """Notes what other callbacks find at the end of each validation."""

    def __init__(self, key="sess/overall"):
        self.key, self.found = key, []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.found.append(trainer.callback_metrics[self.key].item())


class Talkative(Classifier):
    """Logs from its forward, and keeps a metric and a counter there."""

    def __init__(self):
        super().__init__()
        self.brightness = MeanMetric()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        self.brightness.update(images.mean())
        if self._trainer is not None:
            self.log("brightness", self.brightness)
            self.log_dict({"calls": self.calls.item()})
        return super().forward(images)


class Shelf(Sink):
    """Keeps what it is given."""

    name = "shelf"

    def __init__(self):
        self.shown, self.drawn = [], []

    def write(self, report):
        self.shown.append((report.key("panel"), report.when, report.panels))
        self.drawn.append((report.key("curves"), report.when, report.labelled_curves()))


class Watched(Knowing):
    """Its accuracy is known as late as at the end of its own epoch, and rises from run to run."""

    accuracy = 0.4

    def on_validation_epoch_end(self):
        self.accuracy = min(1.0, self.accuracy + 0.2)
        self.log("val_acc", self.accuracy)


@dataclass(frozen=True)
class Straying(SaliencyMethod):
    """Points at the bright square for ``loyal`` images, then at all the rest."""

    loyal: int = 16
    asked: list = field(default_factory=list, compare=False, repr=False)
    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        maps = images.amax(1).clamp(0, 1) > 0.9
        if len(self.asked) >= self.loyal:
            maps = ~maps
        self.asked.extend(targets.tolist())
        return Explanation(maps.float(), torch.ones(len(images)))


def straying(**kwargs):
    return quick(**{"method": Straying(), "num_samples": 16, "compare": {}, **kwargs})
