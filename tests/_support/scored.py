"""What the tests of SESSMetric score: methods without a model, targets, and areas by hand."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sess_lightning import SESS
from sess_lightning.methods import GradCAM
from sess_lightning.metrics.functional import (
    curve_auc,
    deletion_curve,
    insertion_curve,
)
from sess_lightning.ops import min_max
from sess_lightning.types import Activation, Explanation, SaliencyMethod


@dataclass(frozen=True)
class Channel(SaliencyMethod):
    """A map without a forward: one of the image's own channels."""

    channel: int = 0
    activation: Activation = "softmax"
    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        return Explanation(min_max(images[:, self.channel]), torch.ones(len(images)))


@dataclass(frozen=True)
class Flat(SaliencyMethod):
    """Flat on images that begin with a negative pixel."""

    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        lively = images[:, 0, 0, 0] >= 0
        return Explanation(min_max(images[:, 0]) * lively[:, None, None], torch.ones(len(images)))


TARGETS = torch.tensor([0, 1, 2, 3, 1, 0])


FIGURES = {"insertion", "deletion", "overall"}


def with_intervals(names):
    return {f"{name}{end}" for name in names for end in ("", "_ci_low", "_ci_high")}


def run(metric, model, images, regions=None, parts=(slice(0, 6),), **kwargs):
    for part in parts:
        metric.update(
            model, images[part], TARGETS[part], None if regions is None else regions[part], **kwargs
        )
    return metric.compute()


def areas(model, images, maps, targets=TARGETS):
    insertion = curve_auc(insertion_curve(model, images, maps, targets)).double()
    deletion = curve_auc(deletion_curve(model, images, maps, targets)).double()
    return insertion, deletion


TWO_SCALES = SESS(GradCAM(), num_scales=2)
