"""A classifier, its pictures and a Trainer, as small as they can be."""

import random
from functools import cache
from itertools import cycle

import numpy as np
import torch
from lightning.fabric.utilities import registry
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from formula import fill, uniform

# Other processes share the cores: threads that wait for one another make small models ten times slower.
torch.set_num_threads(1)

# Every Trainer looks through all that is installed for callbacks of other packages: once is enough.
registry.entry_points = cache(registry.entry_points)

COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
MEAN, STD = [0.25, 0.5, 0.5], [0.5, 0.25, 0.5]


def small_net(classes=4):
    """32 px -> 8 x 8 features of 16 channels -> logits."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, classes),
    )  # fmt: skip


def filled_net(classes=4):
    """The same with weights from exact arithmetic, in eval mode."""
    return fill(small_net(classes))


class Counter:
    """Counts the images that pass through a model."""

    def __init__(self, model):
        self.images = 0
        model.register_forward_hook(self._count)

    def _count(self, _model, inputs, _output):
        self.images += len(inputs[0])


def gathered(metrics):
    """Return the first metric as if each of them lived in a process of its own, which it gathers from.

    Collectives demand that all processes send the same number of tensors, of one kind and rank.
    """
    sent = []
    for metric in metrics:
        sent.append([])
        metric.sync(
            lambda tensor, group: [sent[-1].append(tensor) or tensor], distributed_available=lambda: True
        )
        metric.unsync()
    kinds = [[(tensor.dtype, tensor.shape[1:]) for tensor in each] for each in sent]
    assert all(each == kinds[0] for each in kinds), kinds
    answers = cycle(zip(*sent, strict=True))
    metrics[0].dist_sync_fn = lambda tensor, group: list(next(answers))
    metrics[0].distributed_available_fn = lambda: True
    return metrics[0]


class Squares(Dataset):
    """A coloured square on a dim noisy ground; the class is its colour, ``read`` makes the sample."""

    classes = ("red", "green", "blue", "yellow")
    mean, std = MEAN, STD

    def __init__(self, count, read, size=32, side=12):
        self.count, self.read, self.size, self.side = count, read, size, side

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label, size, side = index % 4, self.size, self.side
        x0, y0 = (7 * index) % (size - side), (11 * index) % (size - side)
        image = 0.2 * torch.from_numpy(uniform(3 * size * size, 100 + index)).reshape(3, size, size)
        image[:, y0 : y0 + side, x0 : x0 + side] += COLOURS[label].view(3, 1, 1)
        return self.read(index, image, torch.tensor(label), torch.tensor([[x0, y0, x0 + side, y0 + side]]))


def pair(index, image, label, boxes):
    """(image, label): what most people have."""
    return image, label


def boxed(index, image, label, boxes):
    """(image, dict of label and boxes)."""
    return image, {"label": label, "boxes": boxes.float()}


def squares(count=16, read=pair, batch_size=4, shuffle=False, **kwargs):
    return DataLoader(Squares(count, read, **kwargs), batch_size, shuffle=shuffle)


class SquaresData(LightningDataModule):
    """16 squares with their boxes, for Lightning's command line."""

    def val_dataloader(self):
        return squares(read=boxed)


class Classifier(LightningModule):
    """A stock LightningModule: logits from ``forward``, nothing made for explanations."""

    def __init__(self, classes=4):
        super().__init__()
        self.net = small_net(classes)

    def forward(self, images):
        return self.net(images)

    def loss(self, batch):
        images, targets = batch
        labels = targets["label"] if isinstance(targets, dict) else targets
        return nn.functional.cross_entropy(self(images), labels)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Knowing(Classifier):
    """Knows the colours, trained or not: classifies every square right."""

    def forward(self, images):
        away = images.amax((2, 3))[:, None] - COLOURS.to(images)
        return super().forward(images) - 99 * away.square().sum(2)


class Recorder(DummyLogger):
    """Keeps the rows that Lightning logs; as a stand-in logger it gets no pictures."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({**metrics, "step": step})

    def of(self, key):
        """Return every value of a key, in order."""
        return [row[key] for row in self.rows if key in row]


def trainer(folder, *callbacks, logger=None, **kwargs):
    """A silent Trainer without pictures, unless a logger is given."""
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": Recorder() if logger is None else logger,
        "callbacks": list(callbacks),
        "max_epochs": 1,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
    }
    return Trainer(**{**options, **kwargs})


def fit(folder, *callbacks, module=Classifier, train=None, val=None, ckpt_path=None, **kwargs):
    """Fit a classifier on 16 squares, shuffled, and validate it on the same in order.

    How it leaves the global generators is noted on the Trainer.
    """
    seed_everything(0, verbose=False)
    its = trainer(folder, *callbacks, **kwargs)
    its.fit(
        _made(module),
        squares(shuffle=True) if train is None else train,
        squares() if val is None else val,
        ckpt_path=ckpt_path,
    )
    its.generators = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.random.get_state()[2]),  # noqa: NPY002
        "python": torch.tensor(random.getstate()[1]),
    }
    return its


def validate(folder, *callbacks, module=Classifier, val=None, **kwargs):
    """Validate a classifier on 16 squares."""
    seed_everything(0, verbose=False)
    its = trainer(folder, *callbacks, **kwargs)
    its.validate(_made(module), squares() if val is None else val, verbose=False)
    return its


def _made(module):
    # A class is called here, where the seed is set.
    return module() if isinstance(module, type) else module
