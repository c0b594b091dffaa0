"""Images: tensors in, uint8 out."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from threading import get_ident
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Picture = npt.NDArray[np.uint8]
"""(H, W, 3), 0..255."""
WIDEST = 6
"""Of a sheet's images, by their height: a signal of 1 x 5000 px would be a million pixels wide."""


@dataclass(frozen=True)
class Panel:
    """A sample for display: the image, and each method's map over it.

    Attributes:
        image: The image itself.
        overlays: Method's name -> the image with its map over it.
        caption: Caption, a line per item.
        boxes: Where the labelled object is, (x0, y0, x1, y1) px of ``image``.
        label: The label's name.
        title: Short name of the sample.
    """

    image: Picture
    overlays: Mapping[str, Picture]
    caption: str = ""
    boxes: Sequence[tuple[float, float, float, float]] = field(default=())
    label: str = ""
    title: str = ""

    @property
    def strip(self) -> Picture:
        """The image and its overlays, side by side."""
        return np.concatenate([self.image, *self.overlays.values()], axis=1)


MOST_CLIPPED = 0.2
"""If a larger share of an image's values lies beyond black and white, the assumed range is wrong."""
PERCENTILES = (2, 98)
"""Quantiles of an image's values that become black and white where the range is unknown."""


def displayed(
    images: Float[Tensor, "B C H W"],
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
    channels: Sequence[int] | None = None,
) -> list[Picture]:
    """Undo the normalisation and return images for display.

    A mean or deviation above 1 means that pixels were in 0..255, above 255 that their range is unknown. In
    that case, and where the normalisation is unknown or most pixels fit no range, each image is stretched
    between its percentiles.

    Args:
        images: As the model takes them.
        normalisation: (mean, std), a value per channel or one for all.
        channels: The channels to show, one or three (red, green, blue); None is the first three, or if there
            are fewer the first one as grey.

    Raises:
        ValueError: If the images have no such channels.
    """
    pixels, white = images.detach().float().cpu(), None
    if normalisation is not None:
        mean, std = (torch.tensor(list(values)).view(1, -1, 1, 1) for values in normalisation)
        if mean.shape[1] in (1, pixels.shape[1]):
            pixels, white = pixels * std + mean, _white(normalisation)
    shown = _shown_channels(pixels.shape[1], channels)
    return [_as_bytes(image, white) for image in pixels[:, shown].expand(-1, 3, -1, -1).numpy()]


def _white(normalisation: tuple[Sequence[float], Sequence[float]]) -> float | None:
    largest = max(abs(value) for values in normalisation for value in values)
    return next((white for white in (1.0, 255.0) if largest <= white), None)


def _shown_channels(count: int, asked: Sequence[int] | None) -> list[int]:
    if asked is None:
        return [0, 1, 2] if count >= 3 else [0]
    if len(asked) not in (1, 3) or not all(0 <= channel < count for channel in asked):
        raise ValueError(
            f"display_channels must be one or three of the images' channels 0..{count - 1}, "
            f"got {list(asked)}."
        )
    return list(asked)


def _as_bytes(image: npt.NDArray[np.float32], white: float | None) -> Picture:
    finite = np.isfinite(image)
    known = image if finite.all() else image[finite]
    low, high = 0.0, white or 0.0
    margin = 0.02 * high  # From rounding, and from bicubic resizing.
    if white is None or np.mean((known < low - margin) | (known > high + margin)) > MOST_CLIPPED:
        low, high = np.percentile(known, PERCENTILES).tolist() if known.size else (0.0, 0.0)
        if low == high and known.size:  # A small object on a uniform background.
            low, high = float(known.min()), float(known.max())
    scaled = (image - low) / (high - low if high > low else np.inf)
    if known is not image:
        scaled = np.nan_to_num(scaled)
    shown = np.rint(np.clip(scaled, 0, 1, out=scaled) * 255).astype(np.uint8)
    return np.stack([*shown], axis=-1)  # Of a mere view, whoever reads it would make a copy.


