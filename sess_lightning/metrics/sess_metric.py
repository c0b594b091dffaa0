"""Explain, then score: SESSMetric, what the callback runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sess_lightning.introspection import check_inputs, classify, log_scores, score
from sess_lightning.lending import borrowed, explaining
from sess_lightning.metrics.functional import (
    blurred_baseline,
    class_mean,
    curve_auc,
    deletion_curve,
    has_region,
    insertion_curve,
    pointing_hits,
)
from sess_lightning.metrics.samples import PerSample
from sess_lightning.metrics.statistics import bootstrap_counts, interval
from sess_lightning.types import SaliencyMethod

OWN = ""
"""The key of the method itself, beside those of the methods it is compared with."""
NO_TRIAL = -1
LEAST_TO_GAIN = 0.05
"""Mean drop in probability from image to baseline below which there is no scale to divide a curve by."""
CURVE_FIGURES = ("insertion", "deletion", "overall")


class Assessment(NamedTuple):
    """One method's maps of a batch, and what they scored.

    Attributes:
        maps: Saliency in [0, 1].
        insertion: Curves; NaN where the budget left an image out.
        deletion: Curves; NaN where the budget left an image out.
        hits: Pointing Game: 1 hit, 0 miss, -1 no trial.
    """

    maps: Float[Tensor, "B H W"]
    insertion: Float[Tensor, "B T"]
    deletion: Float[Tensor, "B T"]
    hits: Int[Tensor, " B"]


class SESSMetric(PerSample):
    """Explains a model's images and scores the maps, beside other methods on the same images.

    Every update explains the batch with ``method`` and with all of ``compare``, draws the insertion and
    deletion curves of all maps from shared end points, and plays the Pointing Game where regions are given.
    ``compute`` gives plain floats: ``insertion``, ``deletion``, ``overall`` (their difference),
    ``pointing_game``, ``pointing_game_difficult``, each mean with its 95 % bootstrap interval
    (``..._ci_low``, ``..._ci_high``), the curves' areas divided by how much there was to gain
    (``..._normalised``), counts, the same under ``<name>/`` for each compared method, and under
    ``minus_<name>/`` the paired difference to it (this method less that one).

    Args:
        method: The method to score.
        compare: Methods to score beside it, by name; None is ``{"base": method.base}`` where there is one.
        limits: For how many samples a compared method's curves are drawn, by name: floors need fewer. Those
            are the samples whose number is below it. Maps are made, and the Pointing Game is played, on all.
        steps: Number of steps of a curve.
        tolerance: Of the Pointing Game, px at the regions' resolution.
        batch_size: Images that go through the model at once.
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

    def __init__(
        self,
        method: SaliencyMethod,
        *,
        compare: Mapping[str, SaliencyMethod] | None = None,
        limits: Mapping[str, int] | None = None,
        steps: int = 28,
        tolerance: float = 15.0,
        batch_size: int = 32,
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
        self.latest: dict[str, Assessment] = {}
        self._zero: tuple[Any, Tensor] | None = None
        self.add_rows("ends", 3)
        for state in ("targets", "predicted", "difficult"):
            self.add_rows(state, dtype=torch.int64)
        for i in range(len(self.methods)):
            self.add_rows(f"curves_{i}", 2, steps + 1)
            self.add_rows(f"hits_{i}", dtype=torch.int64)
            self.add_rows(f"flat_{i}", dtype=torch.int64)

    def update(
        self,
        model: nn.Module,
        images: Float[Tensor, "B C H W"],
        targets: Int[Tensor, " T"],
        regions: Bool[Tensor, "T h w"] | Sequence[Float[Tensor, "_ 4"]] | None = None,
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
            regions: Where that class is: masks, or boxes (x0, y0, x1, y1) per image, half-open; None plays no
                Pointing Game, an empty one is no trial.
            difficult: Which images belong to the "difficult" subset; None leaves it out.
            size: (height, width) that boxes refer to, if not the images'.
            numbers: Each image's number, for ``limits``; None counts them as they come.
        """
        shared = images if len(images) == 1 < len(targets) else None
        if shared is not None:
            # Contiguous: in which layout a copy of an expanded tensor lies depends on the number of targets.
            images = images.expand(len(targets), -1, -1, -1).contiguous()
        check_inputs("SESSMetric", images, targets)
        with explaining(model), torch.no_grad():
            images, targets = borrowed(images), borrowed(targets).long()
            blurred = blurred_baseline(images)
            ends, predicted = self._ends(model, images, blurred, targets)
            if numbers is None:
                done = sum(len(part) for part in self.targets)
                numbers = range(done, done + len(images))
            self.latest = {}
            for i, (name, method) in enumerate(self.methods.items()):
                drawn = _drawn(numbers, self.limits.get(name), images.device)
                if shared is None:
                    maps = method(model, images, targets)
                else:
                    maps = method.explain_classes(model, shared, targets).maps
                found = self._assess(model, maps, images, blurred, targets, ends, drawn, regions, size)
                self.latest[name] = found
                flat = found.maps.flatten(1).amax(1) <= found.maps.flatten(1).amin(1)
                getattr(self, f"curves_{i}").append(torch.stack([found.insertion, found.deletion], 1))
                getattr(self, f"hits_{i}").append(found.hits)
                getattr(self, f"flat_{i}").append(flat.long())
            unknown = torch.full_like(targets, NO_TRIAL)
            self.difficult.append(unknown if difficult is None else difficult.to(unknown))
            self.targets.append(targets)
            self.predicted.append(predicted)
            self.ends.append(ends)

    def _ends(
        self, model: nn.Module, images: Tensor, blurred: Tensor, targets: Tensor
    ) -> tuple[Float[Tensor, "B 3"], Int[Tensor, " B"]]:
        """Return the scores of image, blurred image and zeros, which all curves share, and the prediction."""
        activation = self.methods[OWN].activation
        logits = classify(model, images).float()
        # Zeros look the same in every batch, for as long as nothing writes to the model: once per run.
        held = (*model.parameters(), *model.buffers())
        versions = [(id(each), each._version) for each in held if not each.is_inference()]
        key = (id(model), versions, images.shape[1:], images.dtype, images.device)
        if self._zero is None or self._zero[0] != key:
            self._zero = key, classify(model, torch.zeros_like(images[:1])).float()
        zero = self._zero[1].expand(len(images), -1)
        ends = (
            log_scores(logits, targets, activation),
            score(model, blurred, targets, activation),
            log_scores(zero, targets, activation),
        )
        predicted = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
        return torch.stack(ends, 1).exp(), predicted

    def _assess(
        self,
        model: nn.Module,
        maps: Tensor,
        images: Tensor,
        blurred: Tensor,
        targets: Tensor,
        ends: Float[Tensor, "B 3"],
        drawn: slice | Tensor,
        regions: Tensor | Sequence[Tensor] | None,
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
        return Assessment(maps, curves[0], curves[1], hits)

    @property
    def update_called(self) -> bool:
        """True: a process without samples is none of torchmetrics' mistakes to warn of."""
        return True

    def compute(self) -> dict[str, float]:
        """Return every figure as a float; an empty dict before the first update.

        A figure is left out where there is nothing to tell: no Pointing Game without regions, no difficult
        subset without marks.
        """
        if not len(self.targets):
            return {}
        targets, ends, predicted = (self._held(name) for name in ("targets", "ends", "predicted"))
        finite = ends.isfinite().all(1)
        counts = bootstrap_counts(len(targets))
        values: dict[str, float] = {
            "n": float(len(targets)),
            "nan": float((~finite).sum()),
            "misclassified": float((predicted != targets).sum()),
        }
        areas: list[Tensor] = []
        for i, name in enumerate(self.methods):
            prefix = f"{name}/" if name else ""
            area = curve_auc(self._held(f"curves_{i}").double())
            area = torch.cat([area, area[:, :1] - area[:, 1:]], 1)
            areas.append(area)
            values |= self._curve_values(prefix, area, ends.double(), counts)
            values[f"{prefix}flat"] = float(self._held(f"flat_{i}").sum())
            values |= self._pointing_values(i, prefix, counts)
            if name:
                values |= _means(f"minus_{prefix}", CURVE_FIGURES, areas[0] - area, counts)
        return values

    def curves(self) -> dict[str, Float[Tensor, "2 T"]]:
        """Return each method's mean insertion and deletion curve over the samples that have one.

        As with ``compute``, all processes' samples are in it, so every process must call it.
        """
        with self.sync_context(self.dist_sync_fn, should_sync=self._to_sync):
            return {name: self._held(f"curves_{i}").nanmean(0) for i, name in enumerate(self.methods)}

    def _held(self, state: str) -> Tensor:
        return self.rows(state).cpu()

    def _curve_values(self, prefix: str, area: Tensor, ends: Tensor, counts: Tensor) -> dict[str, float]:
        values = _means(prefix, CURVE_FIGURES, area, counts)
        drawn = area[:, 2].isfinite()
        values[f"{prefix}curves_n"] = float(drawn.sum())
        own, blur, zero = ends[drawn].mean(0) if drawn.any() else torch.full((3,), torch.nan)
        for key, mean, to_gain in (
            ("insertion_normalised", area[drawn, 0].mean(), own - blur),
            ("deletion_normalised", area[drawn, 1].mean(), own - zero),
        ):
            if to_gain >= LEAST_TO_GAIN:
                values[prefix + key] = float(mean / to_gain)
        return values

    def _pointing_values(self, i: int, prefix: str, counts: Tensor) -> dict[str, float]:
        hits = self._held(f"hits_{i}")
        trial = hits != NO_TRIAL
        if not trial.any():
            return {}
        values: dict[str, float] = {} if prefix else {"skipped": float((~trial).sum())}
        difficult = self._held("difficult")
        for key, chosen in (("pointing_game", trial), ("pointing_game_difficult", trial & (difficult == 1))):
            if not chosen.any():
                continue
            mean, resampled = self._accuracy(hits, chosen, counts)
            values[prefix + key] = float(mean)
            values |= interval(prefix + key, resampled)
            if prefix:
                own, own_resampled = self._accuracy(self._held("hits_0"), chosen, counts)
                values[f"minus_{prefix}{key}"] = float(own - mean)
                values |= interval(f"minus_{prefix}{key}", own_resampled - resampled)
            else:
                values[f"{key}_n"] = float(chosen.sum())
        return values

    def _accuracy(self, hits: Tensor, chosen: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class mean over the chosen trials, and that of every resample."""
        # Classes in the order of their appearance: only those seen take part in the mean.
        _, of_class = self._held("targets")[chosen].unique(return_inverse=True)
        one_hot = torch.nn.functional.one_hot(of_class).double()
        hit, some = one_hot * hits[chosen, None], counts[:, chosen]
        return class_mean(hit.sum(0), one_hot.sum(0)), class_mean(some @ hit, some @ one_hot)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.latest, self._zero = {}, None


def _means(prefix: str, names: Sequence[str], columns: Tensor, counts: Tensor) -> dict[str, float]:
    drawn = columns.isfinite().all(1)
    if not drawn.any():
        return {}
    values: dict[str, float] = {}
    some = counts[:, drawn]
    for name, column in zip(names, columns[drawn].T, strict=True):
        values[prefix + name] = float(column.mean())
        values |= interval(prefix + name, some @ column / some.sum(1))
    return values


def _drawn(numbers: Sequence[int], limit: int | None, device: torch.device) -> slice | Tensor:
    """Return an index of the images whose curves are drawn."""
    if limit is None or all(number < limit for number in numbers):
        return slice(None)
    return torch.tensor([i for i, n in enumerate(numbers) if n < limit], dtype=torch.int64, device=device)
