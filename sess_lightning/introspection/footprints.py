"""Whether features lie on the image as they are read, checked by the pixels that their cells depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from sess_lightning.introspection.grids import (
    TOKEN_AXES,
    Grid,
    as_tokens,
    find_grid,
    plane_readings,
    token_readings,
    turned,
)
from sess_lightning.ops import size_of

CELLS = 12
"""How many cells are differentiated."""
_SAMPLES = 48


def read_grid(features: Tensor, image: Float[Tensor, "1 C H W"]) -> Grid | None:
    """Read features as a grid, and check that each cell depends mainly on its own pixels.

    A dozen cells are differentiated with respect to the pixels. The first reading that agrees with the places
    of their gradients is taken, beginning with the usual one (``find_grid``). Planes with channels may be too
    blurred to decide: then their shape decides. Tokens that do not follow places form no grid.

    Args:
        features: Features of one image, with a graph back to it.
        image: The image, a leaf of that graph.
    """
    usual = find_grid(tuple(features.shape), size_of(image))
    if features.device.type == "meta":
        return usual
    if features.ndim == 4 and features.shape[0] == 1:
        return _read_plane(features, image, usual)
    return _read_tokens(features, image, usual) if features.ndim == 3 else None


def _read_plane(features: Tensor, image: Tensor, usual: Grid | None) -> Grid | None:
    fits: dict[Grid, Fit] = {}
    for grid in plane_readings(tuple(features.shape), size_of(image)):
        cells = spread_cells(grid.height, grid.width)
        maps = grid.to_maps(features)
        footprints = Footprints.of([maps[0, :, row, column] for row, column in cells], image)
        if footprints is None:
            return None  # Features that do not depend on the image.
        fits |= footprints.fits({position: dict(enumerate(cells)) for position in turned(grid)})
        if fits[grid].holds:
            return grid
    good = [grid for grid, fit in fits.items() if fit.follows > 0.7 and fit.holds]
    return max(good, key=lambda grid: fits[grid].contrast, default=usual)


def _read_tokens(features: Tensor, image: Tensor, usual: Grid | None) -> Grid | None:
    for layout, axis in TOKEN_AXES.items():
        if features.shape[1 if axis == 0 else 0] != 1 or features.shape[axis] < 4:
            continue
        tokens = as_tokens(features, layout)[0]
        readings = token_readings(layout, len(tokens), tokens.shape[1], size_of(image))
        if usual is not None and layout == "tokens":
            readings = [*turned(usual), *readings]
        fits = _token_fits(tokens, image, readings, start=0.5)
        if fits is None:
            return None
        good = [grid for grid, fit in fits.items() if (fit.holds if grid == usual else fit.stands_out)]
        if good and good != [usual]:  # Among hundreds of readings one may fit by chance: other tokens decide.
            again = _token_fits(tokens, image, good, start=0.13) or {}
            good = [grid for grid in good if grid == usual or again[grid].holds]
        if good:
            return max(good, key=lambda grid: fits[grid].contrast * (1.05 if grid == usual else 1))
    return None


def _token_fits(
    tokens: Float[Tensor, "N C"], image: Tensor, readings: Sequence[Grid], start: float
) -> dict[Grid, Fit] | None:
    """Compare readings with the footprints of a dozen tokens, which ``start`` chooses; None as ``of``."""
    asked = [int((start + 0.618034 * i) % 1 * len(tokens)) for i in range(1, 1 + CELLS)]
    footprints = Footprints.of([tokens[i] for i in asked], image)
    if footprints is None:
        return None
    return footprints.fits({grid: _places(asked, grid) for grid in readings})


def _places(asked: Sequence[int], grid: Grid) -> dict[int, tuple[int, int]]:
    """Return row and column of the tokens that are places."""
    numbers = {k: token - grid.extra for k, token in enumerate(asked)}
    return {k: divmod(n, grid.width) for k, n in numbers.items() if 0 <= n < grid.height * grid.width}


def spread_cells(height: int, width: int) -> list[tuple[int, int]]:
    """Return some distinct cells, spread over the grid without order; all of them if there are few."""
    if height * width <= CELLS:
        return [(row, column) for row in range(height) for column in range(width)]
    cells: dict[tuple[int, int], None] = {}
    for i in range(1, 100 * CELLS):  # Multiples of the plastic number's powers: an evenly spread sequence.
        cells[int((0.5 + 0.754878 * i) % 1 * height), int((0.5 + 0.569840 * i) % 1 * width)] = None
        if len(cells) == CELLS:
            break
    return [*cells]


class Fit(NamedTuple):
    """How well a reading agrees with the pixels that cells depend on.

    Attributes:
        follows: Correlation of where cells should lie with where their gradients lie, on the worse axis.
        contrast: How much more a cell depends on its own pixels than other cells do.
        wins: Number of cells that depend on their own pixels more than any other cell does.
        cells: Number of cells that were differentiated.
    """

    follows: float
    contrast: float
    wins: int
    cells: int

    @property
    def holds(self) -> bool:
        """Whether this is more than chance: noise reaches a contrast of 1.13, blurred features exceed 1.2."""
        return (self.follows > 0.5 and self.contrast > 1.15) or self._is_sharp

    @property
    def stands_out(self) -> bool:
        """Whether this is more than chance even among many readings."""
        return (self.follows > 0.7 and self.contrast > 1.3) or self._is_sharp

    @property
    def _is_sharp(self) -> bool:
        # Where attention picks single patches, centres of mass say little.
        return self.contrast > 1.5 and self.wins >= max(6, 0.75 * self.cells)


class Footprints:
    """The places on the image of some of a layer's cells, by their gradients with respect to the pixels."""

    def __init__(self, strengths: Float[Tensor, "K h w"]) -> None:
        """Take the magnitude of each cell's gradient at each pixel, or block of pixels."""
        self.alive = strengths.sum((1, 2)) > 0
        mean = strengths.mean((1, 2), keepdim=True)
        strengths = strengths / torch.where(mean > 0, mean, 1)
        # Pixels that all cells depend on say nothing about any of them.
        shared = strengths.sum(0) / self.alive.sum().clamp(min=1)
        self.strengths = strengths / (shared + shared.mean()).clamp(min=1e-30)

    @classmethod
    def of(cls, cells: Iterable[Float[Tensor, " K"]], image: Float[Tensor, "1 C H W"]) -> Footprints | None:
        """Differentiate cells with respect to the pixels; None if they do not depend on them at all."""
        chance = torch.Generator().manual_seed(0)
        samples = min(_SAMPLES, image.shape[2]), min(_SAMPLES, image.shape[3])
        strengths, depends = [], False
        for cell in cells:
            mix = torch.randn(cell.shape, generator=chance).to(cell)
            (slope,) = torch.autograd.grad((cell * mix).sum(), image, retain_graph=True, allow_unused=True)
            depends |= slope is not None
            slope = torch.zeros_like(image) if slope is None else slope.nan_to_num(0, 0, 0)
            power = slope.float().square().sum(1)
            strengths.append(F.adaptive_avg_pool2d(power, samples).sqrt())
        return cls(torch.cat(strengths).cpu()) if depends else None

    def centroids(self, axis: int) -> Float[Tensor, " K"]:
        """Return each footprint's place along the height (0) or the width (1), as a fraction of it."""
        length = self.strengths.shape[1 + axis]
        profile = self.strengths.sum(2 - axis)
        return profile @ _middles(length) / profile.sum(1).clamp(min=1e-30)

    def fits(self, readings: dict[Grid, dict[int, tuple[int, int]]]) -> dict[Grid, Fit]:
        """Compare footprints with the places that several readings give the cells.

        Args:
            readings: For each reading, row and column of the cells that it takes for places, by index.
        """
        count = len(self.strengths)
        fits: dict[Grid, Fit] = {}
        for grids in [[*readings][i : i + 128] for i in range(0, len(readings), 128)]:
            centres = torch.zeros(len(grids), count, 2, dtype=torch.float32)
            for centre, grid in zip(centres, grids, strict=True):
                if readings[grid]:
                    where = [grid.centre(*place) for place in readings[grid].values()]
                    centre[[*readings[grid]]] = torch.tensor(where, dtype=torch.float32)
            asked = torch.tensor([[k in readings[grid] for k in range(count)] for grid in grids]) & self.alive
            shares = [[1 / side for side in grid.shape] for grid in grids]
            sides = torch.tensor(shares, dtype=torch.float32)
            fits |= dict(zip(grids, self._compare(centres, asked, sides), strict=True))
        return fits

    def _compare(
        self, centres: Float[Tensor, "G K 2"], asked: Bool[Tensor, "G K"], sides: Float[Tensor, "G 2"]
    ) -> list[Fit]:
        follows, draws = [], []
        for axis in (0, 1):
            along, cell = centres[..., axis], sides[:, axis, None]
            spread = along.masked_fill(~asked, -9).amax(1) - along.masked_fill(~asked, 9).amin(1)
            varies = spread > cell[:, 0] / 2
            follows.append(torch.where(varies, _correlation(along, self.centroids(axis), asked), 1.0))
            length = self.strengths.shape[1 + axis]
            reach = 0.5 * cell[..., None] + 0.5 / length
            draw = torch.exp(-0.5 * ((_middles(length) - along[..., None]) / reach) ** 2)
            draws.append(draw / draw.sum(2, keepdim=True))
        hits = torch.einsum("khw,gjw->gkjh", self.strengths, draws[1])
        hits = (hits * draws[0][:, None]).sum(3) * (asked[:, :, None] & asked[:, None])
        cells = asked.sum(1)
        mean = hits.sum((1, 2)) / cells.square().clamp(min=1)
        contrast = hits.diagonal(dim1=1, dim2=2).sum(1) / cells.clamp(min=1) / mean.clamp(min=1e-30)
        wins = ((hits.argmax(1) == torch.arange(asked.shape[1])) & asked).sum(1)
        columns = torch.stack(follows).amin(0), contrast, wins, cells
        enough = min(4, asked.shape[1])
        return [
            Fit(*row) if row[3] >= enough else Fit(0.0, 1.0, 0, row[3])
            for row in zip(*(column.tolist() for column in columns), strict=True)
        ]


