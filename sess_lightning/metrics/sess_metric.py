"""SESSMetric: explains images and scores the maps; the metric that the callback runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from typing_extensions import override

from sess_lightning.batching import batch_limit, in_batches, joined, stacked
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs, classify, log_scores, predict_beside
from sess_lightning.introspection.probabilities import warn_of_probabilities
from sess_lightning.metrics.assessment import Assessment, Scene, method_rows, region_scores
from sess_lightning.metrics.functional import blurred_baseline, insertion_and_deletion_curves
from sess_lightning.metrics.per_sample import PerSample, keep_apart
from sess_lightning.metrics.plots import MAIN, plot_scores
from sess_lightning.metrics.summary import (
    NO_TRIAL,
    Rows,
    Samples,
    Summary,
    in_order,
    mean_curves,
    samples,
    scores,
)
from sess_lightning.ops import sent, size_of
from sess_lightning.regions import Regions, pad_boxes, read_regions
from sess_lightning.scores import check_names
from sess_lightning.types import SaliencyMethod

__all__ = ["NO_TRIAL", "OWN", "Assessment", "SESSMetric", "Samples", "Summary"]

OWN = ""
"""Key of the method itself, among those of the compared methods."""


class SESSMetric(PerSample):
    """Explains images and scores the maps, together with other methods on the same images.

    Every update explains the batch with ``method`` and with all of ``compare``, measures the insertion and
    deletion curves of all maps with shared end points, and plays the Pointing Game if regions are given.
    ``compute`` returns plain floats: ``insertion``, ``deletion``, ``overall`` (their difference),
    ``pointing_game``, ``pointing_game_difficult``, ``relevance_mass`` (share of the map inside the region, to
    be compared with ``region_share``, that of a uniform map), each mean with its 95 % bootstrap interval
    (``..._ci_low``, ``..._ci_high``), the curves' areas divided by the possible gain (``..._normalised``),
    ``tied_share`` (pixels whose order is arbitrary, since others have the same saliency), counts, the same
    under ``<name>/`` for each compared method, and under ``minus_<name>/`` the paired difference to it (this
    method minus that one). The bootstrap draws images, each with all its trials, because the classes
    explained on one image are not independent samples.

    Args:
        method: The method to score.
        compare: Methods to compare it with, by name; None is ``{"base": method.base}`` where there is one.
        limits: By name, for how many samples a compared method's curves are measured, since controls need
            fewer: those whose number is below the limit. Maps and the Pointing Game cover all samples.
        steps: Number of steps of a curve.
        tolerance: Tolerance of the Pointing Game, px at the regions' resolution.
        batch_size: Images that go through the model at once; None takes what memory allows.
        clock: Returns the time, s, once the device has finished, to time maps; every method then runs by
            itself. None does not wait for the device, and shared forward passes run once.
        grid: Side of the small copies of the explained method's maps in ``samples``; 0 keeps none.
        kwargs: For ``torchmetrics.Metric``.

    Attributes:
        latest: Results of the last update, by method; the method itself is ``""``.

    >>> metric = SESSMetric(SESS(GradCAM(), num_scales=2), steps=4)
    >>> metric.update(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), model), images, targets)
    >>> {"overall", "base/overall", "minus_base/overall"} <= metric.compute().keys()
    True
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    targets: list[Tensor]
    predicted: list[Tensor]
    ends: list[Tensor]
    left_out: Tensor

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
        _check_methods(method, compare)
        if compare is None:
            base = getattr(method, "base", None)
            compare = {"base": base} if isinstance(base, SaliencyMethod) else {}
        check_names(compare, explained=type(method).__name__)
        self.methods = {OWN: method, **compare}
        self.limits = dict(limits or {})
        self.steps, self.tolerance, self.batch_size = steps, tolerance, batch_size
        self.clock = clock
        self.latest: dict[str, Assessment] = {}
        self._zero: tuple[Any, Tensor] | None = None
        self.grid = grid
        self._passed = 0
        self._add_states(len(self.methods))
        keep_apart(self, self.methods, self.limits, tolerance)
        self.add_state("left_out", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add_states(self, methods: int) -> None:
        self.add_rows("ends", 3)
        self.add_rows("share")
        if self.grid:
            self.add_rows("small", self.grid, self.grid)
        # Begins: 1 + the image's number where a row begins an image, else 0. Ranks may use the same numbers,
        # so that a number alone does not identify an image.
        for state in ("targets", "predicted", "difficult", "begins"):
            self.add_rows(state, dtype=torch.int64)
        self.add_rows("probabilities", methods, 2, self.steps + 1)  # Not "curves", which is a method.
        for state in ("mass", "tied"):
            self.add_rows(state, methods)
        for state in ("hits", "flat"):
            self.add_rows(state, methods, dtype=torch.int64)

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
                through the model once for all of them if the method supports it.
            regions: Where that class is: masks, or half-open boxes (x0, y0, x1, y1) per image, in any form
                that ``read_regions`` understands; with None there is no Pointing Game, and an image with an
                empty region does not count in it.
            difficult: Which images belong to the "difficult" subset; None leaves it out.
            size: (height, width) that boxes refer to, if not the images'.
            numbers: Each image's number, for ``limits`` and for the order of samples, so that nothing depends
                on the rank that scored them. None numbers them as they come.
        """
        shared = len(images) == 1 < len(targets)
        # Contiguous: the layout of a copy of an expanded tensor depends on the number of targets.
        trials = images.expand(len(targets), -1, -1, -1).contiguous() if shared else images
        check_inputs("SESSMetric", trials, targets)
        only_passes = all(method.only_passes for method in self.methods.values())
        with explaining(model, only_passes), torch.no_grad():
            scene = self._scene(model, trials, targets, regions, size)
            numbers = self._numbers(numbers, len(targets), shared)
            self.latest, share = self._assessed(model, images if shared else scene.images, scene, numbers)
            self._append(scene, share, numbers, difficult, shared)

    def leave_out(self, count: int) -> None:
        """Count samples that cannot be explained."""
        self.left_out = self.left_out + count  # Not in place: the state may be an inference tensor.

    def _scene(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        regions: Regions | None,
        size: tuple[int, int] | None,
    ) -> Scene:
        if regions is not None:
            regions = read_regions(regions, size=size_of(images), labels=targets)
            if len(regions) != len(targets):
                raise ValueError(f"regions: got {len(regions)} for {len(targets)} maps; give one per map.")
            if not isinstance(regions, Tensor):
                regions = [*pad_boxes(regions, images.device)]  # Once for all scores.
        images, targets = borrowed(images), borrowed(targets).long()
        blurred = blurred_baseline(images)
        ends, predicted = self._ends(model, images, blurred, targets)
        return Scene(images, blurred, targets, predicted, ends, regions, size)

    def _numbers(self, numbers: Sequence[int] | None, count: int, shared: bool) -> Sequence[int]:
        """Return the number of each sample's image."""
        if numbers is None:
            done = self._passed + sum(map(len, self.targets))
            return range(done, done + count)
        return [numbers[0]] * count if shared else numbers

    def _assessed(
        self, model: nn.Module, images: Tensor, scene: Scene, numbers: Sequence[int]
    ) -> tuple[dict[str, Assessment], Float[Tensor, " B"]]:
        """Return every method's maps with their scores, and the regions' share of the images."""
        explained = self._explained(model, images, scene.targets)
        maps = [maps for maps, _ in explained]
        curves = self._curves(model, maps, scene, numbers)
        # The last map covers all of the image: its share is the region's.
        hits, [*masses, share] = region_scores([*maps, torch.ones_like(maps[0])], scene, self.tolerance)
        assessed = {
            name: Assessment(maps[i], curves[name][0], curves[name][1], hits[i], masses[i], explained[i][1])
            for i, name in enumerate(self.methods)
        }
        return assessed, share

    def _append(
        self, scene: Scene, share: Tensor, numbers: Sequence[int], difficult: Tensor | None, shared: bool
    ) -> None:
        """Append the rows of a batch: of all states, or, after an error, of none."""
        maps, unknown = self.latest[OWN].maps, torch.full_like(scene.targets, NO_TRIAL)
        begins = [1 + number if i == 0 or not shared else 0 for i, number in enumerate(numbers)]
        self.append(
            targets=scene.targets, predicted=scene.predicted, ends=scene.ends,
            begins=sent(begins, maps.device),
            difficult=unknown if difficult is None else difficult.to(unknown),
            share=share, **method_rows([*self.latest.values()]),
        )  # fmt: skip
        if self.grid:
            self.append(small=adaptive_avg_pool2d(maps[:, None], self.grid)[:, 0])

    def _explained(self, model: nn.Module, images: Tensor, targets: Tensor) -> list[tuple[Tensor, float]]:
        """Return every method's maps, and the seconds they took."""
        if self.clock is None:
            first, *others = self.methods.values()
            return [(maps, torch.nan) for maps in first.maps_beside(model, images, targets, others)]
        timed = []
        for method in self.methods.values():
            started = self.clock(images.device)
            (maps,) = method.maps_beside(model, images, targets)
            timed.append((maps, self.clock(images.device) - started))
        return timed

    def _ends(
        self, model: nn.Module, images: Tensor, blurred: Tensor, targets: Tensor
    ) -> tuple[Float[Tensor, "B 3"], Int[Tensor, " B"]]:
        """Return the scores of image, blurred image and zeros, and the prediction."""
        activation = self.methods[OWN].activation
        logits = _logits(model, images, self.batch_size)
        warn_of_probabilities("SESSMetric", logits, is_first=not self.targets)
        # Zeros are the same in every batch: scored once per run, as long as nothing writes to the model.
        tensors = (*model.parameters(), *model.buffers())
        versions = [(id(tensor), tensor._version) for tensor in tensors if not tensor.is_inference()]
        key = (id(model), versions, images.shape[1:], images.dtype, images.device)
        if self._zero is None or self._zero[0] != key:
            self._zero = key, classify(model, torch.zeros_like(images[:1])).float()
        zero = self._zero[1].expand(len(images), -1)
        ends_logits = torch.cat([logits, _logits(model, blurred, self.batch_size), zero])
        ends = log_scores(ends_logits, targets.repeat(3), activation).exp().view(3, -1).mT
        return ends, predict_beside(logits, targets, activation)

    def _curves(
        self, model: nn.Module, maps: Sequence[Tensor], scene: Scene, numbers: Sequence[int]
    ) -> dict[str, Float[Tensor, "2 B T"]]:
        """Return every method's curves; NaN where its limit leaves an image out."""
        which = [_within(numbers, self.limits.get(name)) for name in self.methods]
        image, blurred, zeros = scene.ends.unbind(1)
        curves = insertion_and_deletion_curves(
            model, scene.images, maps, scene.targets,
            steps=self.steps, activation=self.methods[OWN].activation, batch_size=self.batch_size,
            blurred=scene.blurred, ends=(image, blurred, zeros), which=which,
        )  # fmt: skip
        return dict(zip(self.methods, curves, strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Update, and return the figures of this batch alone; its samples' numbers continue earlier ones."""
        # Torchmetrics sets the rows of earlier batches aside while it scores this one.
        self._passed = sum(map(len, self.targets))
        try:
            values: dict[str, float] = super().forward(*args, **kwargs)
        finally:
            self._passed = 0
        return values

    @property
    def update_called(self) -> bool:
        """True: torchmetrics need not warn of a rank without samples."""
        return True

    def compute(self) -> dict[str, float]:
        """Return every figure as a float; an empty dict before the first update.

        Figures without data are left out: there is no Pointing Game without regions, no difficult subset
        without marks.
        """
        return scores(self._rows(), [*self.methods])

    def summary(self) -> Summary:
        """Return ``compute``, ``curves`` and ``samples`` at the cost of a single gathering from all ranks."""
        rows, names = self.gather(), [*self.methods]
        return Summary(scores(rows, names), mean_curves(rows, names), samples(rows))

    def curves(self) -> dict[str, Float[Tensor, "2 T"]]:
        """Return each method's mean insertion and deletion curve over the samples that have one.

        Like ``compute``, this covers all ranks' samples, so every rank must call it.
        """
        return mean_curves(self.gather(), [*self.methods])

    def samples(self) -> Samples:
        """Return each sample with its scores; like ``compute``, every rank must call this."""
        return samples(self.gather())

    def gather(self) -> Rows:
        """Return the rows of all ranks, in order and on the host; every rank must call this."""
        with self.gathered():
            return self._rows()

    def _rows(self) -> Rows:
        # First to the host: not every device has float64, in which figures are computed.
        return in_order({name: self.rows(name).cpu() for name in self.states}, int(self.left_out))

    @override
    def plot(self, val: Any = None, ax: Any = None, keys: Sequence[str] = MAIN) -> Any:
        """Plot figures as points, or over time; arguments as for ``plot_scores``."""
        return plot_scores(self.compute() if val is None else val, ax, keys)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.latest, self._zero = {}, None


def _logits(model: nn.Module, images: Tensor, batch_size: int | None) -> Float[Tensor, "B N"]:
    size = batch_limit(batch_size, images)
    logits = in_batches(lambda part, _: classify(model, stacked(part)), images, size)
    return joined(logits).float()


def _within(numbers: Sequence[int], limit: int | None) -> Sequence[int]:
    """Return the indices of the numbers below a limit."""
    return [i for i, number in enumerate(numbers) if limit is None or number < limit]


def _check_methods(method: Any, compare: Any) -> None:
    if not isinstance(compare, Mapping | None):
        raise TypeError(
            'SESSMetric: compare must be a dict of methods by name, such as {"cam": GradCAM()}, got '
            f"{type(compare).__name__}."
        )
    for name, one in {"method": method, **(compare or {})}.items():
        if not isinstance(one, SaliencyMethod):
            raise TypeError(
                f"SESSMetric: {name} must be a saliency method such as SESS(GradCAM()), got {one!r}."
            )
