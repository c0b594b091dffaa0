"""One score of many as a scalar, for torchmetrics' wrappers that need one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric
from typing_extensions import override

from sess_lightning.metrics.plots import PlotsValues
from sess_lightning.scores import OVERALL, SCORES, Key, split


class SingleScore(PlotsValues, WrapperMetric):
    """A scalar view of a metric that returns a dict, as ``MetricTracker`` and ``MinMaxMetric`` need it.

    Args:
        metric: A ``SESSMetric`` or ``InsertionDeletion``.
        key: One of the keys that its ``compute`` returns, such as ``"overall"`` or ``"base/insertion"``.

    Raises:
        ValueError: If the key does not name a score.

    >>> from torchmetrics.wrappers import MetricTracker
    >>> tracker = MetricTracker(SingleScore(SESSMetric(SESS(GradCAM())), "overall"))
    >>> tracker.maximize
    True
    """

    is_differentiable = False

    def __init__(self, metric: Metric, key: str = OVERALL) -> None:
        super().__init__()
        parts = split(key)
        if parts is None:
            raise ValueError(
                f'SingleScore: key must name a score, such as "overall" or "base/insertion", got {key!r}.'
            )
        self.metric, self.key = metric, key
        self._parts: Key = parts

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """Which end of the score is the good one; None where neither is."""
        better = SCORES[self._parts.score].better
        return better == "higher" if better else None

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Update the metric."""
        self.metric.update(*args, **kwargs)

    def compute(self) -> Float[Tensor, ""]:
        """Return the score; NaN where there is none."""
        return self._picked(self.metric.compute())

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        """Update the metric, and return the score of this batch alone."""
        return self._picked(self.metric(*args, **kwargs))

    @override
    def reset(self) -> None:
        """Reset the metric."""
        self.metric.reset()
        super().reset()

    def _picked(self, values: dict[str, Any]) -> Float[Tensor, ""]:
        value = values.get(self.key, torch.nan)
        return torch.as_tensor(value, dtype=torch.float32, device=self.metric.device)
