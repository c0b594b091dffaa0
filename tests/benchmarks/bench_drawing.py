"""How long a training waits for the pictures, tables and page of a run with eight panels of 224 px."""

import logging
import os
import tempfile
import time
import warnings
from functools import partial
from statistics import median

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from measuring import Bench
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader

from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import GradCAM

WAYS = {
    "files": (CSVLogger, False),
    "TensorBoard": (TensorBoardLogger, False),
    "W&B, offline": (partial(WandbLogger, offline=True), False),
    "files and page": (CSVLogger, True),
}


class Timed(SESSCallback):
    """Notes the time of the thread that trains, of the newest run: other processes do not count."""

    seconds = 0.0

    def _show(self, *args):
        self.seconds = -time.thread_time()
        super()._show(*args)
        self.seconds += time.thread_time()

    def _close(self, *args):
        start = time.thread_time()
        super()._close(*args)
        self.seconds += time.thread_time() - start


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["images"]), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def samples(count):
    """Return smooth noise, as compressible as a photograph, with a box each."""
    noise = torch.rand(count, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    images = interpolate(noise, (224, 224), mode="bicubic").clamp(0, 1)
    return {
        "images": images,
        "labels": torch.arange(count) % 4,
        "boxes": [torch.tensor([[40.0, 40.0, 150.0, 160.0]])] * count,
    }


def written(logger, report):
    """Return the seconds that the second of two runs takes: the first imports packages and defines keys."""
    with tempfile.TemporaryDirectory() as folder:
        callback = Timed(SESS(GradCAM(), num_scales=1), num_samples=8, report=report, on_error="raise")
        trainer = Trainer(
            callbacks=[callback], logger=logger(save_dir=folder), accelerator="cpu", max_epochs=2,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            num_sanity_val_steps=0,
        )  # fmt: skip
        data = DataLoader([samples(8)], batch_size=None)
        trainer.fit(Net(), data, data)
        if isinstance(trainer.logger, WandbLogger):
            trainer.logger.experiment.finish()
    return callback.seconds


def main():
    bench = Bench(__file__, __doc__)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ |= {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    names = [*WAYS][:1] if bench.quick else [*WAYS]
    seconds = [{name: written(*WAYS[name]) for name in names} for _ in range(bench.rounds)]
    for name in names:
        each = [of_round[name] for of_round in seconds]
        bench.note("8 panels of 224 px", f"seconds, {name}", median(each), min(each), max(each), most=0.1)


if __name__ == "__main__":
    main()
