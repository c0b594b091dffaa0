"""One sharp map from many coarse ones, of rotated and shifted copies."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs, score
from sess_lightning.methods.cam import GradCAM
from sess_lightning.methods.gradient import generator
from sess_lightning.methods.templates import WrappingMethod
from sess_lightning.ops import full_precision, min_max, size_of
from sess_lightning.types import Explanation, SaliencyMethod


class Poses(NamedTuple):
    """Poses of the copies of an image.

    Attributes:
        angles: Rotation of each copy, radians.
        shifts: Shift (down, right) of each copy, px.
    """

    angles: Float[Tensor, " N"]
    shifts: Float[Tensor, "N 2"]

    def places(self, size: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "N h w 2"]:
        """Return the places of the cells of a copy's ``grid`` on the image: (y, x) px from its centre."""
        down, right = (
            ((torch.arange(count, device=self.angles.device) + 0.5) / count - 0.5) * side
            for side, count in zip(size, grid, strict=True)
        )
        y = down[:, None] - self.shifts[:, 0, None, None]
        x = right[None, :] - self.shifts[:, 1, None, None]
        cos, sin = (turn(self.angles)[:, None, None] for turn in (torch.cos, torch.sin))
        return torch.stack([cos * y + sin * x, cos * x - sin * y], -1)


