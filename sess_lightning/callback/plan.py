"""What a validation run will do on this model, these images and this loader, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sess_lightning.callback.classes import MOST_CLASSES
from sess_lightning.callback.gallery import Legend
from sess_lightning.callback.loaders import Source
from sess_lightning.callback.sampling import Choice, Share, find_samples
from sess_lightning.callback.settings import Settings
from sess_lightning.cost.budget import SHARED, Budget
from sess_lightning.metrics.sess_metric import OWN
from sess_lightning.ops import size_of
from sess_lightning.regions import describe_regions
from sess_lightning.types import Activation, Batch


@dataclass(frozen=True)
class RunPlan:
    """What every run does, decided on the first batch.

    Attributes:
        size: (height, width) of the images.
        source: The loader of the samples.
        part: Which samples this rank explains or, if their order is unknown, how many.
        budget: What is paid for: on all ranks together, or on each that chooses for itself.
        limits: For how many samples a compared method's curves are measured, by name; for all if missing.
        count: Number of samples of the whole data set, on which accuracy is measured; infinite if unknown.
        legend: How samples and methods are named and displayed.
        details: How the scores are measured, in words and numbers.
        cut: Why there are fewer samples than asked for; empty if there are as many.
        misfit: Which arguments do not fit the model or its images; empty if all do.
    """

    size: tuple[int, int]
    source: Source
    part: Choice | Share
    budget: Budget
    limits: Mapping[str, int]
    count: float
    legend: Legend
    details: Mapping[str, Any]
    cut: str = ""
    misfit: str = ""

    @property
    def forwards(self) -> int:
        """Forward passes of this rank in a run, at most."""
        return self.budget.forwards * self.part.count // max(1, int(self.details["samples"]))

    @property
    def line(self) -> str:
        """The announcement."""
        details = self.details
        beside = details["beside (samples)"]
        samples, passes = details["samples"], details["forwards per map"]
        return (
            f"each run explains {samples} sample{'s' * (samples != 1)} of {self.size[0]}x{self.size[1]} px "
            f"with {details['method']}, {passes} forward pass{'es' * (passes != 1)} per map"
            f"{beside and ', compared with '}{beside}; {details['objects']}; "
            f"at most {details['forwards per run, at most']:,} forward passes per run"
            f"{self.cut and '; '}{self.cut}"
        )


def plan_run(
    settings: Settings,
    trainer: Trainer,
    model: LightningModule,
    batch: Batch,
    batch_idx: int,
    source: Source,
    loaders: Any,
    activation: Activation | None = None,
    logits: int | None = None,
) -> RunPlan:
    """Decide what runs do.

    Args:
        settings: The callback's arguments.
        trainer: The Trainer of all ranks.
        model: The model to explain.
        batch: The first batch.
        batch_idx: Its index.
        source: The batch's loader.
        loaders: All loaders of the run.
        activation: How logits become probabilities, according to labels or the loss.
        logits: Number of the model's logits, if known.

    Raises:
        ValueError: If the budget does not pay for a single sample.
    """
    size = size_of(batch.images)
    order = find_samples(source, batch.loaded, batch_idx, trainer.global_rank, trainer.world_size)
    shares, available = order.shares, float(order.length)
    classes = MOST_CLASSES if settings.target == "label" and batch.activation == "sigmoid" else 1
    budget = settings.budget(model, size, available, shares, classes)
    method, compare = settings.methods(model, activation)
    limits = {name: budget.controls for name, other in compare.items() if other.forwards == 0}
    owners = (trainer.datamodule, loaders, model)  # type: ignore[attr-defined]
    legend = _legend(settings, {OWN: method, **compare}, owners, batch, logits)
    details = _details(settings, trainer, model, batch, legend, budget, shares)
    part, cut = order.choose(budget.samples), _cut(settings, budget, available, shares)
    misfit = settings.misfit(logits, batch.images.shape[1])
    return RunPlan(size, source, part, budget, limits, available * shares, legend, details, cut, misfit)


def _legend(
    settings: Settings, methods: Mapping[str, Any], owners: tuple[Any, ...], batch: Batch, logits: int | None
) -> Legend:
    known = {"classes": logits and max(2, logits), "channels": batch.images.shape[1]}
    legend = settings.legend(methods, *owners, **known)
    if legend.normalisation is None or settings.normalisation is not None or not _are_pixels(batch.images):
        return legend
    return replace(legend, normalisation=([0.0], [1.0]))  # What was found comes later, in the model.


def _are_pixels(images: Tensor) -> bool:
    """Return whether a whole batch lies in 0..1: then nothing was normalised, which makes dark negative.

    Reads values: it waits for the device.
    """
    return images.is_floating_point() and len(images) > 0 and bool(((images >= 0) & (images <= 1)).all())


def _cut(settings: Settings, budget: Budget, available: float, shares: int) -> str:
    """Say why there are fewer samples than asked for."""
    samples, is_all = budget.samples * shares, budget.samples >= available
    if samples >= settings.num_samples:
        return ""
    reason = "no more pass by" if is_all else f"max_forwards={settings.max_forwards} pays for no more"
    return f"{samples} of the {settings.num_samples} samples asked for, as {reason}"


def _details(
    settings: Settings,
    trainer: Trainer,
    model: LightningModule,
    batch: Batch,
    legend: Legend,
    budget: Budget,
    shares: int,
) -> dict[str, Any]:
    """Return how scores are measured, in words and numbers."""
    size, world, names = size_of(batch.images), trainer.world_size, legend.names
    scored = {
        key: (budget.samples if method.forwards > 0 else budget.controls) * shares
        for key, method in legend.methods.items()
    }
    return {
        "method": str(legend.methods[OWN]),
        "forwards per map": legend.methods[OWN].count_forwards(model, size),
        "samples": budget.samples * shares,
        "beside (samples)": ", ".join(f"{names[key]} ({scored[key]})" for key in scored if key != OWN),
        "explained class": settings.target,
        "image size": f"{size[0]} × {size[1]} px",
        "objects": _objects(settings, batch),
        "forwards per run, at most": budget.forwards + SHARED * (world - shares),
        "model": type(model).__name__,
        "device": f"{model.device}, {trainer.precision}, {world} process{'es' * (world > 1)}",
    }


def _objects(settings: Settings, batch: Batch) -> str:
    """Describe the regions, and whether the Pointing Game is played on them."""
    regions = batch.boxes if batch.masks is None else batch.masks
    if regions is None:
        return f"{describe_regions(regions)}, no Pointing Game"
    return f"{describe_regions(regions)}, Pointing Game within {settings.tolerance_on(batch):.3g} px"
