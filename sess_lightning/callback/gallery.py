"""What is shown of a run's samples: the panel, the rows of the worst explained, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sess_lightning.engine.fusion import smooth
from sess_lightning.metrics import SESSMetric
from sess_lightning.metrics.functional import curve_auc
from sess_lightning.metrics.sess_metric import NO_TRIAL
from sess_lightning.ops import min_max, size_of, upsample
from sess_lightning.reporting.panels import Panel, Picture, displayed, overlay
from sess_lightning.types import Batch


@dataclass(frozen=True)
class Legend:
    """How samples are named and displayed.

    Attributes:
        own: The explaining method's name.
        target: Which class is explained, ``"label"`` or ``"predicted"``.
        class_names: Names of the classes; None shows numbers.
        normalisation: (mean, std) to undo for display.
        shows_ids: Whether samples are called by their ids.
    """

    own: str
    target: str
    class_names: Sequence[str] | None = None
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None
    shows_ids: bool = True

    def name(self, index: float) -> str:
        """Return a class's name."""
        names = self.class_names
        return names[int(index)] if names and 0 <= int(index) < len(names) else f"class {int(index)}"

    def title(self, sample: Batch | None, number: int) -> str:
        """Return a sample's name; None is one that another process holds."""
        return sample.ids[0] if self.shows_ids and sample and sample.ids else f"sample {number + 1}"

    def picture(self, sample: Batch, small: Tensor) -> Picture:
        """Return a sample under its small map."""
        large = upsample(small[None], size_of(sample.images))
        return overlay(displayed(sample.images, self.normalisation)[0], min_max(large)[0])


@dataclass(frozen=True)
class Exhibit:
    """A panel's sample: all that is needed to draw it once the run is over.

    Attributes:
        sample: The sample, on the host.
        maps: Method's name -> map.
        figures: Label, prediction and score, then insertion, deletion and hit of each method.
    """

    sample: Batch
    maps: Mapping[str, Tensor]
    figures: Tensor

    def sent(self) -> Exhibit:
        """Return it on its way to the host; ``wait_for`` its device before it is read."""
        maps = {name: each.to("cpu", non_blocking=True) for name, each in self.maps.items()}
        return replace(self, maps=maps, figures=self.figures.to("cpu", non_blocking=True))

    def panel(self, number: int, legend: Legend) -> Panel:
        """Return what loggers show."""
        picture = displayed(self.sample.images, legend.normalisation)[0]
        label, predicted, score, *rest = self.figures.tolist()
        lines = [
            f"label: {legend.name(label)}",
            f"prediction: {legend.name(predicted)}",
            f"score of the {'label' if legend.target == 'label' else 'prediction'}: {score:.3f}",
        ]
        for name, at in zip((legend.own, "base"), range(0, len(rest), 3), strict=False):
            insertion, deletion, hit = rest[at : at + 3]
            played = "" if hit == NO_TRIAL else ", hit" if hit else ", miss"
            lines.append(f"{name}: insertion {insertion:.3f}, deletion {deletion:.3f}{played}")
        height, width = self.sample.size or picture.shape[:2]
        scale = torch.tensor([picture.shape[1] / width, picture.shape[0] / height]).repeat(2)
        boxes = (self.sample.boxes[0] * scale).tolist() if self.sample.boxes is not None else []
        # As in the paper, the seams of SESS are smoothed for pictures, never for scores.
        shown = {
            name: min_max(smooth(saliency[None]))[0] if name == "SESS" else saliency
            for name, saliency in self.maps.items()
        }
        return Panel(
            image=picture,
            overlays={name: overlay(picture, saliency) for name, saliency in shown.items()},
            caption="\n".join(lines),
            boxes=[tuple(box) for box in boxes if box[2] > box[0] and box[3] > box[1]],
            label=legend.name(label),
            title=legend.title(self.sample, number),
        )


def exhibits(metric: SESSMetric, samples: Batch, which: Iterable[int], own: str) -> Iterator[Exhibit]:
    """Yield samples ``which`` of those of the metric's last update, left on its device."""
    found = {name or own: each for name, each in metric.latest.items() if name in ("", "base")}
    for i in which:
        predicted, score = metric.predicted[-1][i], metric.ends[-1][i, 0]
        figures = [samples.labels[i].to(predicted), predicted, score]
        for each in found.values():
            figures += [curve_auc(each.insertion[i]), curve_auc(each.deletion[i]), each.hits[i]]
        maps = {name: found[name].maps[i] for name in ("base", own) if name in found}
        yield Exhibit(samples.take([i]), maps, torch.stack([figure.double() for figure in figures]))
