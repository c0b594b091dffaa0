"""What if an image has several labels, or none?

    python examples/recipes/multi_label.py

Labels of zeros and ones, (B, N), are read as multi-hot: each class of an image is explained (up to four),
and probabilities are sigmoids. An image without a class is left out and counted. For boxes see "Batches it
understands" in examples/README.md.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import squeezenet1_1

from sess_lightning import SESSCallback

CLASSES = ["person", "bicycle", "car", "dog"]


class MultiLabel(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = squeezenet1_1(num_classes=len(CLASSES))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return binary_cross_entropy_with_logits(self.model(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.model(images)
        self.log("val/loss", binary_cross_entropy_with_logits(logits, labels), prog_bar=True)
        self.log("val/acc", ((logits > 0) == labels.bool()).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main(count=64, epochs=1, **options):
    images = torch.rand(count, 3, 96, 96)  # yours
    labels = (torch.rand(count, len(CLASSES)) < 0.4).float()
    data = TensorDataset(images, labels)
    trainer = Trainer(max_epochs=epochs, callbacks=[SESSCallback(class_names=CLASSES, **options)])
    trainer.fit(MultiLabel(), DataLoader(data, 16, shuffle=True), DataLoader(data, 16))


if __name__ == "__main__":
    main()
