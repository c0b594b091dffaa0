"""The Pointing Game as a torchmetrics Metric."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sess_lightning.metrics.functional import class_mean, pointing_hits
from sess_lightning.metrics.per_sample import WholeCounts, keep_apart
from sess_lightning.metrics.plots import PlotsValues
from sess_lightning.ops import size_of
from sess_lightning.regions import Regions, has_region, read_regions


class PointingGame(PlotsValues, WholeCounts):
    """Does the highest point of a map lie on the object? Mean over classes of hits / (hits + misses).

    Args:
        num_classes: Number of classes.
        tolerance: Distance below which a point hits, px of the regions' resolution, exclusive.
        unseen_as_zero: Count classes without a trial as 0 in the mean, as TorchRay does.
        average: ``"macro"`` for the mean over classes, ``"none"`` for each class's accuracy, which
            ``torchmetrics.wrappers.ClasswiseWrapper`` names; NaN for classes without a trial.
        kwargs: For ``torchmetrics.Metric``.

    Attributes:
        hits: Hits per class, int64.
        misses: Misses per class, int64.
        skipped: Maps without a region, int64.

    Raises:
        ValueError: If an argument is out of range.

    Source: Zhang et al., IJCV 2018, with TorchRay's rules.

    >>> game = PointingGame(num_classes=3, tolerance=2.0)
    >>> game.update(maps, [torch.tensor([[8.0, 8.0, 24.0, 24.0]])], targets)
    >>> game.compute(), game.per_class()
    (tensor(1.), tensor([1., nan, nan]))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    plot_legend_name = "Class"
    hits: Tensor
    misses: Tensor
    skipped: Tensor

    def __init__(
        self,
        num_classes: int,
        tolerance: float = 15.0,
        unseen_as_zero: bool = False,
        average: Literal["macro", "none"] = "macro",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"PointingGame: num_classes must be at least 1, got {num_classes}.")
        if average not in ("macro", "none"):
            raise ValueError(f'PointingGame: average must be "macro" or "none", got {average!r}.')
        self.num_classes, self.tolerance = num_classes, tolerance
        self.unseen_as_zero, self.average = unseen_as_zero, average
        for name in ("hits", "misses"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("skipped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        keep_apart(self, tolerance)

    def update(
        self,
        maps: Float[Tensor, "B h w"],
        regions: Regions,
        targets: Int[Tensor, " B"],
        size: tuple[int, int] | None = None,
    ) -> None:
        """Play one trial per map.

        Args:
            maps: Saliency of each image's target.
            regions: Where the target's objects are: masks, or boxes per image, in any of the shapes that
                ``read_regions`` knows; an empty one does not count.
            targets: Class indices.
            size: (height, width) that boxes refer to, if not the maps'.

        Raises:
            TypeError: If maps or targets are not tensors, or regions are None.
            ValueError: If shapes do not fit, or a target on the CPU is not one of the classes.
        """
        _check_kinds(maps, regions, targets)
        if targets.shape != maps.shape[:1]:
            raise ValueError(
                f"PointingGame: targets must have shape ({len(maps)},), one class index per map, got "
                f"{tuple(targets.shape)}."
            )
        values = targets.tolist() if targets.is_cpu else []
        if not all(0 <= value < self.num_classes for value in values):
            raise ValueError(
                f"PointingGame: targets must be class indices in 0..{self.num_classes - 1}, got "
                f"{values}; pass the num_classes of the model."
            )
        regions = read_regions(regions, size=size_of(maps), labels=targets)
        hit = pointing_hits(maps, regions, self.tolerance, size)
        trial = has_region(regions, maps.device)
        # Sums rather than in place: the state may have been made in inference mode.
        self.hits = self.hits.index_add(0, targets.long(), (trial & hit).long())
        self.misses = self.misses.index_add(0, targets.long(), (trial & ~hit).long())
        self.skipped = self.skipped + (~trial).sum()

    def compute(self) -> Float[Tensor, "*K"]:
        """Return the mean accuracy over classes, NaN if there was no trial; or the accuracies themselves."""
        if self.average == "none":
            return self.per_class().nan_to_num(0.0) if self.unseen_as_zero else self.per_class()
        return class_mean(self.hits, self.hits + self.misses, self.unseen_as_zero)

    def per_class(self) -> Float[Tensor, " K"]:
        """Return each class's accuracy; NaN for classes without a trial."""
        return self.hits / (self.hits + self.misses)


def _check_kinds(maps: Any, regions: Any, targets: Any) -> None:
    for name, value in (("maps", maps), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"PointingGame: {name} must be a tensor, got {type(value).__name__}; "
                f"torch.as_tensor({name}) converts an array or a list of numbers."
            )
    if regions is None:
        raise TypeError("PointingGame: regions is None; pass masks, or boxes per image.")
