"""Explain, then score: SESSMetric, what the callback runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from sess_lightning.batching import batch_limit, in_batches, stacked
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs, classify, log_scores, predict
from sess_lightning.metrics.functional import (
    blurred_baseline,
    curve_auc,
    deletion_curve,
    insertion_curve,
    pointing_hits,
    relevance_mass,
)
from sess_lightning.metrics.samples import PerSample
from sess_lightning.metrics.statistics import ClassMean, Mean, Statistic, interval, resample
from sess_lightning.ops import size_of
from sess_lightning.regions import Regions, has_region, read_regions
from sess_lightning.types import SaliencyMethod

OWN = ""
"""The key of the method itself, beside those of the methods it is compared with."""
NO_TRIAL = -1
LEAST_TO_GAIN = 0.05
"""Mean drop in probability from image to baseline below which there is no scale to divide a curve by."""
CURVE_FIGURES = ("insertion", "deletion", "overall")
POINTING_FIGURES = ("pointing_game", "pointing_game_difficult")


class Assessment(NamedTuple):
    """One method's maps of a batch, and what they scored.

    Attributes:
        maps: Saliency in [0, 1].
        insertion: Curves; NaN where the budget left an image out.
        deletion: Curves; NaN where the budget left an image out.
        hits: Pointing Game: 1 hit, 0 miss, -1 no trial.
        seconds: How long the maps took; NaN without a clock.
        mass: Share of the map inside the region; NaN without one.
    """

    maps: Float[Tensor, "B H W"]
    insertion: Float[Tensor, "B T"]
    deletion: Float[Tensor, "B T"]
    hits: Int[Tensor, " B"]
    mass: Float[Tensor, " B"]
    seconds: float = float("nan")


class Samples(NamedTuple):
    """What is known of each sample and the method's own map of it, of all processes, on the host.

    Attributes:
        numbers: Rising. Where processes count for themselves, several have the same: first the first one's.
        targets: The class explained.
        predicted: The class predicted.
        scores: The model's probability of the target.
        insertion: Area under the curve; NaN where none was drawn.
        deletion: Area under the curve; NaN where none was drawn.
        hits: Pointing Game: 1 hit, 0 miss, -1 no trial.
        mass: Share of the map inside the region; NaN without one.
        share: The region's share of the picture; NaN without one.
        small: Each map averaged over a G x G grid.
    """

    numbers: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    predicted: Int[Tensor, " N"]
    scores: Float[Tensor, " N"]
    insertion: Float[Tensor, " N"]
    deletion: Float[Tensor, " N"]
    hits: Int[Tensor, " N"]
    mass: Float[Tensor, " N"]
    share: Float[Tensor, " N"]
    small: Float[Tensor, "N G G"]


class Summary(NamedTuple):
    """All that a metric has to tell.

    Attributes:
        values: As ``compute`` gives them.
        curves: As ``curves`` gives them.
        samples: As ``samples`` gives them.
    """

    values: dict[str, float]
    curves: dict[str, Float[Tensor, "2 T"]]
    samples: Samples


class SESSMetric(PerSample):
    """Explains a model's images and scores the maps, beside other methods on the same images.

    Every update explains the batch with ``method`` and with all of ``compare``, draws the insertion and
    deletion curves of all maps from shared end points, and plays the Pointing Game where regions are given.
    ``compute`` gives plain floats: ``insertion``, ``deletion``, ``overall`` (their difference),
    ``pointing_game``, ``pointing_game_difficult``, ``relevance_mass`` (share of the map inside the region, to
    be read against ``region_share``, what a map without preference has), each mean with its 95 % bootstrap
    interval (``..._ci_low``, ``..._ci_high``), the curves' areas divided by how much there was to gain
    (``..._normalised``), counts, the same under ``<name>/`` for each compared method, and under
    ``minus_<name>/`` the paired difference to it (this method less that one). The bootstrap draws images,
    each with all its trials: the classes explained on one image are no independent samples.

    Args:
        method: The method to score.
        compare: Methods to score beside it, by name; None is ``{"base": method.base}`` where there is one.
        limits: For how many samples a compared method's curves are drawn, by name: floors need fewer. Those
            are the samples whose number is below it. Maps are made, and the Pointing Game is played, on all.
        steps: Number of steps of a curve.
        tolerance: Of the Pointing Game, px at the regions' resolution.
        batch_size: Images that go through the model at once; None by the memory there is.
        clock: Tells the seconds by which maps are timed, once the device has done its work; every method then
            runs by itself. None does not wait for the device, and runs forwards that methods share once.
        grid: Side of the small copies of its own maps that ``samples`` gives; 0 keeps none.
        kwargs: For ``torchmetrics.Metric``.

    Attributes:
        latest: What the last update found, by method; the method itself is ``""``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    targets: list[Tensor]
    predicted: list[Tensor]
    ends: list[Tensor]
    difficult: list[Tensor]
    begins: list[Tensor]
    share: list[Tensor]
    small: list[Tensor]

    def __init__(
        self,
        method: SaliencyMethod,
        *,
        compare: Mapping[str, SaliencyMethod] | None = None,
        limits: Mapping[str, int] | None = None,
        steps: int = 28,
        tolerance: float = 15.0,
        batch_size: int | None = None,
        clock: Callable[[torch.device], float] | None = None,
        grid: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(method, SaliencyMethod):
            raise TypeError(
                f"SESSMetric: method must be a saliency method such as SESS(GradCAM()), got {method!r}."
            )
        if compare is None:
            base = getattr(method, "base", None)
            compare = {"base": base} if isinstance(base, SaliencyMethod) else {}
        if OWN in compare:
            raise ValueError('SESSMetric: a compared method needs a name, "" is the method itself.')
        self.methods = {OWN: method, **compare}
        self.limits = dict(limits or {})
        self.steps, self.tolerance, self.batch_size = steps, tolerance, batch_size
        self.clock = clock
        self.latest: dict[str, Assessment] = {}
        self._zero: tuple[Any, Tensor] | None = None
        self.grid = grid
        self.add_rows("ends", 3)
        self.add_rows("share")
        if grid:
            self.add_rows("small", grid, grid)
        # Begins: 1 + the image's number where a row begins one, else 0. Numbers of several processes may be
        # the same, so that a number alone would not tell images apart.
        for state in ("targets", "predicted", "difficult", "begins"):
            self.add_rows(state, dtype=torch.int64)
        for i in range(len(self.methods)):
            self.add_rows(f"curves_{i}", 2, steps + 1)
            self.add_rows(f"hits_{i}", dtype=torch.int64)
            self.add_rows(f"flat_{i}", dtype=torch.int64)
            self.add_rows(f"mass_{i}")

    def update(
        self,
        model: nn.Module,
        images: Float[Tensor, "B C H W"],
        targets: Int[Tensor, " T"],
        regions: Regions | None = None,
        *,
        difficult: Bool[Tensor, " T"] | None = None,
        size: tuple[int, int] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Explain and score a batch.

        Args:
            model: Any classifier; given back as it was.
            images: As the model takes them.
            targets: The class to explain on each image, or several for a single image, which then passes
                through the model once for all of them where the method can.
            regions: Where that class is: masks, or boxes (x0, y0, x1, y1) per image, half-open, in any of the
                shapes that ``read_regions`` knows; None plays no Pointing Game, an empty one is no trial.
            difficult: Which images belong to the "difficult" subset; None leaves it out.
            size: (height, width) that boxes refer to, if not the images'.
            numbers: Each image's number, for ``limits``; by it samples are put in order, so that nothing
                depends on the process that scored them. None counts them as they come.
        """
        shared = images if len(images) == 1 < len(targets) else None
        if shared is not None:
            # Contiguous: in which layout a copy of an expanded tensor lies depends on the number of targets.
            images = images.expand(len(targets), -1, -1, -1).contiguous()
        check_inputs("SESSMetric", images, targets)
        if regions is not None:
            regions = read_regions(regions, size=size_of(images), labels=targets)
        with explaining(model), torch.no_grad():
            images, targets = borrowed(images), borrowed(targets).long()
            blurred = blurred_baseline(images)
            ends, predicted = self._ends(model, images, blurred, targets)
            if numbers is None:
                done = sum(len(part) for part in self.targets)
                numbers = range(done, done + len(images))
            elif shared is not None:
                numbers = [numbers[0]] * len(targets)
            self.latest = {}
            explained = self._explained(model, images if shared is None else shared, targets)
            for i, (name, (maps, seconds)) in enumerate(zip(self.methods, explained, strict=True)):
                drawn = _drawn(numbers, self.limits.get(name), images.device)
                found = self._assess(model, maps, images, blurred, targets, ends, drawn, regions, size)
                self.latest[name] = found._replace(seconds=seconds)
                flat = found.maps.flatten(1).amax(1) <= found.maps.flatten(1).amin(1)
                getattr(self, f"curves_{i}").append(torch.stack([found.insertion, found.deletion], 1))
                getattr(self, f"hits_{i}").append(found.hits)
                getattr(self, f"flat_{i}").append(flat.long())
                getattr(self, f"mass_{i}").append(found.mass)
            unknown = torch.full_like(targets, NO_TRIAL)
            self.difficult.append(unknown if difficult is None else difficult.to(unknown))
            begins = torch.tensor([1 + number for number in numbers]).to(targets)
            if shared is not None:
                begins[1:] = 0
            self.begins.append(begins)
            own = self.latest[OWN].maps
            self.share.append(_masses(torch.ones_like(own), regions, size))
            if self.grid:
                self.small.append(adaptive_avg_pool2d(own[:, None], self.grid)[:, 0])
            self.targets.append(targets)
            self.predicted.append(predicted)
            self.ends.append(ends)

    def _explained(self, model: nn.Module, images: Tensor, targets: Tensor) -> list[tuple[Tensor, float]]:
        """Return every method's maps, and the seconds they took."""
        if self.clock is None:
            own, *others = self.methods.values()
            return [(each, torch.nan) for each in own.maps_beside(model, images, targets, others)]
        found = []
        for method in self.methods.values():
            started = self.clock(images.device)
            (each,) = method.maps_beside(model, images, targets)
            found.append((each, self.clock(images.device) - started))
        return found

    def _ends(
        self, model: nn.Module, images: Tensor, blurred: Tensor, targets: Tensor
    ) -> tuple[Float[Tensor, "B 3"], Int[Tensor, " B"]]:
        """Return the scores of image, blurred image and zeros, which all curves share, and the prediction."""
        activation = self.methods[OWN].activation
        logits = self._logits(model, images)
        # Zeros look the same in every batch, for as long as nothing writes to the model: once per run.
        held = (*model.parameters(), *model.buffers())
        versions = [(id(each), each._version) for each in held if not each.is_inference()]
        key = (id(model), versions, images.shape[1:], images.dtype, images.device)
        if self._zero is None or self._zero[0] != key:
            self._zero = key, classify(model, torch.zeros_like(images[:1])).float()
        zero = self._zero[1].expand(len(images), -1)
        ends = (
            log_scores(logits, targets, activation),
            log_scores(self._logits(model, blurred), targets, activation),
            log_scores(zero, targets, activation),
        )
        return torch.stack(ends, 1).exp(), predict(logits)

    def _logits(self, model: nn.Module, images: Tensor) -> Float[Tensor, "B N"]:
        size = batch_limit(self.batch_size, images)
        found = in_batches(lambda part, _: classify(model, stacked(part)), images, size)
        return torch.cat([*found]).float()

    def _assess(
        self,
        model: nn.Module,
        maps: Tensor,
        images: Tensor,
        blurred: Tensor,
        targets: Tensor,
        ends: Float[Tensor, "B 3"],
        drawn: slice | Tensor,
        regions: Regions | None,
        size: tuple[int, int] | None,
    ) -> Assessment:
        own, blur, zero = ends.unbind(1)
        curves = images.new_full((2, len(images), self.steps + 1), torch.nan, dtype=torch.float32)
        if len(images[drawn]):
            activation = self.methods[OWN].activation
            options: dict[str, Any] = {
                "steps": self.steps,
                "batch_size": self.batch_size,
                "activation": activation,
            }
            given = (model, images[drawn], maps[drawn], targets[drawn])
            curves[0, drawn] = insertion_curve(
                *given, baseline=blurred[drawn], ends=(blur[drawn], own[drawn]), **options
            )
            curves[1, drawn] = deletion_curve(*given, ends=(own[drawn], zero[drawn]), **options)
        hits = torch.full_like(targets, NO_TRIAL)
        if regions is not None:
            hit = pointing_hits(maps, regions, self.tolerance, size)
            hits = torch.where(has_region(regions, maps.device), hit.to(hits), hits)
        return Assessment(maps, curves[0], curves[1], hits, _masses(maps, regions, size))

    @property
    def update_called(self) -> bool:
        """True: a process without samples is none of torchmetrics' mistakes to warn of."""
        return True

    def compute(self) -> dict[str, float]:
        """Return every figure as a float; an empty dict before the first update.

        A figure is left out where there is nothing to tell: no Pointing Game without regions, no difficult
        subset without marks.
        """
        return self._values()

    def summary(self) -> Summary:
        """Return ``compute``, ``curves`` and ``samples`` at the price of one gathering from all processes."""
        with self.gathered():
            return Summary(self._values(), self._curves(), self._samples())

    def curves(self) -> dict[str, Float[Tensor, "2 T"]]:
        """Return each method's mean insertion and deletion curve over the samples that have one.

        As with ``compute``, all processes' samples are in it, so every process must call it.
        """
        with self.gathered():
            return self._curves()

    def samples(self) -> Samples:
        """Return what is known of each sample; as with ``compute``, every process must call it."""
        with self.gathered():
            return self._samples()

    def _values(self) -> dict[str, float]:
        if not len(self.targets):
            return {}
        targets, ends, predicted = (self._held(name) for name in ("targets", "ends", "predicted"))
        image_of = self._held("begins").sign().cumsum(0) - 1
        finite = ends.isfinite().all(1)
        values: dict[str, float] = {
            "n": float(len(targets)),
            "nan": float((~finite).sum()),
            "misclassified": float((predicted != targets).sum()),
        }
        statistics: dict[str, Statistic] = {}
        areas: list[Tensor] = []
        for i, name in enumerate(self.methods):
            prefix = f"{name}/" if name else ""
            area = curve_auc(self._held(f"curves_{i}").double())
            area = torch.cat([area, area[:, :1] - area[:, 1:]], 1)
            areas.append(area)
            values |= _means(prefix, area, image_of, statistics)
            values |= self._curve_values(prefix, area, ends.double())
            values[f"{prefix}flat"] = float(self._held(f"flat_{i}").sum())
            values |= self._pointing_values(i, prefix, image_of, statistics)
            mass, own_mass = (self._held(f"mass_{j}")[:, None].double() for j in (i, 0))
            values |= _means(prefix, mass, image_of, statistics, ("relevance_mass",))
            if name:
                values |= _means(f"minus_{prefix}", areas[0] - area, image_of, statistics)
                difference = own_mass - mass
                values |= _means(f"minus_{prefix}", difference, image_of, statistics, ("relevance_mass",))
        resampled = resample(statistics, int(image_of[-1]) + 1, len(targets))
        for name, key in product(self.methods, POINTING_FIGURES):
            if name and f"{name}/{key}" in resampled:
                values[f"minus_{name}/{key}"] = values[key] - values[f"{name}/{key}"]
                resampled[f"minus_{name}/{key}"] = resampled[key] - resampled[f"{name}/{key}"]
        for name, figures in resampled.items():
            values |= interval(name, figures)
        share = self._held("share")
        if share.isfinite().any():
            values["region_share"] = float(share.nanmean())
        return values

    def _curves(self) -> dict[str, Tensor]:
        return {name: self._held(f"curves_{i}").nanmean(0) for i, name in enumerate(self.methods)}

    def _samples(self) -> Samples:
        area = curve_auc(self._held("curves_0"))
        small = self._held("small") if self.grid else torch.empty(len(area), 0, 0)
        return Samples(
            self._numbers().sort().values, self._held("targets"), self._held("predicted"),
            self._held("ends")[:, 0], area[:, 0], area[:, 1], self._held("hits_0"), self._held("mass_0"),
            self._held("share"), small,
        )  # fmt: skip

    def _held(self, state: str) -> Tensor:
        """Return a state's rows in the order of the images' numbers, those of an image together."""
        return self.rows(state).cpu()[self._numbers().argsort(stable=True)]

    def _numbers(self) -> Int[Tensor, " N"]:
        begins = self.rows("begins").cpu()
        return begins[begins > 0][begins.sign().cumsum(0) - 1] - 1

    def _curve_values(self, prefix: str, area: Tensor, ends: Tensor) -> dict[str, float]:
        drawn = area[:, 2].isfinite()
        values = {f"{prefix}curves_n": float(drawn.sum())}
        own, blur, zero = ends[drawn].mean(0) if drawn.any() else torch.full((3,), torch.nan)
        for key, mean, to_gain in (
            ("insertion_normalised", area[drawn, 0].mean(), own - blur),
            ("deletion_normalised", area[drawn, 1].mean(), own - zero),
        ):
            if to_gain >= LEAST_TO_GAIN:
                values[prefix + key] = float(mean / to_gain)
        return values

    def _pointing_values(
        self, i: int, prefix: str, image_of: Tensor, statistics: dict[str, Statistic]
    ) -> dict[str, float]:
        """Return the Pointing Game's figures, and put what is to be resampled into ``statistics``."""
        hits = self._held(f"hits_{i}")
        trial = hits != NO_TRIAL
        if not trial.any():
            return {}
        values: dict[str, float] = {} if prefix else {"skipped": float((~trial).sum())}
        difficult, targets = self._held("difficult"), self._held("targets")
        for key, chosen in zip(POINTING_FIGURES, (trial, trial & (difficult == 1)), strict=True):
            if not chosen.any():
                continue
            accuracy = ClassMean(hits[chosen].double(), image_of[chosen], targets[chosen])
            statistics[prefix + key] = accuracy
            values[prefix + key] = float(accuracy(torch.ones(1, int(image_of[-1]) + 1, dtype=torch.float64)))
            if not prefix:
                values[f"{key}_n"] = float(chosen.sum())
        return values

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.latest, self._zero = {}, None


def _masses(maps: Tensor, regions: Regions | None, size: tuple[int, int] | None) -> Float[Tensor, " B"]:
    if regions is None:
        return torch.full_like(maps[:, 0, 0], torch.nan)
    return relevance_mass(maps, regions, size)


def _means(
    prefix: str,
    columns: Tensor,
    image_of: Tensor,
    statistics: dict[str, Statistic],
    figures: Sequence[str] = CURVE_FIGURES,
) -> dict[str, float]:
    """Return the columns' means, and put what is to be resampled into ``statistics``."""
    drawn = columns.isfinite().all(1)
    if not drawn.any():
        return {}
    own = columns[drawn].T
    names = [prefix + figure for figure in figures]
    statistics |= {name: Mean(column, image_of[drawn]) for name, column in zip(names, own, strict=True)}
    return {name: float(column.mean()) for name, column in zip(names, own, strict=True)}


def _drawn(numbers: Sequence[int], limit: int | None, device: torch.device) -> slice | Tensor:
    """Return an index of the images whose curves are drawn."""
    if limit is None or all(number < limit for number in numbers):
        return slice(None)
    return torch.tensor([i for i, n in enumerate(numbers) if n < limit], dtype=torch.int64, device=device)
