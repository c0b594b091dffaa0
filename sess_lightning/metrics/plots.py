"""Figures of metrics, as torchmetrics draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import plot_curve, plot_single_or_multi_val
from typing_extensions import override

from sess_lightning.metrics.curves import curve_auc
from sess_lightning.scores import CURVES, OVERALL, POINTING_GAME, RELEVANCE_MASS, SCORES

MAIN = (*CURVES, OVERALL, POINTING_GAME, RELEVANCE_MASS)
"""The scores that are plotted unless others are chosen."""


class PlotsValues(Metric):
    """A metric that plots its values, as torchmetrics' own do."""

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot values as points, or over time; return matplotlib's figure and axes.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of such; None computes it.
            ax: Axes to draw on; None makes a figure.
        """
        return self._plot(val, ax)


def plot_scores(
    values: Mapping[str, float] | Sequence[Mapping[str, float]], ax: Any = None, keys: Sequence[str] = MAIN
) -> Any:
    """Plot scores as points, or lines where there are several steps; return matplotlib's figure and axes.

    Args:
        values: What ``SESSMetric.compute`` or its ``forward`` returned, or a list of such.
        ax: Axes to draw on; None makes a figure.
        keys: Which scores; those that a step lacks are left out.
    """
    steps = [values] if isinstance(values, Mapping) else list(values)
    known = [key for key in keys if all(key in step for step in steps)]
    points = [{key: torch.tensor(float(step[key]), device="cpu") for key in known} for step in steps]
    return plot_single_or_multi_val(points if len(points) > 1 else points[0], ax=ax, name="SESSMetric")


def plot_curves(curves: Mapping[str, Float[Tensor, " T"]], ax: Any, name: str) -> Any:
    """Plot mean curves with their areas; return matplotlib's figure, None where there is one, and axes.

    Args:
        curves: Key of a score -> its mean curve, on the host.
        ax: Axes to draw on; None makes a figure.
        name: Title.
    """
    figure = None
    for key, curve in curves.items():
        share = torch.linspace(0, 1, len(curve), device=curve.device)
        made, ax = plot_curve(
            (share, curve, share), score=curve_auc(curve), ax=ax,
            label_names=("share of pixels changed, most salient first", "probability"), name=name,
        )  # fmt: skip
        figure = figure or made
        # torchmetrics names a curve only where there are several classes.
        ax.lines[-1].set_label(f"{SCORES[key].label}, area {curve_auc(curve):.3f}")
    ax.legend()
    ax.set_ylim(-0.05, 1.05)
    return figure, ax
