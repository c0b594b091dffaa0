"""How do I use it with a Hugging Face image classifier?

    python examples/recipes/hugging_face.py

Batches are dicts of `pixel_values` and `labels`, the model is called with keywords and returns an output
object: all of that is understood. A small ViT and random images keep this short; yours comes from
`AutoModelForImageClassification.from_pretrained(...)`.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, ViTConfig

from sess_lightning import SESSCallback


class Classifier(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        output = self.model(pixel_values=batch["pixel_values"], labels=batch["labels"])
        self.log("val/loss", output.loss, prog_bar=True)
        self.log("val/acc", (output.logits.argmax(1) == batch["labels"]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main(count=64, epochs=1, **options):
    names = {0: "cat", 1: "dog", 2: "owl"}
    config = ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=96,
        id2label=names, label2id={name: index for index, name in names.items()},
    )  # fmt: skip
    model = AutoModelForImageClassification.from_config(config)
    data = [{"pixel_values": torch.rand(3, 96, 96), "labels": index % 3} for index in range(count)]
    callback = SESSCallback(class_names=list(names.values()), **options)
    trainer = Trainer(max_epochs=epochs, callbacks=[callback])
    trainer.fit(Classifier(model), DataLoader(data, 16, shuffle=True), DataLoader(data, 16))


if __name__ == "__main__":
    main()
