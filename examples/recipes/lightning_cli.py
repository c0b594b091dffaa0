"""How do I switch it on in the YAML of my own LightningCLI?

    cd examples/recipes && python lightning_cli.py fit --config lightning_cli.yaml

Every argument of the callback can be changed on the command line too: `--trainer.callbacks.num_samples 16`.
`sess-lightning fit --config ...` does the same without a script of your own.
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import squeezenet1_1
from torchvision.transforms import ToTensor


class Model(LightningModule):
    def __init__(self, num_classes: int = 10, lr: float = 1e-4):
        super().__init__()
        self.model, self.lr = squeezenet1_1(num_classes=num_classes), lr

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch["picture"]), batch["kind"])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", cross_entropy(self.model(batch["picture"]), batch["kind"]), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


class Data(LightningDataModule):
    """Random images, in batches of a form that nobody else uses: {"picture": ..., "kind": ...}."""

    def __init__(self, size: int = 96, num_images: int = 64):
        super().__init__()
        self.data = [
            {"picture": image, "kind": label}
            for image, label in FakeData(num_images, (3, size, size), transform=ToTensor())
        ]

    def train_dataloader(self):
        return DataLoader(self.data, 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, 16)


def adapt(batch):
    """Tell the callback what is what; the YAML names this function."""
    return batch["picture"], batch["kind"]


if __name__ == "__main__":
    LightningCLI(Model, Data)
