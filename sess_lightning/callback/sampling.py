"""Which samples a run explains: the same in every run, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from sess_lightning.callback.loaders import Source

GOLDEN, SILVER = 0.618034, 0.414214


def spread(count: int, size: int) -> list[int]:
    """Return ``count`` of ``size`` places in order, one in each of ``count`` equal sections.

    The place within a section follows the golden ratio: data sets are often ordered by class, or in cycles of
    classes, and evenly spaced places would hit one class again and again.
    """
    edges = [k * size // count for k in range(count + 1)]
    return [edges[k] + int(GOLDEN * k % 1 * (edges[k + 1] - edges[k])) for k in range(count)]


def spread_in_batch(count: int, size: int, batch_idx: int) -> list[int]:
    """Return ``count`` evenly spaced places in a batch; their start differs from batch to batch."""
    start = int(GOLDEN * batch_idx * size)
    return sorted((start + i * size // count) % size for i in range(count))


def numbering(count: int) -> list[int]:
    """Return a number for each of ``count`` samples in order, so that low numbers are spread out as well."""
    ranked = sorted(range(count), key=lambda k: SILVER * k % 1)
    return sorted(range(count), key=ranked.__getitem__)


@dataclass(frozen=True)
class Order:
    """The places in the data set of the items that pass on one rank.

    Attributes:
        length: Samples that all ranks see together.
        batch_size: Items in a full batch.
        step: Distance from an item to the next one, in samples of the data set.
        first: The first sample.
        mine: Of samples that every rank sees, this one takes those whose number modulo ``mine[1]`` is
            ``mine[0]``.
        items: Items that pass on this rank; None if all ranks have the same number.
    """

    length: int
    batch_size: int
    step: int = 1
    first: int = 0
    mine: tuple[int, int] = (0, 1)
    items: int | None = None

    shares = 1
    """How many counts ``choose`` is called with: one, for all ranks."""

    @property
    def own(self) -> int:
        """Number of items that pass on this rank, including a sampler's padding."""
        return -(-self.length // self.step) if self.items is None else self.items

    def passing(self, batch_idx: int) -> int:
        """Return how many items the batch must have if this is the order."""
        return min(self.batch_size, self.own - batch_idx * self.batch_size)

    def choose(self, count: int) -> Choice:
        """Return this rank's part of ``count`` samples that are spread over the data set."""
        rank, world = self.mine
        items = {
            (index - self.first) // self.step: k
            for k, index in enumerate(spread(count, self.length))
            if (index - self.first) % self.step == 0 and k % world == rank
        }
        return Choice(count, self.batch_size, {i: k for i, k in items.items() if 0 <= i < self.own})


@dataclass(frozen=True)
class Pile:
    """Samples that pass in an unknown order.

    Attributes:
        length: Samples on all ranks or, where each chooses for itself, the most on this one.
        batch_size: Items in a full batch.
        shares: Ranks that each choose samples of their own, since they do not know how many the others have.
        mine: Start and end of this rank's samples if all ranks' samples are concatenated.
        every: Number of the concatenated samples, including a sampler's padding.
    """

    length: float
    batch_size: int
    shares: int = 1
    mine: tuple[int, int] | None = None
    every: int = 0

    def passing(self, batch_idx: int) -> int:
        """Return how many items the batch must have if the length is right."""
        if self.mine is None:
            return self.batch_size
        return min(self.batch_size, self.mine[1] - self.mine[0] - batch_idx * self.batch_size)

    def choose(self, count: int) -> Share:
        """Return this rank's part of ``count`` samples."""
        if self.mine is None:
            return Share(count, 0, count, self.batch_size)
        first, end = self.mine
        mine = [k for k, place in enumerate(spread(count, self.every)) if first <= place < end]
        return Share(len(mine), mine[0] if mine else 0, count, self.batch_size, end - first)


@dataclass(frozen=True)
class Choice:
    """The samples that one rank explains.

    Attributes:
        total: Samples on all ranks.
        batch_size: Items in a full batch.
        items: Index of an item, in the order in which they pass on this rank -> its number among all samples.
    """

    total: int
    batch_size: int
    items: Mapping[int, int]

    @property
    def count(self) -> int:
        """Number of samples that this rank explains."""
        return len(self.items)

    def of_batch(self, batch_idx: int) -> dict[int, int]:
        """Return the places of samples in a batch, and their numbers."""
        start = batch_idx * self.batch_size
        return {i - start: k for i, k in self.items.items() if start <= i < start + self.batch_size}

    @cached_property
    def numbers(self) -> list[int]:
        """``numbering`` of all samples."""
        return numbering(self.total)


@dataclass(frozen=True)
class Share:
    """How many samples one rank explains, whichever they are.

    Attributes:
        count: Their number.
        first: How many of all samples come before them.
        total: Samples that are numbered together: those of all ranks, or of this one alone.
        batch_size: Items in a full batch.
        length: Items that pass on this rank; None if unknown.
    """

    count: int
    first: int
    total: int
    batch_size: int
    length: int | None = None

    def due(self, batch_idx: int, batches: float) -> int:
        """Return how many samples are due up to a batch."""
        if batches == float("inf") or batch_idx + 1 >= batches:
            return self.count
        if self.length is None:
            return self.count * (batch_idx + 1) // int(batches)
        passed = min(self.length, (batch_idx + 1) * self.batch_size)
        return self.count * passed // self.length if self.length else 0

    def is_past(self, batch_idx: int) -> bool:
        """Return whether the loader has ended before a batch, which then comes from another loader."""
        return self.length is not None and batch_idx * self.batch_size >= self.length

    @cached_property
    def numbers(self) -> list[int]:
        """The numbers of this rank's samples."""
        return numbering(self.total)[self.first : self.first + self.count]


def find_order(loader: Any, batches: float, rank: int = 0, world: int = 1) -> Order | None:
    """Return the order in which a loader's samples pass on this rank.

    None if it is unknown: shuffled, streamed, batched by the data set, or with a custom sampler.

    Args:
        loader: A DataLoader or anything else.
        batches: How many of its batches will pass on this process.
        rank: Which process this is.
        world: How many there are.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    if type(batch_sampler) is not BatchSampler:
        return None
    sampler: Any = batch_sampler.sampler
    size = batch_sampler.batch_size
    if type(sampler) is SequentialSampler:
        length, mine = len(sampler.data_source), (rank, world)
        return Order(int(min(length, batches * size)), size, mine=mine)
    if type(sampler) is DistributedSampler and not sampler.shuffle:
        length, step = len(cast(Sized, sampler.dataset)), sampler.num_replicas
        return Order(int(min(length, batches * size * step)), size, step, sampler.rank)
    return None


def find_samples(source: Source, images: int, batch_idx: int, rank: int, world: int) -> Order | Pile:
    """Return what is known of the samples that pass on this rank.

    Args:
        source: Their loader.
        images: Number of images in the first batch that was seen.
        batch_idx: Index of that batch.
        rank: Which process this is.
        world: How many there are.
    """
    lengths = source.lengths if len(source.holdings) == world else None
    order = find_order(source.loader, source.batches, rank, world)
    unknown = Pile(images * source.batches, images, world)
    if lengths is None or not sum(lengths):
        return order if order is not None and order.passing(batch_idx) == images else unknown
    first, every = sum(lengths[:rank]), sum(lengths)
    if order is not None and source.is_sharded and order.step == 1:
        # As if the shards were one data set, in which this rank's samples are consecutive.
        order = replace(order, length=every, first=first, mine=(0, 1), items=lengths[rank])
    sampler = source.loader.batch_sampler.sampler
    length = (
        min(every, len(cast(Sized, sampler.dataset))) if isinstance(sampler, DistributedSampler) else every
    )
    size = source.loader.batch_sampler.batch_size
    found = order or Pile(float(length), size, mine=(first, first + lengths[rank]), every=every)
    # Otherwise the adapter or the collate function leaves samples out.
    return found if found.passing(batch_idx) == images else unknown
