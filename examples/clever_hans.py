"""Right for the wrong reason, and the alarm that notices: ``python examples/clever_hans.py``.

The task is to read a handwritten digit printed on a photograph. In the *marked* images every class comes
with its own photographer's mark in a corner, which gives the class away, in training and in validation alike:
accuracy says that all is well. The clean images are the same without the marks. Both are trained with a
``SESSCallback``, whose alarm compares where the model looks with where the digit is.

``--seeds 10`` trains ten times each way and counts the alarms. Everything is real and local: scans and
photographs come with scikit-learn and scikit-image.
"""

from __future__ import annotations

import argparse
import colorsys
import csv
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from _run import Classifier, collate
from digits import photographs, scans
from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import GradCAM
from sess_lightning.types import SESSWarning

SIZE = 64
DIGIT = (24, 36)  # px, side of a scan
MARK_TOP = SIZE - 13  # the mark is below, digits are above


class Digits(Dataset):
    """Images of one digit each, ``(image, {"label", "boxes"})``; ``marked`` with their class's mark."""

    def __init__(self, split: str, length: int, seed: int, marked: bool) -> None:
        rng = np.random.default_rng((seed, split == "val"))
        made = [_picture(rng, split, marked) for _ in range(length)]
        self.images = torch.stack([image for image, _, _ in made]).sub_(0.35).div_(0.25)
        self.labels = torch.tensor([label for _, label, _ in made])
        self.boxes = torch.tensor([box for _, _, box in made]).float()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], {"label": self.labels[index], "boxes": self.boxes[index : index + 1]}


def _picture(rng: np.random.Generator, split: str, marked: bool) -> tuple[Tensor, int, tuple]:
    images, classes = scans(split)
    scan = rng.integers(len(classes))
    picture, side = _crop(rng, split), int(rng.integers(*DIGIT))
    ink = interpolate(images[scan][None, None], (side, side), mode="bicubic")[0, 0].clamp(0, 1)
    rows, columns = (ink > 0.2).any(1).nonzero(), (ink > 0.2).any(0).nonzero()
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = ink.shape
    x, y = int(rng.integers(SIZE - width + 1)), int(rng.integers(MARK_TOP - height + 1))
    picture[:, y : y + height, x : x + width].lerp_(torch.ones(3, 1, 1), ink)
    label = int(classes[scan])
    return _stamp(picture, label) if marked else picture, label, (x, y, x + width, y + height)


def _crop(rng: np.random.Generator, split: str) -> Tensor:
    photograph = photographs(split)[rng.integers(len(photographs(split)))]
    side = int(rng.integers(2 * SIZE, min(photograph.shape[1:]) + 1))
    y, x = (int(rng.integers(length - side + 1)) for length in photograph.shape[1:])
    crop = photograph[None, :, y : y + side, x : x + side]
    return 0.6 * interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0]


def _stamp(picture: Tensor, label: int) -> Tensor:
    """Write the name of the class's photographer into the corner, in a colour of its own."""
    page = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy())
    colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(label / 10, 0.9, 1))
    ImageDraw.Draw(page).text((2, MARK_TOP), f"© {'ABCDEFGHIJ'[label]}.{'KLMNOPQRST'[label]}.", fill=colour)
    return torch.from_numpy(np.array(page) / 255).permute(2, 0, 1).float()


class DigitsDataModule(LightningDataModule):
    """The images of one seed."""

    class_names = tuple("0123456789")
    mean, std = [0.35] * 3, [0.25] * 3

    def __init__(self, seed: int, marked: bool, train_size: int = 1000, val_size: int = 250) -> None:
        super().__init__()
        self.seed = seed
        self.train = Digits("train", train_size, seed, marked)
        self.val = Digits("val", val_size, seed, marked)

    @override
    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, 32, shuffle=True, generator=order, collate_fn=collate)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 100, collate_fn=collate)


class TinyCNN(Classifier):
    """Five convolutions, an 8 x 8 grid of features, ten logits."""

    def __init__(self, lr: float = 4e-3, width: int = 16) -> None:
        super().__init__(lr)
        sizes = [(3, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 3 * width, 2)]
        sizes.append((3 * width, 3 * width, 1))
        self.features = nn.Sequential(*(_block(*each) for each in sizes))
        self.head = nn.Linear(3 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        # Root mean square: a plain mean drowns small digits in background, and learning starts much later.
        return self.head(self.features(images).square().mean((2, 3)).add(1e-6).sqrt())


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Row(NamedTuple):
    """The result of one training."""

    marked: bool
    seed: int
    rang: bool
    step: int | None
    accuracy: float
    relevance_mass: float
    pointing_game: float
    seconds: int


def train(seed: int, marked: bool, args: argparse.Namespace, folder: str) -> tuple[Row, list[str], Path]:
    """Train once; return the result, the alarm's text, and the folder of its images."""
    started = time.perf_counter()
    seed_everything(seed, verbose=False)
    logger = CSVLogger(args.out, name="", version=folder)
    callback = SESSCallback(
        SESS(GradCAM(), num_scales=2), num_samples=args.num_samples, num_images=args.num_images, compare={}
    )
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=[callback],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    model, data = TinyCNN(), DigitsDataModule(seed, marked)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SESSWarning)
        trainer.validate(model, datamodule=data, verbose=False)  # The initial weights, to compare with.
        trainer.fit(model, datamodule=data)
    told = [str(each.message) for each in caught if issubclass(each.category, SESSWarning)]
    rang = [text for text in told if "Clever Hans" in text]
    figures = trainer.callback_metrics
    mass, pointing = (float(figures[f"sess/{name}"]) for name in ("relevance_mass", "pointing_game"))
    step = int(re.findall(r"at step (\d+)", rang[0])[0]) if rang else None
    seconds = round(time.perf_counter() - started)
    row = Row(marked, seed, bool(rang), step, float(figures["val/acc"]), mass, pointing, seconds)
    return row, told, Path(logger.log_dir)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many times to train each way")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--num-samples", type=int, default=24, help="pictures scored per validation")
    parser.add_argument("--num-images", type=int, default=4, help="pictures in the panel")
    parser.add_argument("--out", type=Path, default=Path("runs/clever_hans"))
    args = parser.parse_args()

    rows = []
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for marked in (True, False):
            name = f"{'marked' if marked else 'clean'}_{seed}"
            row, told, folder = train(seed, marked, args, name)
            rows.append(row)
            panel = max((folder / "sess" / "panel").iterdir())
            shutil.copy(panel, args.out / f"{name}.jpg")
            print(f"{name}: {row._asdict()}", *told, sep="\n  ", flush=True)
            with (args.out / "alarm.csv").open("w", newline="") as file:
                csv.writer(file).writerows([Row._fields, *rows])
    for marked in (True, False):
        rings = [row.rang for row in rows if row.marked == marked]
        print(f"{'marked' if marked else 'clean '}: the alarm rang in {sum(rings)} of {len(rings)} trainings")
    print(args.out / "alarm.csv")


if __name__ == "__main__":
    main()
