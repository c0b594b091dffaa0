"""How do I configure it with Hydra?

    python examples/recipes/hydra_training.py callback.num_samples=8 callback.method.num_scales=4

`hydra_training.yaml` names the classes (`_target_`), and Hydra builds them.
"""

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import squeezenet1_1
from torchvision.transforms import ToTensor


class Model(LightningModule):
    def __init__(self, num_classes):
        super().__init__()
        self.model = squeezenet1_1(num_classes=num_classes)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", cross_entropy(self.model(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


@hydra.main(version_base="1.3", config_path=".", config_name="hydra_training")
def main(config):
    data = FakeData(config.num_images, (3, 96, 96), num_classes=10, transform=ToTensor())  # yours
    trainer = instantiate(config.trainer, callbacks=[instantiate(config.callback)])
    trainer.fit(Model(num_classes=10), DataLoader(data, 16, shuffle=True), DataLoader(data, 16))


if __name__ == "__main__":
    main()
