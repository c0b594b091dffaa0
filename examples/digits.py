"""Scanned digits scattered over photographs: a data set that a small CNN learns in about a minute.

Every image holds digits in two inks. One to three digits are printed in a *warm* ink (orange to yellow) and
are all of one class, the label. Two to five *distractors* are printed in a *cool* ink (cyan to violet) and
are never of that class. So the image alone determines the label: find the warm ink and read it. The true
boxes are known, and thus the place that a correct explanation points to.

Digits are real (1,797 scans, scikit-learn), and so are the photographs (scikit-learn, scikit-image). No
scan and no photograph is in both the training and the validation images, nothing is downloaded, and no
global random state is touched: image ``index`` of a split is always the same one.
"""

from __future__ import annotations

import colorsys
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from skimage import data as skimage_data
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from _run import Classifier, collate

SIZE = 128
DIGIT_SIZES = (16, 48)  # px, side of a whole scan; its ink is a little smaller
WARM, COOL = (0.06, 0.16), (0.50, 0.74)  # hues
PHOTOGRAPHS = {
    "train": ("china.jpg", "astronaut", "coffee", "motorcycle"),
    "val": ("flower.jpg", "chelsea", "rocket"),
}
SCANS = {"train": slice(0, 1400), "val": slice(1400, None)}


class Digit(NamedTuple):
    """One printed digit: its class, opacity cropped to the ink, the ink's top left corner and colour."""

    label: int
    opacity: Tensor  # (h, w) in [0, 1]; no border row or column is blank
    left: int
    top: int
    colour: Tensor  # (3,)

    @property
    def box(self) -> tuple[int, int, int, int]:
        height, width = self.opacity.shape
        return self.left, self.top, self.left + width, self.top + height


class Scene(NamedTuple):
    """The parts of an image: a photograph, the digits to find and the digits to ignore."""

    photograph: Tensor  # (3, SIZE, SIZE) in [0, 1]
    targets: list[Digit]
    distractors: list[Digit]


@cache
def scans(split: str) -> tuple[Tensor, np.ndarray]:
    """The split's scans, (N, 8, 8) in [0, 1], and their classes."""
    digits = load_digits()
    chosen = np.random.default_rng(0).permutation(len(digits.target))[SCANS[split]]
    return torch.from_numpy(digits.images[chosen] / 16).float(), digits.target[chosen]


@cache
def photographs(split: str) -> list[Tensor]:
    """The split's photographs, each (3, H, W) in [0, 1]."""
    return [torch.from_numpy(_load(name) / 255).permute(2, 0, 1).float() for name in PHOTOGRAPHS[split]]


def _load(name: str) -> np.ndarray:
    if name.endswith(".jpg"):
        return load_sample_image(name)
    return skimage_data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage_data, name)()


def make_scene(split: str, index: int) -> Scene:
    """Compose image ``index`` of ``split``; the same arguments give the same scene."""
    rng = np.random.default_rng((list(PHOTOGRAPHS).index(split), index))
    _, classes = scans(split)
    label = rng.integers(10)
    same, other = np.flatnonzero(classes == label), np.flatnonzero(classes != label)
    photograph, taken = _crop(rng, split), []
    targets = _scatter(rng, split, rng.choice(same, rng.integers(1, 4)), WARM, taken)
    distractors = _scatter(rng, split, rng.choice(other, rng.integers(2, 6)), COOL, taken)
    return Scene(photograph, targets, distractors)


def render(scene: Scene) -> Tensor:
    """Print the scene's digits on its photograph: (3, SIZE, SIZE), uint8."""
    picture = scene.photograph.clone()
    for digit in scene.targets + scene.distractors:
        x0, y0, x1, y1 = digit.box
        picture[:, y0:y1, x0:x1].lerp_(digit.colour[:, None, None], digit.opacity)
    return (picture * 255).round().to(torch.uint8)


def _crop(rng: np.random.Generator, split: str) -> Tensor:
    """A random square of a random photograph, slightly dimmed so that both inks stand out."""
    photograph = photographs(split)[rng.integers(len(photographs(split)))]
    height, width = photograph.shape[1:]
    side = rng.integers(SIZE, min(height, width) + 1)
    y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = photograph[None, :, y : y + side, x : x + side]
    return 0.6 * interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0]


