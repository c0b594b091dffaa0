"""How a layer's features lie on the image, judged by their shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Layout: TypeAlias = Literal["channels", "channels_last", "tokens", "tokens_last", "sequence_first"]
"""(B, C, h, w), (B, h, w, C), (B, N, C), (B, C, N) or (N, B, C)."""

TOKEN_AXES: dict[Layout, int] = {"tokens": 1, "tokens_last": 2, "sequence_first": 0}


@dataclass(frozen=True)
class Grid:
    """How a layer's features lie on the image.

    Tokens of places come row by row, with ``extra`` other tokens before them and ``after`` behind.

    Attributes:
        layout: ``"channels"`` (B, C, h, w), ``"channels_last"`` (B, h, w, C), ``"tokens"`` (B, N, C),
            ``"tokens_last"`` (B, C, N) or ``"sequence_first"`` (N, B, C).
        height: Rows of the grid, as the features are stored.
        width: Columns of the grid, as the features are stored.
        channels: Feature channels; 0 for any number.
        extra: Leading tokens that belong to no place (class, distillation, register, prompt tokens).
        after: Trailing tokens that belong to no place.
        transposed: Whether rows are columns of the image.
        flipped: Whether (rows, columns) run against the image's, after transposing.
    """

    layout: Layout
    height: int
    width: int
    channels: int = 0
    extra: int = 0
    after: int = 0
    transposed: bool = False
    flipped: tuple[bool, bool] = (False, False)

    def fits(self, shape: tuple[int, ...], batch: int) -> bool:
        """Return whether features of ``shape``, of ``batch`` images, can be read as this grid."""
        if self.is_plane:
            places = (2, 3) if self.layout == "channels" else (1, 2)
            return len(shape) == 4 and shape[0] == batch and [shape[i] for i in places] == [*self._sides]
        axis = TOKEN_AXES[self.layout]
        count = self.extra + self.height * self.width + self.after
        return len(shape) == 3 and shape[1 if axis == 0 else 0] == batch and shape[axis] == count

    @property
    def is_plane(self) -> bool:
        """Whether features have two axes of places, rather than one of tokens."""
        return self.layout in ("channels", "channels_last")

    @property
    def _sides(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the maps."""
        return (self.width, self.height) if self.transposed else (self.height, self.width)

    def to_maps(self, features: Tensor) -> Float[Tensor, "B C h w"]:
        """Return features as (B, C, h, w), upright."""
        if self.layout == "channels":
            maps = features
        elif self.layout == "channels_last":
            maps = features.permute(0, 3, 1, 2)
        else:
            places = as_tokens(features, self.layout)[:, self.extra :][:, : self.height * self.width]
            maps = places.unflatten(1, self._sides).permute(0, 3, 1, 2)
        maps = maps.transpose(2, 3) if self.transposed else maps
        return maps.flip(self._flips) if self._flips else maps

    def centre(self, row: int, column: int) -> tuple[float, float]:
        """Return a cell's place on the image, (y, x) as fractions of its sides."""
        height, width = self.shape
        row, column = (column, row) if self.transposed else (row, column)
        y, x = (row + 0.5) / height, (column + 0.5) / width
        return (1 - y if self.flipped[0] else y), (1 - x if self.flipped[1] else x)

    def put_back(self, maps: Float[Tensor, "B C h w"], features: Tensor) -> Tensor:
        """Return ``features`` with other maps: the inverse of ``to_maps``."""
        maps = maps.flip(self._flips) if self._flips else maps
        maps = (maps.transpose(2, 3) if self.transposed else maps).to(features.dtype)
        if self.layout == "channels":
            return maps
        if self.layout == "channels_last":
            return maps.permute(0, 2, 3, 1)
        tokens = as_tokens(features, self.layout)
        before, behind = tokens[:, : self.extra], tokens[:, self.extra + self.height * self.width :]
        # It only transposes, so it is its own inverse.
        return as_tokens(torch.cat([before, maps.flatten(2).mT, behind], 1), self.layout)

    @property
    def _flips(self) -> list[int]:
        return [axis for axis, flip in zip((2, 3), self.flipped, strict=True) if flip]


