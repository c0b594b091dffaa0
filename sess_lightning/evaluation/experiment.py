"""What an experiment measures, and how images reach the model."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from sess_lightning.engine.windows import scaled_size
from sess_lightning.introspection.sizes import input_size, takes
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.methods.controls import controls
from sess_lightning.metrics import SESSMetric
from sess_lightning.ops import resize, size_of, wait_for
from sess_lightning.types import SaliencyMethod

FORMAT = 3
"""Version of the records: 2 marks where a new image begins, 3 has all methods in one column."""

GREY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey, as Pillow and torchvision have them."""


@dataclass(frozen=True)
class Experiment:
    """What is measured, and how images reach the model.

    Attributes:
        method: The method to score.
        compare: Methods to score beside it, by name; None is the base of a SESS, and the controls: a
            random map, a centre Gaussian and the base's map, blurred.
        size: Side of the images that the model was built for, px.
        target: Explain each class that the labels name (``"label"``), or once per image what the model
            ``"predicted"``, which is a trial of the Pointing Game only where a label agrees.
        framing: ``"short"`` resizes the shorter side to ``size`` and floors the longer one (Pointing Game);
            ``"square"`` warps the image to a square (insertion and deletion); ``"stored"`` leaves it as is.
        antialias: Antialias when the image is downsampled; the Pointing Game's literature does not.
        mean: Mean per channel, of pixels in [0, 1]; a single one makes images grey.
        std: Standard deviation per channel.
        curves: Whether to draw insertion and deletion curves.
        limits: For how many images, drawn at random, curves are measured; the Pointing Game covers all. A
            number for all methods, or one per method by its name in ``compare`` (``""`` is the method
            itself); None and names that are left out have no limit.
        steps: Number of steps of a curve.
        tolerance: Tolerance of the Pointing Game, px at original resolution.
        batch_size: Images that go through the model at once.
        samples: How many images to draw at random; None takes all.
        seed: Seed of the draw.

    Raises:
        ValueError: If a number is out of range.
    """

    method: SaliencyMethod = SESS(GradCAM())  # noqa: RUF009 (Methods are frozen records.)
    compare: dict[str, SaliencyMethod] | None = None
    target: Literal["label", "predicted"] = "label"
    size: int = 224
    framing: Literal["short", "square", "stored"] = "short"
    antialias: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    curves: bool = True
    limits: int | dict[str, int] | None = None
    steps: int = 28
    tolerance: float = 15.0
    batch_size: int = 32
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "steps", "batch_size", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        limits = self.limits.values() if isinstance(self.limits, dict) else (self.limits or 0,)
        if min(limits, default=0) < 0:
            raise ValueError(f"limits must not be negative, got {self.limits}; leave them out for no limit.")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance must be positive px, got {self.tolerance}.")
        if len(self.mean) not in (1, 3) or len(self.std) not in (1, len(self.mean)):
            raise ValueError(
                f"mean and std need a value for each of 3 channels, or one for all, got {[*self.mean]} and "
                f"{[*self.std]}."
            )
        if not all(0 < deviation < math.inf for deviation in self.std):
            raise ValueError(f"std must be positive, got {[*self.std]}; [1, 1, 1] leaves pixels in 0..1.")
        if not all(-1 <= mean <= 1 for mean in self.mean):
            raise ValueError(f"mean is of pixels in 0..1, got {[*self.mean]}; divide it, and std, by 255.")

    def methods(self) -> dict[str, SaliencyMethod]:
        """Return the methods that are scored beside it, by name."""
        return dict(self.compare) if self.compare is not None else controls(self.method, blurred=True)

    def metric(self) -> SESSMetric:
        """Return the metric that scores a sample."""
        return SESSMetric(
            self.method,
            compare=self.methods(),
            steps=self.steps,
            tolerance=self.tolerance,
            batch_size=self.batch_size,
            clock=_read_clock,
            distributed_available_fn=_never,  # Processes share records, not collectives.
        )

    def without_curves(self, count: int) -> dict[int, dict[str, int]]:
        """Return, for each image chosen out of ``count``, the methods without curves, as metric's limits."""
        chosen, names = self.chosen(count), ("", *self.methods())
        limits = self.limits if isinstance(self.limits, dict) else dict.fromkeys(names, self.limits)
        if unknown := sorted(set(limits) - set(names)):
            raise ValueError(f"limits: there is no method {unknown[0]!r}; they are {[*names]}.")
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return {
            image: {
                name: 0
                for name in names
                if not self.curves or ((limit := limits.get(name)) is not None and place >= limit)
            }
            for image, place in zip(chosen, order, strict=True)
        }

    def images(self, picture: Real[Tensor, "3 H W"]) -> Float[Tensor, "1 C h w"]:
        """Return an image with pixels in 0..255 as the model takes it."""
        size = size_of(picture)
        if self.framing == "short":
            size = scaled_size(*size, self.size)
        elif self.framing == "square":
            size = self.size, self.size
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        if len(self.mean) == 1:
            picture = (torch.tensor(GREY).view(3, 1, 1) * picture).sum(0, keepdim=True)
        return resize(((picture / 255 - mean) / std)[None], size, self.antialias)

    def framed_for(self, model: nn.Module) -> Experiment:
        """Return the experiment with squares, of the size that a model states, if it takes nothing else."""
        size = (self.size, self.size + 32)
        if takes(model, size):
            return self
        taken = input_size(model, size)
        if taken == size and not takes(model, (self.size, self.size)):
            return self
        return replace(self, framing="square", size=min(taken))

    def chosen(self, count: int) -> list[int]:
        """Return the indices of the images to take out of ``count``, in rising order."""
        if self.samples is None or self.samples >= count:
            return list(range(count))
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return sorted(drawn[: self.samples].tolist())


def _never() -> bool:
    return False


def _read_clock(device: torch.device) -> float:
    wait_for(device)
    return time.perf_counter()
