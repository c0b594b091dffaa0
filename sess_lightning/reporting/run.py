"""Everything that one validation run reports, in one record."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sess_lightning.reporting.dashboard import Difference
from sess_lightning.reporting.panels import Panel, Picture, curve_figure, sheet
from sess_lightning.scores import CURVES_N, build

LARGEST = 65_500
"""Of JPEG, px."""
QUALITY = 90
"""Of JPEG, with colours in full resolution: a PNG takes seven times as long, and four times the bytes."""


class Drawing:
    """An image that is drawn when the first sink asks for it, and encoded once for all of them.

    Args:
        draw: Draws it.
    """

    def __init__(self, draw: Callable[[], Picture]) -> None:
        self._draw = draw

    @cached_property
    def picture(self) -> Picture:
        """The image itself."""
        return self._draw()

    @cached_property
    def jpeg(self) -> bytes:
        """The image as a JPEG file."""
        return _encoded(self.picture)


def _encoded(picture: Picture) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(picture)
    image.thumbnail((LARGEST, LARGEST))  # A sheet of some three hundred samples is larger.
    image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()


@dataclass(frozen=True)
class RunReport:
    """One validation run, as every sink gets it.

    Methods have keys: ``""`` is the explained one, the others have the names they were given.

    Attributes:
        prefix: First part of all keys that loggers see, such as ``"sess"``.
        epoch: Epochs finished before the run.
        step: Optimiser steps so far.
        method: Display name of the explained method.
        values: Score, such as ``"insertion"`` or ``"base/insertion"`` -> value.
        names: Key of a compared method -> display name; a missing method is shown under its key.
        curves: Key of a method -> mean insertion curve, mean deletion curve.
        panels: The samples that are shown, the same in every run.
        tables: Name -> rows of plain values and drawings; all rows have the same columns.
        settings: How the scores were measured, in words and numbers.
        metrics: What the user's own module logged; known when the run is closed.
        accuracy: Key of the accuracy among ``metrics``, empty if there is none; known when the run is closed.
        alerts: Texts of the alarms that were raised; known when the run is closed.
        run: Name of the training; a resumed one keeps its name.
        differences: The paired differences of the training's runs so far, this one the last.
        arguments: The callback's arguments, in texts and numbers.
    """

    prefix: str
    epoch: int
    step: int
    method: str
    values: Mapping[str, float]
    names: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Float[Tensor, "2 T"]] = field(default_factory=dict)
    panels: Sequence[Panel] = ()
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    accuracy: str = ""
    alerts: Sequence[str] = ()
    run: str = ""
    differences: Sequence[Difference] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def when(self) -> dict[str, int]:
        """Epoch and step, as columns."""
        return {"epoch": self.epoch, "step": self.step}

    @property
    def stem(self) -> str:
        """Name of an image file, without its suffix."""
        run = f"-run={self.run[:8]}" if self.run else ""
        return f"epoch={self.epoch:03d}-step={self.step:06d}{run}"

    @property
    def title(self) -> str:
        """Title of the figure of the mean curves."""
        return f"Mean curves after epoch {self.epoch}, step {self.step}"

    @cached_property
    def drawings(self) -> dict[str, Drawing]:
        """The sheet of the samples and the figure of the mean curves, if there are any."""
        drawings = {}
        if self.panels:
            drawings["panel"] = Drawing(partial(sheet, self.panels))
        if self.curves:
            drawings["curves"] = Drawing(partial(curve_figure, self.labelled_curves(), self.title))
        return drawings

    def key(self, name: str) -> str:
        """Return the name under which a logger shows something."""
        return f"{self.prefix}/{name}"

    def label(self, method: str) -> str:
        """Return a method's display name."""
        return self.names.get(method, method) if method else self.method

    def count(self, method: str) -> int:
        """Return over how many samples a method's mean curves are taken."""
        return int(self.values.get(build(CURVES_N, method), 0))

    def labelled_curves(self) -> dict[str, Float[Tensor, "2 T"]]:
        """Return the curves under the names of their methods, each with its number of samples."""
        return {
            f"{self.label(method)} (n={self.count(method)})": curves for method, curves in self.curves.items()
        }


LABELS = {
    "AugmentedGradCAM": "Augmented Grad-CAM", "ContrastiveSESS": "Contrastive SESS",
    "ExcitationBackprop": "Excitation backprop", "ExtremalPerturbation": "Extremal perturbation",
    "GradCAM": "Grad-CAM", "GradCAMPlusPlus": "Grad-CAM++", "GroupCAM": "Group-CAM",
    "GuidedBackprop": "Guided backprop", "IntegratedGradients": "Integrated gradients",
    "ScoreCAM": "Score-CAM", "SmoothGradCAMPlusPlus": "Smooth Grad-CAM++", "XGradCAM": "XGrad-CAM",
}  # fmt: skip
"""Name of a method's class -> its name in the literature, where they differ."""


def type_label(method: object) -> str:
    """Return a method's name in the literature, else that of its class."""
    name = type(method).__name__
    return LABELS.get(name, name)


def display_names(methods: Mapping[str, Any]) -> dict[str, str]:
    """Return the display names of methods.

    The explained method, whose key is ``""``, and its ``"base"`` have the names of the literature, such as
    "Grad-CAM"; the others keep their keys. Where two names would be the same, the key is used.

    Args:
        methods: Key -> method.
    """
    base, explained = (type_label(methods.get(key)) for key in ("base", ""))
    names = {key: key for key in methods} | {"": explained}
    if "base" in methods and base not in names.values():
        names["base"] = base
    return names | {key: f"{key} (compared)" for key in methods if key == explained}