def as_tokens(features: Tensor, layout: Layout) -> Float[Tensor, "B N C"]:
    """Return features of tokens as (B, N, C)."""
    if layout == "sequence_first":
        return features.transpose(0, 1)
    return features.mT if layout == "tokens_last" else features


def find_grid(shape: tuple[int, ...], size: tuple[int, int]) -> Grid | None:
    """Read a feature shape as a grid over an image of ``size``; return None if it cannot be one.

    Channels may come first or last: the reading whose proportions fit the image's best is taken, if any fits.
    Tokens (B, N, C) are read with the patch size that leaves the fewest extra tokens, all of them in front.
    This is a guess, which ``read_grid`` checks.
    """
    height, width = size
    if len(shape) == 4:
        readings = _planes(shape)
        misfits = [_misfit(grid, height, width) for grid in readings]
        return readings[misfits.index(min(misfits))] if min(misfits) < 2 else None
    if len(shape) == 3 and shape[2] > 1:
        grids = {(height // patch, width // patch) for patch in range(2, min(height, width) + 1)}
        tokens = [
            Grid("tokens", *grid, shape[2], shape[1] - grid[0] * grid[1]) for grid in grids if grid != (1, 1)
        ]
        return min(
            (grid for grid in tokens if 0 <= grid.extra <= 32), key=lambda grid: grid.extra, default=None
        )
    return None


def is_certain(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Return whether a shape is unambiguous: channels first, and a plane in proportion to the image."""
    if len(shape) != 4:
        return False
    first, last = (
        _misfit(grid, *size) < 2 and abs(grid.height - grid.width * size[0] / size[1]) < 1
        for grid in _planes(shape)
    )
    return first and not last


def may_be_grid(shape: tuple[int, ...]) -> bool:
    """Return whether features of one image have axes that places could lie on."""
    if len(shape) == 4:
        return shape[0] == 1 and max(shape[1] * shape[2], shape[2] * shape[3]) > 1
    return len(shape) == 3 and 1 in shape[:2] and max(shape) >= 4 and sorted(shape)[1] > 1


def _planes(shape: tuple[int, ...]) -> list[Grid]:
    _, first, middle, last = shape
    return [Grid("channels", middle, last, first), Grid("channels_last", first, middle, last)]


def _misfit(grid: Grid, height: int, width: int) -> float:
    """How many times longer or flatter the grid is than the image; infinite if it cannot be over it."""
    if grid.height * grid.width == 1 or grid.height > height or grid.width > width:
        return float("inf")
    ratio = grid.height * width / (grid.width * height)
    return max(ratio, 1 / ratio)


def plane_readings(shape: tuple[int, ...], size: tuple[int, int]) -> list[Grid]:
    """Return the possible readings of four axes, the usual one first."""
    usual = find_grid(shape, size)
    readings = [grid for grid in _planes(shape) if _may_be_places(grid.height, grid.width, size)]
    return sorted(readings, key=lambda grid: grid != usual)


def token_readings(layout: Layout, count: int, channels: int, size: tuple[int, int]) -> list[Grid]:
    """Return every grid that ``count`` tokens may form, with up to half of them outside it."""
    return [
        Grid(layout, height, places // height, channels, before, count - places - before)
        for places in range(count, count - min(count // 2, 128) - 1, -1)
        for height in range(1, places + 1)
        if places % height == 0 and _may_be_places(height, places // height, size)
        for before in sorted({0, min(1, count - places), min(2, count - places), count - places})
    ]


def turned(grid: Grid) -> list[Grid]:
    """Return a grid in all eight orientations, its own first."""
    sides = (False, True)
    return [
        replace(grid, transposed=transposed, flipped=(rows, columns))
        for transposed in sides
        for rows in sides
        for columns in sides
    ]


def _may_be_places(height: int, width: int, size: tuple[int, int]) -> bool:
    # Strides may differ by axis, and models may square images: up to eight times as flat or long is allowed.
    ratio = height * size[1] / (width * size[0])
    return height * width > 1 and 1 / 8 <= ratio <= 8