@lru_cache(maxsize=4)
def _blends(name: str, strength: float) -> npt.NDArray[np.uint8]:
    """Return red, green and blue of each of 256 values of a map over each of 256 shades, (3, 256 * 256)."""
    from matplotlib import colormaps

    colours = np.asarray(colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255, dtype=np.float32)
    blended = (1 - strength) * np.arange(256, dtype=np.uint8) + strength * colours.T[..., None]
    return blended.round().astype(np.uint8).reshape(3, -1)


def overlay(
    picture: Picture, saliency: Float[Tensor, "H W"], colours: str = "jet", strength: float = 0.5
) -> Picture:
    """Blend a map in [0, 1] over an image; where it is low or NaN, the image shows through, darkened."""
    values = saliency.detach().float().cpu().nan_to_num(0).clamp(0, 1).numpy()
    rows = np.rint(values * 255).astype(np.intp) * 256
    blends = enumerate(_blends(colours, strength))
    return np.stack([blend.take(rows + picture[..., channel]) for channel, blend in blends], axis=-1)


def sheet(panels: Sequence[Panel], side: int = 224) -> Picture:
    """Lay out panels in one captioned image: a row per sample, columns image | base | SESS.

    Args:
        panels: The samples to show.
        side: Height of each image, px; less for one more than ``WIDEST`` times as wide.
    """
    rows = [_row(panel, side) for panel in panels]
    head, gap = 26, 6
    width = max(row.width for row in rows)
    page = Image.new("RGB", (width, head + sum(row.height + gap for row in rows)), "white")
    draw = ImageDraw.Draw(page)
    column = _scaled(panels[0].image, side).width + 4
    for i, name in enumerate(("image", *panels[0].overlays)):
        draw.text((i * column + 4, 4), name, fill="black", font=_font(15, name))
    top = head
    for row in rows:
        page.paste(row, (0, top))
        top += row.height + gap
    return np.asarray(page)


def _scale(picture: Picture, side: int) -> float:
    height, width = picture.shape[:2]
    return float(min(side / height, WIDEST * side / width))


def _scaled(picture: Picture, side: int) -> Image.Image:
    height, width = picture.shape[:2]
    scale = _scale(picture, side)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(picture).resize(
        size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS
    )


def _row(panel: Panel, side: int) -> Image.Image:
    pictures = [_scaled(picture, side) for picture in (panel.image, *panel.overlays.values())]
    text_width = 300
    row = Image.new("RGB", (sum(p.width + 4 for p in pictures) + text_width, side), "white")
    draw, left, factor = ImageDraw.Draw(row), 0, _scale(panel.image, side)
    for picture in pictures:
        row.paste(picture, (left, 0))
        for x0, y0, x1, y1 in panel.boxes:
            corners = (left + x0 * factor, y0 * factor, left + x1 * factor - 1, y1 * factor - 1)
            if corners[2] > corners[0] and corners[3] > corners[1]:
                draw.rectangle(corners, outline=(0, 255, 0), width=2)
        left += picture.width + 4
    text = f"{panel.title}\n{panel.caption}".strip()
    draw.multiline_text((left + 6, 4), text, fill="black", font=_font(13, text), spacing=4)
    return row


def _font(size: int, text: str) -> Any:
    """Return a font that has a text's letters: Pillow's own has no others than English ones."""
    others = "".join(sorted({letter for letter in text if not letter.isascii()}))
    return ImageFont.truetype(_font_with(others), size) if others else ImageFont.load_default(size)


@lru_cache(maxsize=64)
def _font_with(letters: str) -> str:
    """Return the path of matplotlib's font, or where that lacks letters, of an installed one that has all."""
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font

    installed = [entry.fname for entry in fontManager.ttflist if not entry.name.startswith("Last Resort")]
    paths, wanted = [findfont("DejaVu Sans"), *installed], {*map(ord, letters)}
    return next((path for path in paths if wanted <= FT2Font(path).get_charmap().keys()), paths[0])


