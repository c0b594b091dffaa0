"""From the rows of a SESSMetric to its scores, mean curves and samples: pure functions, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sess_lightning.metrics.bootstrap import ClassMean, Mean, Statistic, interval, resample
from sess_lightning.metrics.functional import curve_auc
from sess_lightning.scores import (
    CURVES,
    CURVES_N,
    DIFFICULT,
    ENDS,
    OVERALL,
    POINTING_GAME,
    REGION_SHARE,
    RELEVANCE_MASS,
    TIED_SHARE,
    Key,
    build,
)

NO_TRIAL = -1
LEAST_TO_GAIN = 0.05
"""Below this mean drop in probability from image to baseline, curves are not normalised."""
CURVE_SCORES = (*CURVES, OVERALL)
POINTING_SCORES = (POINTING_GAME, DIFFICULT)


class Rows(NamedTuple):
    """A row per sample, in the order of the images; method 0 is the explained one.

    Attributes:
        numbers: The image's number. Where ranks number images by themselves, several images have the same
            number: the first rank's comes first.
        image_of: Index of the sample's image, from 0, whatever the numbers.
        targets: The class explained.
        predicted: The class predicted.
        difficult: 1 in the "difficult" subset, 0 not, -1 unknown.
        ends: The target's probability on the image, the blurred image and zeros.
        probabilities: Each method's insertion and deletion curve; NaN where none was drawn.
        hits: Pointing Game of each method: 1 hit, 0 miss, -1 no trial.
        flat: 1 where a method's map is flat.
        mass: Share of each method's map inside the region; NaN without one.
        tied: Share of each method's map whose order is arbitrary.
        share: The region's share of the image; NaN without one.
        small: The explained method's map on a grid of G x G; G is 0 where none is kept.
        digests: Identify the images; 0 where they are not known.
        left_out: How many further samples could not be explained.
    """

    numbers: Int[Tensor, " N"]
    image_of: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    predicted: Int[Tensor, " N"]
    difficult: Int[Tensor, " N"]
    ends: Float[Tensor, "N 3"]
    probabilities: Float[Tensor, "N M 2 T"]
    hits: Int[Tensor, "N M"]
    flat: Int[Tensor, "N M"]
    mass: Float[Tensor, "N M"]
    tied: Float[Tensor, "N M"]
    share: Float[Tensor, " N"]
    small: Float[Tensor, "N G G"]
    digests: Int[Tensor, " N"]
    left_out: int = 0


class Samples(NamedTuple):
    """Each sample of all ranks, with the scores of the explained method's map, on the host.

    Attributes:
        numbers: As in ``Rows``.
        targets: The class explained.
        predicted: The class predicted.
        scores: The model's probability of the target.
        insertion: Area under the curve; NaN where none was drawn.
        deletion: Area under the curve; NaN where none was drawn.
        hits: Pointing Game: 1 hit, 0 miss, -1 no trial.
        mass: Share of the map inside the region; NaN without one.
        share: The region's share of the image; NaN without one.
        small: Each map averaged over a G x G grid.
        flat: 1 where the map is flat.
        digests: As in ``Rows``.
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
    flat: Int[Tensor, " N"]
    digests: Int[Tensor, " N"]


class Summary(NamedTuple):
    """All results of a metric.

    Attributes:
        values: As ``SESSMetric.compute`` gives them.
        curves: As ``SESSMetric.curves`` gives them.
        samples: As ``SESSMetric.samples`` gives them.
    """

    values: dict[str, float]
    curves: dict[str, Float[Tensor, "2 T"]]
    samples: Samples


def in_order(states: Mapping[str, Tensor], left_out: int = 0) -> Rows:
    """Return a metric's states, on the host, as rows in order.

    Args:
        states: States by name, in the order in which updates and ranks appended them. ``begins`` marks where
            an image's rows begin: 1 + its number there, else 0. Ranks may use the same numbers, so that a
            number alone does not identify an image.
        left_out: As in ``Rows``.
    """
    begins = states["begins"]
    numbers = begins[begins > 0][begins.sign().cumsum(0) - 1] - 1
    order = numbers.argsort(stable=True)
    rows = {name: state[order] for name, state in states.items()}
    image_of = rows.pop("begins").sign().cumsum(0) - 1
    rows.setdefault("small", numbers.new_empty((len(order), 0, 0), dtype=torch.float32))
    rows.setdefault("digests", numbers.new_zeros(len(order)))
    return Rows(numbers[order], image_of, **rows, left_out=left_out)


def scores(rows: Rows, methods: Sequence[str]) -> dict[str, float]:
    """Return every score by its key (``sess_lightning.scores``); an empty dict where there are no rows.

    Scores without data are left out: there is no Pointing Game without regions, no difficult subset without
    marks.

    Args:
        rows: Rows of at least one method.
        methods: The methods' names; the first, the explained one's, is empty.
    """
    if not len(rows.targets):
        return {}
    values = _counts(rows)
    statistics: dict[Key, Statistic] = {}
    for i, name in enumerate(methods):
        values |= {build(score, name): value for score, value in _of_maps(rows, i).items()}
        statistics |= _statistics(rows, i, name)
    values |= {build(*key): statistic.value for key, statistic in statistics.items()}
    resampled = resample(statistics, int(rows.image_of[-1]) + 1, len(rows.targets))
    for name, score in product(methods[1:], POINTING_SCORES):
        if (other := Key(score, name)) in resampled:  # A mean over classes has no paired differences.
            values[build(score, name, minus=True)] = values[score] - values[build(*other)]
            resampled[Key(score, name, minus=True)] = resampled[Key(score)] - resampled[other]
    return values | interval_ends(resampled)


