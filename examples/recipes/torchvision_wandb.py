"""How do I watch a torchvision model in W&B while I fine-tune it?

    python examples/recipes/torchvision_wandb.py FOLDER    # holds train/CLASS/*.jpg and val/CLASS/*.jpg

Nothing is sent: the run is offline, and `wandb sync` uploads it. Class names come from the folders, and the
normalisation to undo in pictures from the transform.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights, resnet18

from sess_lightning import SESSCallback


class FineTuned(LightningModule):
    def __init__(self, num_classes, weights):
        super().__init__()
        self.model = resnet18(weights=weights)
        self.model.fc = torch.nn.Linear(self.model.fc.in_features, num_classes)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        self.log("val/loss", cross_entropy(logits, batch[1]), prog_bar=True)
        self.log("val/acc", (logits.argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main(folder, epochs=3, weights=ResNet18_Weights.DEFAULT, **options):
    transform = ResNet18_Weights.DEFAULT.transforms()
    train, val = (ImageFolder(f"{folder}/{split}", transform) for split in ("train", "val"))
    trainer = Trainer(
        max_epochs=epochs,
        logger=WandbLogger(project="fine-tuning", offline=True),
        callbacks=[SESSCallback(**options)],
    )
    model = FineTuned(len(train.classes), weights)
    trainer.fit(model, DataLoader(train, 32, shuffle=True), DataLoader(val, 32))


if __name__ == "__main__":
    main(sys.argv[1])
