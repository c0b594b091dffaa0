"""The uncertainty of means: bootstrap intervals over images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sess_lightning.metrics.functional import class_mean

RESAMPLES = 2000
ELEMENTS = 2**24
"""The most elements of a matrix of resamples; if more are needed, they are drawn in chunks."""


def bootstrap_counts(images: int, rows: int | None = None) -> Iterator[Float[Tensor, "_ {images}"]]:
    """Yield, in chunks, how often each image is drawn in each bootstrap resample, by a generator of its own.

    A resample's sum is then one matrix product, and all figures of a run share the same resamples, so that
    differences between methods are paired. The draws do not depend on the chunks.

    Args:
        images: Number of images: a resample draws as many, each with all its samples.
        rows: Number of samples, which decides how many resamples fit in a chunk; None is ``images``.
    """
    generator = torch.Generator().manual_seed(0)
    chunk = max(1, ELEMENTS // max(images, rows or images))
    for start in range(0, RESAMPLES, chunk):
        size = (min(chunk, RESAMPLES - start), images)
        drawn = torch.randint(images, size, generator=generator, device=generator.device)
        counts = drawn.new_zeros(size, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, counts.new_ones(()).expand_as(drawn))


class Mean:
    """The mean of a value over samples, which stay together with their image.

    Args:
        values: Of each sample, float64.
        image_of: The image each sample belongs to.

    Attributes:
        value: The mean of all samples.
    """

    def __init__(self, values: Float[Tensor, " N"], image_of: Int[Tensor, " N"]) -> None:
        self.value = float(values.mean())
        self._images, place = image_of.unique(return_inverse=True)
        empty = values.new_zeros(len(self._images))
        self._sums = empty.index_add(0, place, values)
        self._sizes = empty.index_add(0, place, torch.ones_like(values))

    def __call__(self, counts: Float[Tensor, "R G"]) -> Float[Tensor, " R"]:
        """Return the mean of each resample; NaN where it drew no sample."""
        some = counts[:, self._images] if len(self._images) < counts.shape[1] else counts
        return some @ self._sums / (some @ self._sizes)


class ClassMean:
    """The mean over classes of the share of hits, over the classes that a resample has drawn.

    Args:
        hits: Of each sample, 1 or 0, float64.
        image_of: The image each sample belongs to.
        targets: Its class.

    Attributes:
        value: The mean of all samples.
    """

    def __init__(
        self, hits: Float[Tensor, " N"], image_of: Int[Tensor, " N"], targets: Int[Tensor, " N"]
    ) -> None:
        self._hits, self._image_of = hits, image_of
        classes, self._class_of = targets.unique(return_inverse=True)
        self._classes = len(classes)
        self.value = float(self(hits.new_ones(1, int(image_of.max()) + 1)))

    def __call__(self, counts: Float[Tensor, "R G"]) -> Float[Tensor, " R"]:
        """Return the mean of each resample; NaN where it drew no sample."""
        drawn = counts[:, self._image_of]
        return class_mean(self._by_class(drawn * self._hits), self._by_class(drawn))

    def _by_class(self, columns: Float[Tensor, "R N"]) -> Float[Tensor, "R K"]:
        sums = columns.new_zeros(len(columns), self._classes)
        return sums.scatter_add_(1, self._class_of.expand_as(columns), columns)


Statistic: TypeAlias = "Mean | ClassMean"
"""Called with how often each image is drawn in each resample, (R, images), returns each's value, (R,)."""
K = TypeVar("K")


def resample(
    statistics: Mapping[K, Statistic], images: int, rows: int | None = None
) -> dict[K, Float[Tensor, " R"]]:
    """Return every statistic of each bootstrap resample; arguments as for ``bootstrap_counts``."""
    parts: dict[K, list[Tensor]] = {key: [] for key in statistics}
    for counts in bootstrap_counts(images, rows):
        for key, statistic in statistics.items():
            parts[key].append(statistic(counts))
    return {key: torch.cat(drawn) for key, drawn in parts.items()}


def interval(resampled: Float[Tensor, " R"]) -> list[float]:
    """Return both ends of the 95 % percentile interval, an empty list if nothing was finite."""
    finite = resampled[resampled.isfinite()]
    if not len(finite):
        return []
    return torch.quantile(finite, finite.new_tensor([0.025, 0.975])).tolist()