def _middles(length: int) -> Float[Tensor, " {length}"]:
    # Given explicitly: a Trainer in another precision changes the default.
    return (torch.arange(length, dtype=torch.float32) + 0.5) / length


def _correlation(
    one: Float[Tensor, "G K"], other: Float[Tensor, " K"], which: Bool[Tensor, "G K"]
) -> Float[Tensor, " G"]:
    count = which.sum(1, keepdim=True).clamp(min=1)
    one, other = (
        (values - (values * which).sum(1, keepdim=True) / count) * which
        for values in (one, other.expand_as(one))
    )
    scale = (one.square().sum(1) * other.square().sum(1)).sqrt()
    return (one * other).sum(1) / scale.clamp(min=1e-12)


def coverage(
    features: Float[Tensor, "1 K h w"], image: Float[Tensor, "1 C H W"]
) -> list[tuple[float, float]] | None:
    """Return the part of the image that a layer's cells span: (start, end) of its height and of its width.

    As fractions of the sides. None if cells see too much of the image to decide, as in later layers.
    """
    cells = spread_cells(*features.shape[2:])
    footprints = Footprints.of([features[0, :, row, column] for row, column in cells], image)
    if footprints is None or int(footprints.alive.sum()) < 3:
        return None
    spans = []
    for axis, length in enumerate(features.shape[2:]):
        places, which = footprints.centroids(axis).float(), footprints.alive[None]
        middles = [(cell[axis] + 0.5) / length for cell in cells]
        expected = torch.tensor(middles, dtype=torch.float32)
        if abs(float(_correlation(expected[None], places, which)[0])) < 0.99:
            return None
        expected, places = expected[which[0]], places[which[0]]
        expected, middle = expected - expected.mean(), float(expected.mean())
        slope = float(expected @ places / expected.square().sum())
        start = float(places.mean()) - slope * middle
        spans.append((min(start, start + slope), max(start, start + slope)))
    return spans


def seen(features: Float[Tensor, "1 K h w"], image: Float[Tensor, "1 C H W"]) -> list[tuple[float, float]]:
    """Return the part of the image that a layer depends on: (start, end) of its height and of its width.

    As fractions of the sides. Pixels that are only seen through an image's mean or the like do not count.
    """
    mix = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
    (slope,) = torch.autograd.grad((features * mix).sum(), image, retain_graph=True)
    power = slope[0].float().nan_to_num(0, 0, 0).square().sum(0)
    spans = []
    for other in (1, 0):
        lines = power.mean(other).sqrt()
        place = (lines > 0.1 * lines.amax()).nonzero()[:, 0].tolist() or [0, len(lines) - 1]
        spans.append((place[0] / len(lines), (place[-1] + 1) / len(lines)))
    return spans
