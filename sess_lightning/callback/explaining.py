"""Explains samples in the precision in which a Trainer validates them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from sess_lightning.introspection.lending import borrowed, explaining, muted
from sess_lightning.introspection.logits import classify, predict
from sess_lightning.metrics import SESSMetric
from sess_lightning.types import Batch


def explain(
    metric: SESSMetric, trainer: Trainer, model: LightningModule, samples: Batch, numbers: Sequence[int],
    target: Literal["label", "predicted"],
) -> None:  # fmt: skip
    """Have a metric explain and score samples.

    Args:
        metric: Keeps what comes of it.
        trainer: Knows the precision.
        model: What is explained.
        samples: On the model's device.
        numbers: Which of all samples they are.
        target: Which class is explained.
    """
    precision = trainer.precision_plugin
    with torch.inference_mode(False), precision.forward_context(), muted(model):
        images = precision.convert_input(samples.images)
        labels, regions = samples.labels, samples.masks if samples.masks is not None else samples.boxes
        if target == "predicted":
            labels, regions = _predicted(model, images, labels, regions)
        metric.update(
            model, images, labels, regions, difficult=samples.difficult, size=samples.size, numbers=numbers
        )


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
