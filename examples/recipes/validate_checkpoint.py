"""How good are the maps of a model that is trained already?

    python examples/recipes/validate_checkpoint.py last.ckpt

`trainer.validate` with the callback scores a checkpoint, written with the callback or without, and leaves
pictures, tables and a report in the Trainer's folder. Replace `Model` and the loader with yours.
"""

import sys

from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import squeezenet1_1
from torchvision.transforms import ToTensor

from sess_lightning import SESSCallback


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = squeezenet1_1(num_classes=10)

    def validation_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        self.log("val/loss", cross_entropy(logits, batch[1]))
        self.log("val/acc", (logits.argmax(1) == batch[1]).float().mean())


def main(checkpoint, **options):
    data = FakeData(64, (3, 96, 96), transform=ToTensor())
    trainer = Trainer(logger=False, default_root_dir="runs/validated", callbacks=[SESSCallback(**options)])
    (metrics,) = trainer.validate(Model(), DataLoader(data, 16), ckpt_path=checkpoint, verbose=False)
    for key in ("val/acc", "sess/insertion", "sess/deletion", "sess/overall", "sess/base/overall"):
        print(f"{key:20}{metrics[key]:8.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
