"""What a run shows of its samples: the panel, the tables, and their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sess_lightning.callback.tables import class_rows, sample_row, standing_out
from sess_lightning.engine.fusion import smooth
from sess_lightning.methods import SESS
from sess_lightning.metrics import SESSMetric
from sess_lightning.metrics.functional import curve_auc
from sess_lightning.metrics.sess_metric import NO_TRIAL, OWN, Samples
from sess_lightning.ops import has_span, min_max, size_of, upsample, wait_for
from sess_lightning.reporting.panels import Panel, Picture, displayed, overlay
from sess_lightning.reporting.run import Drawing, display_names
from sess_lightning.reporting.text import writable
from sess_lightning.types import Batch, SaliencyMethod


@dataclass(frozen=True)
class Legend:
    """How samples and methods are named and displayed.

    Attributes:
        methods: What is scored, by name; the explained method is ``""``.
        target: Which class is explained, ``"label"`` or ``"predicted"``.
        class_names: Names of the classes; None shows numbers.
        normalisation: (mean, std) to undo for display.
        channels: Which of the images' channels are shown as red, green and blue.
        shows_ids: Whether samples are named by their ids.
    """

    methods: Mapping[str, SaliencyMethod] = field(default_factory=dict)
    target: str = "label"
    class_names: Sequence[str] | None = None
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None
    channels: Sequence[int] | None = None
    shows_ids: bool = True

    @property
    def names(self) -> dict[str, str]:
        """Display names of the methods."""
        return display_names(self.methods)

    @property
    def shown(self) -> list[str]:
        """The methods whose maps are shown, the explained one first; controls are not."""
        return [name for name, method in self.methods.items() if name == OWN or method.forwards > 0]

    def name(self, index: float) -> str:
        """Return a class's name."""
        if index < 0:
            return "none"
        names = self.class_names
        known = names and 0 <= int(index) < len(names)
        return writable(names[int(index)]) if names and known else f"class {int(index)}"

    def title(self, sample: Batch | None, number: int) -> str:
        """Return a sample's name; None stands for a sample of another rank."""
        ids = sample.ids if self.shows_ids and sample else None
        return writable(ids[0]) if ids else f"sample {number + 1}"

    def picture(self, sample: Batch, small: Tensor) -> Picture:
        """Return a sample's image with its small map over it."""
        large = upsample(small[None], size_of(sample.images))
        return overlay(self.displayed(sample), min_max(large)[0])

    def displayed(self, sample: Batch) -> Picture:
        """Return a sample's image for display."""
        return displayed(sample.images, self.normalisation, self.channels)[0]

    def displayed_map(self, name: str, saliency: Float[Tensor, "H W"]) -> Float[Tensor, "H W"]:
        """Return a method's map for display: as in the paper, only there are the seams of SESS smoothed."""
        method = self.methods.get(name)
        if isinstance(method, SESS) and not method.smoothing:
            return min_max(smooth(saliency[None]))[0]
        return saliency


@dataclass(frozen=True)
class Exhibit:
    """A panel's sample: all that is needed to draw it once the run is over.

    Attributes:
        sample: The sample, on the host.
        maps: Method -> map, the explained method first.
        figures: Label, prediction and score, then insertion, deletion and hit of each method.
    """

    sample: Batch
    maps: Mapping[str, Tensor]
    figures: Tensor

    def sent(self) -> Exhibit:
        """Start the copy to the host; ``wait_for`` the device before reading it."""
        maps = {name: saliency.to("cpu", non_blocking=True) for name, saliency in self.maps.items()}
        return replace(self, maps=maps, figures=self.figures.to("cpu", non_blocking=True))

    def panel(self, number: int, legend: Legend) -> Panel:
        """Return the panel that loggers show."""
        picture = legend.displayed(self.sample)
        label, predicted, score, *rest = self.figures.tolist()
        lines = [
            f"label: {legend.name(label)}",
            f"prediction: {legend.name(predicted)}",
            f"score of the {'label' if legend.target == 'label' else 'prediction'}: {score:.3f}",
        ]
        names = legend.names
        for i, name in enumerate(self.maps):
            insertion, deletion, hit = rest[3 * i : 3 * i + 3]
            played = "" if hit == NO_TRIAL else ", hit" if hit else ", miss"
            flat = ", flat map" * (not bool(has_span(*self.maps[name].aminmax())))
            lines.append(f"{names[name]}: insertion {insertion:.3f}, deletion {deletion:.3f}{played}{flat}")
        height, width = self.sample.size or picture.shape[:2]
        scale = torch.tensor([picture.shape[1] / width, picture.shape[0] / height]).repeat(2)
        boxes = (self.sample.boxes[0] * scale).tolist() if self.sample.boxes is not None else []
        explained, *others = self.maps
        return Panel(
            image=picture,
            overlays={
                names[name]: overlay(picture, legend.displayed_map(name, self.maps[name]))
                for name in (*others, explained)
            },
            caption="\n".join(lines),
            boxes=[tuple(box) for box in boxes if box[2] > box[0] and box[3] > box[1]],
            label=legend.name(label),
            title=legend.title(self.sample, number),
        )


