"""Image files: finding them, their size, and their pixels at any bit depth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Real
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Those that torchvision's ``ImageFolder`` reads."""
ORIENTATION = 0x0112
"""EXIF's tag for the orientation of an image."""
WHITES = {"F": (1, 255, 65535), "I": (255, 65535)}
"""Values that may stand for white in files of floats or 32-bit integers, whose format does not say."""


class BrokenSampleError(RuntimeError):
    """A sample's image or annotation is missing or damaged, or has the wrong size."""


def find_pictures(root: Path) -> list[Path]:
    """Return all images in a folder and its sub-folders, linked ones too, sorted.

    What is hidden is left out: copies by Jupyter (``.ipynb_checkpoints``), macOS's ``._cat.jpg``.

    Raises:
        FileNotFoundError: If there are none.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder.")
    paths = sorted(path for path in _files(root) if path.suffix.lower() in PICTURES)
    if not paths:
        raise FileNotFoundError(f"{root} contains no images.")
    return paths


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_loop(folder, name)]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _is_loop(folder: str, name: str) -> bool:
    """Return whether a sub-folder is a link back to where it lies."""
    path = Path(folder, name)
    return path.is_symlink() and path.resolve() in (Path(folder).resolve(), *Path(folder).resolve().parents)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except Exception as error:  # On damaged files, decoders raise all kinds of errors.
        raise BrokenSampleError(f"{path}: cannot be read as an image ({error}).") from error


def size_on_disk(path: Path) -> tuple[int, int]:
    """Return an image's (height, width).

    Raises:
        BrokenSampleError: If it cannot be read.
    """
    with _opened(path) as file:
        return file.height, file.width


def is_turned(path: Path) -> bool:
    """Return whether viewers rotate an image by its EXIF tag, as phones often set; False if unknown."""
    try:
        with _opened(path) as file:
            return file.getexif().get(ORIENTATION, 1) in range(2, 9)
    except BrokenSampleError:  # Damaged EXIF, which no pixel depends on.
        return False


def read_pixels(path: Path) -> Real[Tensor, "3 H W"]:
    """Decode an image as RGB in 0..255: uint8, or float32 where a channel has more than 8 bits.

    White is 65535 in 16-bit images. Where the format does not say, as with floats and 32-bit integers, it
    is the first of 1 (floats only), 255 and 65535 that no pixel exceeds. As in torchvision's ``ImageFolder``,
    pixels are read as they are stored, whatever EXIF says of the orientation.

    Raises:
        BrokenSampleError: If the file is missing or damaged, or its values fit no such range.
    """
    with _opened(path) as file:
        if file.mode in WHITES or file.mode.startswith("I;16"):
            whites = (65535,) if file.mode not in WHITES or file.format == "PNG" else WHITES[file.mode]
            return _scaled(np.asarray(file, dtype=np.float32), whites).expand(3, -1, -1)
        pixels: Tensor = pil_to_tensor(file.convert("RGB"))
    return pixels


def _scaled(values: np.ndarray, whites: tuple[int, ...]) -> Float[Tensor, "H W"]:
    low, high = float(values.min()), float(values.max())
    white = next((white for white in whites if 0 <= low <= high <= white), None)
    if white is None:
        known = " or ".join(f"0..{white}" for white in whites)
        raise ValueError(
            f"its values {low:g}..{high:g} are outside the known ranges, {known}; save it as an 8-bit or "
            "16-bit PNG"
        )
    return torch.from_numpy(values * (255 / white))
