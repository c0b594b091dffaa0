"""Resident memory over 200 epochs of training with the callback, on a tiny model; the first 20 aside."""

import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from measuring import Bench
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sess_lightning import SESSCallback


class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Resident(Callback):
    """Notes this process's resident KiB after every validation."""

    def __init__(self):
        self.kib = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
            self.kib.append(pages * 4)


def main():
    bench = Bench(__file__, __doc__, epochs={"type": int, "default": 200})
    epochs = 30 if bench.quick else bench.args.epochs
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 4), batch_size=4)
    for kind in ("with the callback", "without the callback", "with the callback, W&B offline"):
        resident = Resident()
        with tempfile.TemporaryDirectory() as folder:
            mine = SESSCallback(num_samples=2, num_images=1, on_error="raise")
            callbacks = [mine] if kind.startswith("with ") else []
            wandb = kind.endswith("offline")
            logger = WandbLogger(offline=True, save_dir=folder) if wandb else CSVLogger(folder)
            Trainer(
                max_epochs=epochs,
                callbacks=[*callbacks, resident],
                logger=logger,
                accelerator="cpu",
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1000,
            ).fit(Tiny(), data, data)
        later = np.array(resident.kib[20:])
        slope = np.polyfit(np.arange(len(later)), later, 1)[0]
        case = f"{epochs} epochs, {kind}"
        bench.note(case, "MiB after epoch 20", later[0] / 1024)
        bench.note(case, "MiB at the end", later[-1] / 1024)
        # A quarter of a percent of what is resident, over all epochs: noise of the allocator. W&B caches its
        # last hundred tables, two of which an epoch brings; those it drops wait for a full collection.
        bench.note(case, "KiB an epoch", slope, most=8 if kind == "with the callback" else None)
        half = np.array(resident.kib[epochs // 2 :])
        bench.note(case, "KiB an epoch, second half", np.polyfit(np.arange(len(half)), half, 1)[0])


if __name__ == "__main__":
    main()