def interval_ends(resampled: Mapping[Key, Float[Tensor, " R"]]) -> dict[str, float]:
    """Return both ends of each statistic's 95 % interval by their keys; none where nothing was finite."""
    return {
        build(*key._replace(end=end)): value
        for key, drawn in resampled.items()
        for end, value in zip(ENDS, interval(drawn), strict=False)
    }


def _counts(rows: Rows) -> dict[str, float]:
    """Return the scores that belong to the samples, whatever explains them."""
    values = {
        "n": len(rows.targets),
        "nan": int((~rows.ends.isfinite().all(1)).sum()),
        "misclassified": int((rows.predicted != rows.targets).sum()),
    }
    if rows.left_out:
        values["left_out"] = rows.left_out
    subsets = _trials(rows, 0)
    if subsets:
        values["skipped"] = int((rows.hits[:, 0] == NO_TRIAL).sum())
    values |= {f"{score}_n": int(chosen.sum()) for score, chosen in subsets.items()}
    shares = {REGION_SHARE: float(rows.share.nanmean())} if rows.share.isfinite().any() else {}
    return {name: float(value) for name, value in values.items()} | shares


def _of_maps(rows: Rows, i: int) -> dict[str, float]:
    """Return the scores of method ``i`` that have no interval."""
    areas = _areas(rows, i)
    drawn = areas[:, 2].isfinite()
    values = {
        CURVES_N: float(drawn.sum()),
        "flat": float(rows.flat[:, i].sum()),
        TIED_SHARE: float(rows.tied[:, i].double().mean()),
    }
    # The sum of a map with negative values has no shares.
    signed = int((rows.mass[:, i].isnan() & rows.share.isfinite()).sum())
    if signed:
        values["signed"] = float(signed)
    if drawn.any():
        image, blurred, zeros = rows.ends.double()[drawn].mean(0)
        to_gain = image - blurred, image - zeros
        for score, area, most in zip(CURVES, areas.T[:2], to_gain, strict=True):
            if most >= LEAST_TO_GAIN:
                values[f"{score}_normalised"] = float(area[drawn].mean() / most)
    return values


def _statistics(rows: Rows, i: int, name: str) -> dict[Key, Statistic]:
    """Return the statistics to resample of method ``i``, and of its difference to the explained one."""
    statistics: dict[Key, Statistic] = {}
    for names, column in (CURVE_SCORES, _areas), ((RELEVANCE_MASS,), _masses):
        values = column(rows, i)
        given = [(False, values)] + ([(True, column(rows, 0) - values)] if name else [])
        for minus, columns in given:
            drawn = columns.isfinite().all(1)
            if drawn.any():
                statistics |= {
                    Key(score, name, minus): Mean(values, rows.image_of[drawn])
                    for score, values in zip(names, columns[drawn].T, strict=True)
                }
    hits = rows.hits[:, i].double()
    return statistics | {
        Key(score, name): ClassMean(hits[chosen], rows.image_of[chosen], rows.targets[chosen])
        for score, chosen in _trials(rows, i).items()
    }


def _trials(rows: Rows, i: int) -> dict[str, Tensor]:
    """Return the samples of each Pointing Game of method ``i``."""
    trial = rows.hits[:, i] != NO_TRIAL
    subsets = zip(POINTING_SCORES, (trial, trial & (rows.difficult == 1)), strict=True)
    return {score: chosen for score, chosen in subsets if chosen.any()}


def _areas(rows: Rows, i: int) -> Float[Tensor, "N 3"]:
    areas = curve_auc(rows.probabilities[:, i].double())
    return torch.cat([areas, areas[:, :1] - areas[:, 1:]], 1)


def _masses(rows: Rows, i: int) -> Float[Tensor, "N 1"]:
    return rows.mass[:, i, None].double()


def mean_curves(rows: Rows, methods: Sequence[str]) -> dict[str, Float[Tensor, "2 T"]]:
    """Return each method's mean insertion and deletion curve over the samples that have one."""
    return {name: rows.probabilities[:, i].contiguous().nanmean(0) for i, name in enumerate(methods)}


def samples(rows: Rows) -> Samples:
    """Return each sample with the scores of the explained method's map."""
    insertion, deletion = curve_auc(rows.probabilities[:, 0]).unbind(1)
    return Samples(
        rows.numbers, rows.targets, rows.predicted, rows.ends[:, 0], insertion, deletion, rows.hits[:, 0],
        rows.mass[:, 0], rows.share, rows.small, rows.flat[:, 0], rows.digests,
    )  # fmt: skip


def sample_scores(rows: Rows, i: int) -> dict[str, Float[Tensor, " N"]]:
    """Return each sample's scores of method ``i``, float64; NaN where there is none.

    ``hit`` is the value whose mean is the Pointing Game's accuracy.
    """
    hits = rows.hits[:, i].double()
    columns = dict(zip(CURVE_SCORES, _areas(rows, i).unbind(1), strict=True)) | {
        "hit": hits.where(hits != NO_TRIAL, torch.nan),
        RELEVANCE_MASS: rows.mass[:, i].double(),
        TIED_SHARE: rows.tied[:, i].double(),
        "flat": rows.flat[:, i].double(),
    }
    return columns | ({} if i else {REGION_SHARE: rows.share.double()})
