"""Examiner: explains samples and scores their maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from sess_lightning.callback.batches import read_batch
from sess_lightning.callback.plan import RunPlan, plan_run
from sess_lightning.callback.sampling import Kept
from sess_lightning.callback.settings import Settings
from sess_lightning.callback.watching import Watcher
from sess_lightning.introspection.lending import borrowed, explaining, muted
from sess_lightning.introspection.logits import classify, predict
from sess_lightning.metrics import SESSMetric
from sess_lightning.types import Batch

GRID = 16
"""Side of the small maps by which runs are compared."""


class Examiner:
    """Explains and scores samples, in the precision in which a Trainer validates them.

    Args:
        settings: What is wanted.

    Attributes:
        plan: What a run does; None until the first batch has passed.
        watcher: Sees what validation calls, so that the same is explained.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.plan: RunPlan | None = None
        self.watcher = Watcher(settings.forward)
        self._metric: SESSMetric | None = None

    def forget(self) -> None:
        """Begin anew: another model, perhaps."""
        self.plan, self._metric = None, None
        self.watcher.start()

    def metric(self, model: LightningModule) -> SESSMetric:
        """Return the metric, made on first use: a process that no batch reaches gathers from others, too."""
        if self._metric is None:
            method, compare = self._settings.methods(model)
            self._metric = SESSMetric(method, compare=compare, grid=GRID).to(model.device)
        return self._metric

    @property
    def details(self) -> Mapping[str, Any]:
        """How the scores are made, in words and numbers."""
        return {} if self.plan is None else self.plan.details

    @property
    def count(self) -> float:
        """Samples of the whole data set; infinite if unknown."""
        return float("inf") if self.plan is None else self.plan.count

    def read(self, batch: Any) -> Batch:
        """Read a batch, its images as the step fed them to the model."""
        samples = read_batch(batch, self._settings.batch_adapter)
        self.watcher.settle(samples.labels)
        return self.watcher.fed(samples)

    def settle(
        self, trainer: Trainer, model: LightningModule, batch: Batch, batch_idx: int, batches: float
    ) -> RunPlan:
        """Settle what runs do, from the first batch that passes."""
        self.plan = plan_run(self._settings, trainer, model, batch, batch_idx, batches)
        return self.plan

    def explain(self, trainer: Trainer, model: LightningModule, kept: Kept) -> SESSMetric:
        """Explain and score samples, and return the metric, whose ``latest`` they are now.

        Args:
            trainer: Knows the precision.
            model: What is explained.
            kept: The samples, on the host.
        """
        metric, samples = self.metric(model), kept.samples.to(model.device)
        metric.tolerance = self._settings.tolerance_on(samples)
        if self.plan is not None:
            metric.limits = dict(self.plan.limits)
        precision = trainer.precision_plugin
        bound, precise = self.watcher.bound(model, samples), precision.forward_context()
        with bound, torch.inference_mode(False), precise, muted(model):
            images = precision.convert_input(samples.images)
            labels, regions = samples.labels, samples.masks if samples.masks is not None else samples.boxes
            if self._settings.target == "predicted":
                labels, regions = _predicted(model, images, labels, regions)
            metric.update(
                model, images, labels, regions,
                difficult=samples.difficult, size=samples.size, numbers=kept.numbers,
            )  # fmt: skip
        return metric


def _predicted(model: nn.Module, images: Tensor, labels: Tensor, regions: Any) -> tuple[Tensor, Any]:
    """Return the predicted classes; the regions are the label's, so that another prediction is no trial."""
    with explaining(model), torch.no_grad():
        logits = classify(model, borrowed(images))
    predicted = predict(logits)
    right = predicted == labels
    if isinstance(regions, Tensor):
        regions = regions & right[:, None, None]
    elif regions is not None:
        regions = [box * same for box, same in zip(regions, right, strict=True)]
    return predicted, regions
