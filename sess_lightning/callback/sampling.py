"""Which samples a run explains, the same on however many processes, and how many it can pay for."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

GOLDEN, SILVER = 0.618034, 0.414214


def spread(count: int, size: int) -> list[int]:
    """Return ``count`` of ``size`` places in order, one in each of as many equal stretches.

    Where in its stretch a place lies follows the golden ratio: data sets are often ordered by class, or in
    cycles of classes, and evenly spaced places would meet one class again and again.
    """
    edges = [k * size // count for k in range(count + 1)]
    return [edges[k] + int(GOLDEN * k % 1 * (edges[k + 1] - edges[k])) for k in range(count)]


def spread_in_batch(count: int, size: int, batch_idx: int) -> list[int]:
    """Return ``count`` places in a batch, evenly apart; where they begin differs from batch to batch."""
    start = int(GOLDEN * batch_idx * size)
    return sorted((start + i * size // count) % size for i in range(count))


def numbering(count: int) -> list[int]:
    """Return a number for each of ``count`` samples in order; those with low numbers are spread, too."""
    ranked = sorted(range(count), key=lambda k: SILVER * k % 1)
    return sorted(range(count), key=ranked.__getitem__)


@dataclass(frozen=True)
class Order:
    """Where the items that pass on one process stand in the data set.

    Attributes:
        length: Samples that all processes see together.
        batch_size: Items in a full batch.
        step: From an item to the next one, samples of the data set.
        first: Sample that comes first.
        mine: Of samples that every process sees, this one takes those whose number modulo ``mine[1]`` is
            ``mine[0]``.
    """

    length: int
    batch_size: int
    step: int = 1
    first: int = 0
    mine: tuple[int, int] = (0, 1)

    def passing(self, batch_idx: int) -> int:
        """Return how many items the batch has to have if this is the order."""
        own = -(-self.length // self.step)  # Padded: every process has as many.
        return min(self.batch_size, own - batch_idx * self.batch_size)

    def choose(self, count: int) -> Choice:
        """Return this process' part of ``count`` samples that are spread over the data set."""
        rank, world = self.mine
        items = {
            (index - self.first) // self.step: k
            for k, index in enumerate(spread(count, self.length))
            if (index - self.first) % self.step == 0 and k % world == rank
        }
        return Choice(count, self.batch_size, items)


@dataclass(frozen=True)
class Choice:
    """The samples that one process explains.

    Attributes:
        count: Samples on all processes.
        batch_size: Items in a full batch.
        items: Item, in the order in which they pass on this process -> which of the ``count`` samples it is.
    """

    count: int
    batch_size: int
    items: Mapping[int, int]

    def of_batch(self, batch_idx: int) -> dict[int, int]:
        """Return the places of samples in a batch, and which samples they are."""
        start = batch_idx * self.batch_size
        return {i - start: k for i, k in self.items.items() if start <= i < start + self.batch_size}

    @cached_property
    def numbers(self) -> list[int]:
        """``numbering`` of all samples."""
        return numbering(self.count)


def find_order(loader: Any, batches: float, rank: int = 0, world: int = 1) -> Order | None:
    """Return in which order a loader's samples pass on this process.

    None where nothing says so: shuffled, streamed, batched by the data set, with a sampler of the user's own.

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