class Gallery:
    """Keeps what a run shows of its samples, and matches samples to the run's numbers.

    Args:
        num_images: Samples in the panel; 0 sends no image at all.
        num_rows: Rows of the worst explained samples, and as many of the most drifted.
        legend: How samples and methods are named and displayed.
    """

    def __init__(self, num_images: int, num_rows: int, legend: Legend) -> None:
        self.num_images, self.num_rows, self.legend = num_images, num_rows, legend
        self._exhibits: list[Exhibit] = []
        self._seen: dict[int, list[Batch]] = {}
        self._added = 0
        self._identified: list[Batch | None] = []

    def start_run(self) -> None:
        """Begin a run."""
        self._exhibits, self._seen, self._added, self._identified = [], {}, 0, []

    def add(self, metric: SESSMetric, samples: Batch, numbers: Sequence[int], total: int) -> None:
        """Keep what is shown of the samples of the metric's last update, on its device.

        Args:
            metric: The metric that explained them.
            samples: These samples, on the host.
            numbers: Their numbers among all samples.
            total: Number of samples of the whole run.
        """
        first, shown = self._added, min(self.num_images, total)
        rows = {number: i for i, number in reversed([*enumerate(numbers)])}  # Of several classes, the first.
        self._added += len(rows)
        for i, number in enumerate(numbers):
            self._seen.setdefault(number, []).append(samples.take([i]))
        places = enumerate(sorted(rows.values()), first)
        which = [i for k, i in places if (k + 1) * shown // total > k * shown // total]
        self._exhibits += _exhibits(metric, samples, which, self.legend.shown)

    def to_host(self) -> None:
        """Start copying the panel to the host, while the device computes the figures."""
        exhibits, self._exhibits = self._exhibits, []
        self._exhibits = [exhibit.sent() for exhibit in exhibits]

    def identify(self, samples: Samples) -> None:
        """Find this rank's samples among those of all ranks."""
        # Of equal numbers, the first is this rank's own; other ranks' samples have no name and no image here.
        rows = (self._seen.get(number) for number in samples.numbers.tolist())
        self._identified = [kept.pop(0) if kept else None for kept in rows]

    def title(self, i: int) -> str:
        """Return the name of sample ``i`` of all ranks."""
        return self.legend.title(self._identified[i], i)

    def shown(
        self,
        samples: Samples,
        drifts: Mapping[str, Float[Tensor, " N"]],
        device: torch.device,
        protect: Callable[[str], AbstractContextManager[None]],
    ) -> tuple[list[Panel], dict[str, list[dict[str, Any]]]]:
        """Return the panel and the tables of classes and of the samples that stand out.

        Args:
            samples: The samples of all ranks.
            drifts: How similar each map is to that of earlier runs, by name.
            device: The device that the panel's maps come from.
            protect: Returns a context in which an error costs only what its argument says.
        """
        panels: list[Panel] = []
        tables: dict[str, list[dict[str, Any]]] = {}
        exhibits, self._exhibits = self._exhibits, []
        with protect("panel is missing"):
            wait_for(device)
            panels = [exhibit.panel(i, self.legend) for i, exhibit in enumerate(exhibits)]
        with protect("tables are missing"):
            tables["classes"] = class_rows(samples, self.legend.name)
            can_draw = self.num_images > 0 and len(panels) == len(exhibits)
            tables["samples"] = [*self._rows(samples, drifts, can_draw)]
        return panels, tables

    def _rows(
        self, samples: Samples, drifts: Mapping[str, Tensor], with_pictures: bool
    ) -> Iterator[dict[str, Any]]:
        for why, i in standing_out(samples, drifts, self.num_rows):
            sample = self._identified[i]
            row: dict[str, Any] = {"why": why, "sample": self.title(i)}
            row |= sample_row(samples, drifts, i, self.legend.name)
            if with_pictures and sample is not None:
                row["picture"] = Drawing(partial(self.legend.picture, sample, samples.small[i]))
            yield row


def _exhibits(
    metric: SESSMetric, samples: Batch, which: Iterable[int], shown: Sequence[str]
) -> Iterator[Exhibit]:
    for i in which:
        predicted, score = metric.predicted[-1][i], metric.ends[-1][i, 0]
        figures = [samples.labels[i].to(predicted), predicted, score]
        for name in shown:
            latest = metric.latest[name]
            figures += [curve_auc(latest.insertion[i]), curve_auc(latest.deletion[i]), latest.hits[i]]
        maps = {name: metric.latest[name].maps[i] for name in shown}
        yield Exhibit(samples.take([i]), maps, torch.stack([figure.float() for figure in figures]))