@contextmanager
def _no_cycles_left() -> Iterator[None]:
    """Free a figure's thousands of reference cycles at once; otherwise they wait for hundreds of runs."""
    enabled = gc.isenabled()
    gc.disable()  # What is made within stays in the youngest generation, which is collected quickly.
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()


@contextmanager
def without_latex() -> Iterator[None]:
    """Have matplotlib write texts itself: LaTeX, which a style may ask for, stumbles over % and _."""
    from matplotlib import rcParams

    asked, rcParams["text.usetex"] = rcParams["text.usetex"], False
    try:
        yield
    finally:
        rcParams["text.usetex"] = asked


class _Frame:
    """The axes of the curves, which are drawn once; what a run adds is drawn over them.

    Args:
        names: Names of the methods.
    """

    @_no_cycles_left()
    def __init__(self, names: Sequence[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Margins by hand: a layout that measures all texts takes half of the time, and training waits.
        figure = Figure(figsize=(9, 3.6), dpi=110)
        figure.subplots_adjust(left=0.07, right=0.985, bottom=0.14, top=0.82, wspace=0.06)
        self._canvas = FigureCanvasAgg(figure)
        self._axes = figure.subplots(1, 2, sharey=True)
        for axis, kind in zip(
            self._axes, ("Insertion (higher is better)", "Deletion (lower is better)"), strict=True
        ):
            for i in range(len(names)):
                axis.plot([], [], label=str(i), lw=1.2 if i else 2.4)
            axis.set(title=kind, xlabel="pixels changed, most salient first (%)", ylim=(0, 1), xlim=(0, 100))
            axis.grid(alpha=0.3)
        self._axes[0].set_ylabel("probability of the target")
        # Labels that begin with "_" would be left out of the legend.
        self._legend = self._axes[0].legend(fontsize=8)
        for text, name in zip(self._legend.get_texts(), names, strict=True):
            text.set(text=name, parse_math=False)
        self._title = figure.suptitle("", fontsize=10)
        for artist in (self._title, *(artist for axis in self._axes for artist in self._over(axis))):
            artist.set_animated(True)
        self._canvas.draw()
        self._empty = [self._canvas.copy_from_bbox(part.bbox) for part in (figure, *self._axes)]

    def _over(self, axis: Any) -> list[Any]:
        """Return what is drawn over the empty axes, in order."""
        return [*axis.lines, *axis.spines.values(), *([self._legend] if axis is self._axes[0] else [])]

    def draw(self, curves: Sequence[Float[Tensor, "2 T"]], title: str) -> Picture:
        """Draw curves into the axes."""
        figure, *insides = self._empty
        self._canvas.restore_region(figure)
        for row, (axis, inside) in enumerate(zip(self._axes, insides, strict=True)):
            for line, curve in zip(axis.lines, curves, strict=True):
                line.set_data(np.linspace(0, 100, curve.shape[1]), curve[row].numpy())
            self._canvas.restore_region(inside)  # A wide legend ends where the next axes begin.
            for artist in self._over(axis):
                axis.draw_artist(artist)
        self._title.set_text(title)
        self._canvas.figure.draw_artist(self._title)
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()


@lru_cache(maxsize=4)
def _frame(names: tuple[str, ...], style: str, thread: int) -> _Frame:  # noqa: ARG001
    """Return a frame that is kept, for one style of matplotlib's and one thread."""
    with without_latex():
        return _Frame(names)


def curve_figure(curves: Mapping[str, Float[Tensor, "2 T"]], title: str = "") -> Picture:
    """Draw mean insertion and deletion curves, a line per method, the first one thicker."""
    from matplotlib import rcParams

    # As they are stored: matplotlib, if asked for its backend, would choose one for the whole process.
    style = repr([*dict.items(rcParams)])
    return _frame(tuple(curves), style, get_ident()).draw([*curves.values()], title)
