"""Insertion and deletion as torchmetrics Metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.metrics.functional import Ties, curve_auc, deletion_curve, insertion_curve
from sess_lightning.metrics.per_sample import PerSample, keep_apart
from sess_lightning.scores import DELETION, INSERTION
from sess_lightning.types import Activation


class _Faithfulness(PerSample):
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    _curve: ClassVar[Callable[..., Tensor]]
    _state: ClassVar[str]

    def __init__(
        self,
        steps: int = 28,
        ties: Ties = "first",
        activation: Activation = "softmax",
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.steps, self.ties, self.activation, self.batch_size = steps, ties, activation, batch_size
        self.add_rows(self._state, steps + 1)
        keep_apart(self, self._state, ties, activation)

    def update(
        self,
        model: nn.Module,
        images: Float[Tensor, "B C H W"],
        maps: Float[Tensor, "B H W"],
        targets: Int[Tensor, " B"],
        baseline: Float[Tensor, "B C H W"] | None = None,
    ) -> None:
        """Measure the curves of ``maps``; arguments as for the function with the same name."""
        curves = type(self)._curve(
            model, images, maps, targets, steps=self.steps, baseline=baseline, ties=self.ties,
            activation=self.activation, batch_size=self.batch_size,
        )  # fmt: skip
        getattr(self, self._state).append(curves)

    @property
    def curves(self) -> Float[Tensor, "N T"]:
        """Every sample's curve so far."""
        return self.rows(self._state)

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean area under the curves; NaN before the first update."""
        return curve_auc(self.curves).mean()


class Insertion(_Faithfulness):
    """Area under the insertion curve, higher is better: mean over samples of ``insertion_curve``'s area.

    Args:
        steps: Number of steps of a curve.
        ties: Order of pixels of equal saliency.
        activation: How logits become probabilities.
        batch_size: Images that go through the model at once; None by the memory there is.
        kwargs: For ``torchmetrics.Metric``.
    """

    higher_is_better = True
    _curve = staticmethod(insertion_curve)
    _state = INSERTION


class Deletion(_Faithfulness):
    """Area under the deletion curve, lower is better: mean over samples of ``deletion_curve``'s area.

    Arguments as for ``Insertion``.
    """

    higher_is_better = False
    _curve = staticmethod(deletion_curve)
    _state = DELETION