def _scatter(
    rng: np.random.Generator, split: str, chosen: np.ndarray, hues: tuple, taken: list
) -> list[Digit]:
    """Print the chosen scans where there is room; one that finds none in 50 tries shrinks until it does."""
    colour = torch.tensor(colorsys.hsv_to_rgb(rng.uniform(*hues), rng.uniform(0.7, 1), 1))
    digits = []
    for scan in chosen:
        size = np.exp(rng.uniform(*np.log(DIGIT_SIZES)))
        while (digit := _place(rng, split, scan, round(size), colour, taken)) is None:
            size = max(0.8 * size, DIGIT_SIZES[0])
        digits.append(digit)
        taken.append(digit.box)
    return digits


def _place(
    rng: np.random.Generator, split: str, scan: int, size: int, colour: Tensor, taken: list
) -> Digit | None:
    images, classes = scans(split)
    opacity = _opacity(images[scan], size)
    for _ in range(50):
        x, y = (int(rng.integers(SIZE - side + 1)) for side in reversed(opacity.shape))
        digit = Digit(int(classes[scan]), opacity, x, y, colour)
        if not any(_overlap(digit.box, box) for box in taken):
            return digit
    return None


def _opacity(scan: Tensor, size: int) -> Tensor:
    """Enlarge a scan, sharpen its edge, and crop it to its ink."""
    large = interpolate(scan[None, None], (size, size), mode="bicubic")[0, 0]
    opacity = (2 * large - 0.4).clamp(0, 1)
    ink = opacity >= 0.1
    rows, columns = ink.any(1).nonzero()[:, 0], ink.any(0).nonzero()[:, 0]
    return (opacity * ink)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class Digits(Dataset):
    """``length`` images of a split, each with its label and the boxes of *all* digits of that class.

    Items are ``(image, {"label": int64 scalar, "boxes": float (N, 4)})``: the image normalised, the boxes
    xyxy in half-open pixels. Images are rendered only once, here, so that epochs are quick.
    """

    def __init__(self, split: str, length: int, mean: Tensor, std: Tensor) -> None:
        scenes = [make_scene(split, index) for index in range(length)]
        self.pictures = torch.stack([render(scene) for scene in scenes])
        self.labels = torch.tensor([scene.targets[0].label for scene in scenes])
        self.boxes = [torch.tensor([digit.box for digit in scene.targets]).float() for scene in scenes]
        self.mean, self.std = mean.view(3, 1, 1), std.view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = (self.pictures[index] / 255 - self.mean) / self.std
        return image, {"label": self.labels[index], "boxes": self.boxes[index]}


class DigitsDataModule(LightningDataModule):
    """Training and validation images, batched by ``collate``."""

    class_names = tuple("0123456789")
    mean, std = torch.tensor([0.36, 0.28, 0.27]), torch.tensor([0.20, 0.20, 0.25])  # of the training images

    def __init__(
        self, train_size: int = 2000, val_size: int = 400, batch_size: int = 32, seed: int = 0
    ) -> None:
        super().__init__()
        self.sizes = {"train": train_size, "val": val_size}
        self.batch_size, self.seed = batch_size, seed

    @override
    def setup(self, stage: str | None = None) -> None:
        if not hasattr(self, "train"):
            self.train, self.val = (
                Digits(split, size, self.mean, self.std) for split, size in self.sizes.items()
            )

    @override
    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=order, collate_fn=collate)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size, collate_fn=collate)


class SmallCNN(Classifier):
    """Six convolutions, global pooling, ten logits.

    The grid of features is 1/32 of the image's side, 4 x 4 at 128 px, as coarse as that of a ResNet.
    """

    def __init__(self, lr: float = 3e-3, width: int = 24) -> None:
        super().__init__(lr)
        w = width
        layers = [
            (3, w, 2),
            (w, 2 * w, 2),
            (2 * w, 3 * w, 2),
            (3 * w, 3 * w, 1),
            (3 * w, 4 * w, 2),
            (4 * w, 4 * w, 2),
        ]
        self.features = nn.Sequential(*(_block(*layer) for layer in layers))
        self.features.to(memory_format=torch.channels_last)  # a third faster on a CPU
        self.head = nn.Linear(4 * w, len(DigitsDataModule.class_names))

    def forward(self, images: Tensor) -> Tensor:
        # Root mean square: a plain mean drowns small digits in background, and learning starts much later.
        pooled = self.features(images).square().mean((2, 3)).add(1e-6).sqrt()
        return self.head(pooled)


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