class View(NamedTuple):
    """What a coarse map sees of an image: each cell a weighted sum of pixels.

    By indices rather than ``grid_sample``, whose derivative is not deterministic on a GPU.

    Attributes:
        pixels: Their indices in the flattened image.
        weights: Their weights.
    """

    pixels: Int[Tensor, "N h w R"]
    weights: Float[Tensor, "N h w R"]

    @classmethod
    def of(cls, poses: Poses, size: tuple[int, int], grid: tuple[int, int]) -> "View":
        """Sample every cell at 3 x 3 places (fewer if it has fewer pixels), bilinearly; zero outside."""
        fine = [min(3, -(-side // count)) for side, count in zip(size, grid, strict=True)]
        places = poses.places(size, (grid[0] * fine[0], grid[1] * fine[1]))
        places = places + places.new_tensor([(side - 1) / 2 for side in size])
        corners = places[..., None, :].floor() + places.new_tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        inside = ((corners >= 0) & (corners < corners.new_tensor(size))).all(-1)
        weights = (1 - (places[..., None, :] - corners).abs()).prod(-1) * inside / (fine[0] * fine[1])
        y, x = (corners[..., axis].clamp(0, size[axis] - 1).long() for axis in (0, 1))

        def by_cell(values: Tensor) -> Tensor:
            parts: Tensor = values.unflatten(1, (-1, fine[0])).unflatten(3, (-1, fine[1]))
            return parts.transpose(2, 3).flatten(3)

        return cls(by_cell(y * size[1] + x), by_cell(weights))

    def read(self, pictures: Float[Tensor, "B H W"]) -> Float[Tensor, "B N h w"]:
        """Return the values of all copies' cells."""
        seen = pictures.flatten(1).index_select(1, self.pixels.flatten()).unflatten(1, self.pixels.shape)
        values: Tensor = (seen * self.weights).sum(-1)
        return values


@dataclass(frozen=True)
class AugmentedGradCAM(WrappingMethod):
    """Augmented Grad-CAM (Morbidelli et al., ICASSP 2020): super-resolution from rotated and shifted copies.

    The map is the image h that, posed like each copy and reduced to the base's grid, is nearest to that
    copy's map: it minimises the mean squared difference, plus its total variation and its energy, by Adam
    from zero. As in the authors' code, the first copy is the image itself, maps are normalised one by one,
    and what leaves the image is zero. Their weights, 0.002 and 0.0001 for 100 copies of 14 x 14 cells at
    224 px, are restated so that they hold for any size, grid and number of copies: variation per side, energy
    per pixel, difference per cell. Two things differ, without which peaks are cut off at a fifth and h is
    speckled where no copy looks: Adam's step is 0.02, theirs 0.001 (200 of them each), and a cell is the mean
    of 3 x 3 places in it, theirs its centre alone. Where the gradient is all but zero, rounding decides
    its sign, and Adam takes a full step: between machines or layouts, pixels differ by some hundredths.

    Costs ``num_copies`` times the base; the super-resolution itself runs no model.

    Attributes:
        base: The method that explains a copy.
        num_copies: Number of copies, including the image itself.
        max_angle: Largest rotation to either side, radians.
        max_shift: Largest shift in any direction, as a fraction of the shorter side.
        variation: Weight of the total variation.
        energy: Weight of the energy.
        steps: Steps of Adam.
        learning_rate: Learning rate of Adam.
        seed: Seed of the copies' own generator; the global one is never touched.
        batch_size: How many copies go through the model at once; never fewer than one per image.

    >>> AugmentedGradCAM(num_copies=3, steps=3)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    base: SaliencyMethod = GradCAM()  # noqa: RUF009 - frozen, so it may be shared.
    num_copies: int = 100
    max_angle: float = 0.5
    max_shift: float = 0.134
    variation: float = 0.0023
    energy: float = 0.0256
    steps: int = 200
    learning_rate: float = 0.02
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        self.check_base()
        self.check_counts("num_copies", "steps", "batch_size")

    def count_forwards(self, model: nn.Module, size: tuple[int, int]) -> int:
        """Return how many forward passes one map of an image of ``size`` (height, width) costs."""
        return self.num_copies * self.base.count_forwards(model, size)

    @property
    def scores_apart(self) -> bool:  # type: ignore[override]
        """As for the base: otherwise the scores are those of the first copy."""
        return self.base.scores_apart

    def __call__(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the maps alone: no forward pass for scores that nobody reads."""
        check_inputs(type(self).__name__, images, targets)
        with explaining(model):
            return self._sharp(model, borrowed(images), borrowed(targets))[0]

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images``; the scores are those of the images themselves."""
        check_inputs(type(self).__name__, images, targets)
        with explaining(model):
            images, targets = borrowed(images), borrowed(targets)
            maps, logs = self._sharp(model, images, targets)
            if logs is None:
                logs = score(model, images, targets, self.activation)
        return Explanation(maps, logs.exp())

    def _sharp(
        self, model: nn.Module, images: Tensor, targets: Tensor
    ) -> tuple[Float[Tensor, "B H W"], Float[Tensor, " B"] | None]:
        """Return maps, and the log-scores of the first copies if the base returns them anyway."""
        poses = self.draw(size_of(images), images.device)
        maps, logs = [], []
        size = max(1, self.batch_size // len(images))
        for part in map(Poses, poses.angles.split(size), poses.shifts.split(size)):
            copies = take_copies(images, part)
            flat, of_copy = copies.flatten(0, 1), targets.repeat(len(copies))
            if self.base.scores_apart:
                coarse = self.base(model, flat, of_copy)
            else:
                coarse, of_flat, _ = self.base.extract(model, flat, of_copy)
                logs.append(of_flat)
            maps.append(coarse.unflatten(0, copies.shape[:2]))
        sharp = self.super_resolve(torch.cat(maps).float(), poses, size_of(images))
        return min_max(sharp), torch.cat(logs)[: len(images)] if logs else None

    def draw(self, size: tuple[int, int], device: torch.device) -> Poses:
        """Draw the copies' poses; the first is the identity."""
        source = generator(device, self.seed)
        spread = 2 * torch.rand(self.num_copies, 3, generator=source, device=device) - 1
        spread[0] = 0
        return Poses(spread[:, 0] * self.max_angle, spread[:, 1:] * self.max_shift * min(size))

    def super_resolve(
        self, maps: Float[Tensor, "N B h w"], poses: Poses, size: tuple[int, int]
    ) -> Float[Tensor, "B H W"]:
        """Return the sharp maps of which the coarse maps are views, by gradient descent."""
        views = View.of(poses, size, size_of(maps))
        sharp = maps.new_zeros(maps.shape[1], *size)
        mean, square = torch.zeros_like(sharp), torch.zeros_like(sharp)
        with torch.enable_grad(), full_precision(maps.device):
            for step in range(1, self.steps + 1):
                sharp.requires_grad_()
                (slope,) = torch.autograd.grad(self.misfit(sharp, maps, views).sum(), sharp)
                mean = torch.lerp(mean, slope, 0.1)
                square = torch.lerp(square, slope**2, 0.001)
                pace = self.learning_rate / (1 - 0.9**step)
                sharp = sharp.detach() - pace * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        return sharp

    def misfit(
        self, sharp: Float[Tensor, "B H W"], maps: Float[Tensor, "N B h w"], views: View
    ) -> Float[Tensor, " B"]:
        """Return the loss, per image."""
        difference = (views.read(sharp) - maps.transpose(0, 1)).square().mean((1, 2, 3))
        edges = sharp.diff(dim=1).abs().sum((1, 2)) + sharp.diff(dim=2).abs().sum((1, 2))
        side = (sharp.shape[1] * sharp.shape[2]) ** 0.5
        loss: Tensor = difference + self.variation * edges / side + self.energy * sharp.square().mean((1, 2))
        return loss


def take_copies(images: Float[Tensor, "B C H W"], poses: Poses) -> Float[Tensor, "N B C H W"]:
    """Rotate and shift; zero, the mean of normalised images, comes in from outside."""
    size = size_of(images)
    y, x = poses.places(size, size).unbind(-1)
    where = torch.stack([x * (2 / size[1]), y * (2 / size[0])], -1)
    stacked = images.float().flatten(0, 1).expand(len(where), -1, -1, -1)
    copies = F.grid_sample(stacked, where, align_corners=False).to(images.dtype)
    copied: Tensor = copies.unflatten(1, images.shape[:2])
    return copied
