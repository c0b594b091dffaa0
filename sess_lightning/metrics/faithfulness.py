"""Insertion and deletion as torchmetrics Metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from sess_lightning.metrics.functional import (
    Ties,
    curve_auc,
    deletion_curve,
    insertion_and_deletion_curves,
    insertion_curve,
)
from sess_lightning.metrics.per_sample import PerSample, keep_apart
from sess_lightning.metrics.plots import plot_curves
from sess_lightning.scores import CURVES, DELETION, INSERTION, OVERALL
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
        self.append(**{self._state: curves})

    @property
    def curves(self) -> Float[Tensor, "N T"]:
        """Every sample's curve so far."""
        return self.rows(self._state)

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean area under the curves; NaN before the first update."""
        return curve_auc(self.curves).mean()

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the mean curve, or values over time; return matplotlib's figure and axes.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of such; None plots the mean curve.
            ax: Axes to draw on; None makes a figure.
        """
        return _plotted(self, (self._state,), ax) if val is None else self._plot(val, ax)


class Insertion(_Faithfulness):
    """Area under the insertion curve, higher is better: mean over samples of ``insertion_curve``'s area.

    Args:
        steps: Number of steps of a curve.
        ties: Order of pixels of equal saliency.
        activation: How logits become probabilities.
        batch_size: Images that go through the model at once; None takes what memory allows.
        kwargs: For ``torchmetrics.Metric``.

    >>> insertion = Insertion(steps=4)
    >>> insertion.update(model, images, maps, targets)
    >>> insertion.compute() > 0.7
    tensor(True)
    """

    higher_is_better = True
    _curve = staticmethod(insertion_curve)
    _state = INSERTION


class Deletion(_Faithfulness):
    """Area under the deletion curve, lower is better: mean over samples of ``deletion_curve``'s area.

    Arguments as for ``Insertion``.

    >>> deletion = Deletion(steps=4)
    >>> deletion.update(model, images, maps, targets)
    >>> deletion.compute() < 0.5
    tensor(True)
    """

    higher_is_better = False
    _curve = staticmethod(deletion_curve)
    _state = DELETION


class InsertionDeletion(PerSample):
    """Insertion, deletion and their difference at once, from one stream of full batches.

    Args:
        steps: Number of steps of a curve.
        activation: How logits become probabilities.
        batch_size: Images that go through the model at once; None takes what memory allows.
        kwargs: For ``torchmetrics.Metric``.

    >>> both = InsertionDeletion(steps=4)
    >>> both.update(model, images, maps, targets)
    >>> sorted(both.compute())
    ['deletion', 'insertion', 'overall']
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def __init__(
        self,
        steps: int = 28,
        activation: Activation = "softmax",
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.steps, self.activation, self.batch_size = steps, activation, batch_size
        for name in CURVES:
            self.add_rows(name, steps + 1)
        keep_apart(self, activation)

    def update(
        self,
        model: nn.Module,
        images: Float[Tensor, "B C H W"],
        maps: Float[Tensor, "B H W"],
        targets: Int[Tensor, " B"],
    ) -> None:
        """Measure both curves of ``maps``; arguments as for ``insertion_and_deletion_curves``."""
        ((insertion, deletion),) = insertion_and_deletion_curves(
            model, images, [maps], targets, steps=self.steps, activation=self.activation,
            batch_size=self.batch_size,
        )  # fmt: skip
        self.append(**{INSERTION: insertion, DELETION: deletion})

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the mean areas under both curves, and their difference; NaN before the first update."""
        insertion, deletion = (curve_auc(self.rows(name)).mean() for name in CURVES)
        return {INSERTION: insertion, DELETION: deletion, OVERALL: insertion - deletion}

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot both mean curves, or values over time; arguments as for ``Insertion.plot``."""
        return _plotted(self, CURVES, ax) if val is None else self._plot(val, ax)


def _plotted(metric: PerSample, names: tuple[str, ...], ax: Any) -> Any:
    with metric.gathered():
        curves = {name: metric.rows(name).nanmean(0).float().cpu() for name in names}
    return plot_curves(curves, ax, type(metric).__name__)
