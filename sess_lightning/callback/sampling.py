"""Which samples a run explains: the same in every run, on however many processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from sess_lightning.callback.batches import check_boxes
from sess_lightning.callback.classes import known_labels
from sess_lightning.cost.budget import Budget
from sess_lightning.introspection.logits import check_inputs
from sess_lightning.types import Batch

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


@dataclass(frozen=True)
class Kept:
    """A batch's samples as the first run met them, on the host, and which of all samples they are.

    Attributes:
        samples: A row for each class to explain.
        numbers: Which of all samples each row is of.
        places: Where in the batch they were; empty where that is not known any more.
        validated: Validation's logits of them in this run, where they are known.
        chosen: How many images were chosen, those that cannot be explained included; None is all that are.
    """

    samples: Batch
    numbers: list[int]
    places: list[int] = field(default_factory=list)
    validated: Tensor | None = None
    chosen: int | None = None

    @property
    def left_out(self) -> int:
        """How many samples cannot be explained: no known class, or a pixel that is no number."""
        return 0 if self.chosen is None else self.chosen - len(set(self.numbers))

    def parts(self) -> list[Kept]:
        """Return what can be explained at once.

        Alone are images of several classes, which share forward passes, and those whose call takes more.
        """
        rows: dict[int, list[int]] = {}
        for row, number in enumerate(self.numbers):
            rows.setdefault(number, []).append(row)
        alone = [own for own in rows.values() if len(own) > 1 or self.samples.context]
        together = [own[0] for own in rows.values() if own not in alone]
        return [self.take(own) for own in (together, *alone) if own]

    def known(self, classes: int) -> Kept:
        """Return what a model with so many classes can be asked about; other labels stand for none.

        Raises:
            ValueError: If they do not look like unknown ones.
        """
        known = known_labels(self.samples.labels.tolist(), classes)
        return self if all(known) else self.take([row for row, is_known in enumerate(known) if is_known])

    def take(self, which: Sequence[int]) -> Kept:
        """Return rows ``which``."""
        validated = None if self.validated is None else self.validated[list(which)]
        return Kept(self.samples.take(which), [self.numbers[i] for i in which], validated=validated)


class SampleKeeper:
    """Takes samples from the batches that pass, and gives the same ones in every later run.

    Attributes:
        budget: How many samples there are to be; None until ``settle``.
    """

    def __init__(self) -> None:
        self.budget: Budget | None = None
        self._choice: Choice | None = None
        self._kept: dict[int, Kept] = {}
        self._loaded: Mapping[str, Any] = {}
        self._taken = 0
        self._waiting: list[Kept] = []

    @property
    def total(self) -> int:
        """How many samples this process explains in a run."""
        if self._choice is not None:
            return len(self._choice.items)
        return 0 if self.budget is None else self.budget.samples

    @property
    def ids(self) -> list[str]:
        """The ids of the samples kept so far, where batches have them."""
        return [name for kept in self._kept.values() for name in kept.samples.ids or ()]

    def forget(self) -> None:
        """Begin anew: another loader, perhaps."""
        self.budget, self._choice, self._kept, self._loaded, self._waiting = None, None, {}, {}, []

    def settle(self, order: Order | None, budget: Budget, first: Batch, restore: bool) -> None:
        """Settle which samples are taken.

        Args:
            order: In which order samples pass; None if unknown.
            budget: How many there are to be: of all processes, or without an order on each.
            first: The first batch.
            restore: Whether samples of a checkpoint are this process' own.
        """
        self.budget = budget
        self._choice = None if order is None else order.choose(budget.samples)
        if order is None and restore:
            self._kept = _restored(self._loaded, budget, first)

    def start_run(self) -> None:
        """Begin a run."""
        self._taken, self._waiting = 0, []

    def take(
        self, read: Callable[[], Batch], batch_idx: int, batches: float,
        logits: Callable[[list[int]], Tensor | None] = lambda _: None,
    ) -> int:  # fmt: skip
        """Take a batch's share of the samples: those of the first run, even if the loader shuffles.

        Returns how many of them are left out, as they cannot be explained.

        Args:
            read: Reads the batch; called at most once.
            batch_idx: Which batch this is.
            batches: How many there are; may be infinite.
            logits: Gives validation's logits of the images in some places of the batch.
        """
        is_new = batch_idx not in self._kept
        if is_new:
            if self._choice is not None and not self._choice.of_batch(batch_idx):
                return 0
            kept = self._chosen_of(read(), batch_idx, batches)
            if not kept.chosen:
                return 0
            self._kept[batch_idx] = kept
        kept = self._kept[batch_idx]
        self._taken += len(set(kept.numbers)) + kept.left_out
        # Where the loader shuffles, the images of later batches are others.
        is_same = kept.places and (is_new or self._choice is not None)
        if kept.numbers:
            self._waiting.append(replace(kept, validated=logits(kept.places) if is_same else None))
        return kept.left_out

    def _chosen_of(self, batch: Batch, batch_idx: int, batches: float) -> Kept:
        """Choose images of a batch, and return those that can be explained."""
        items = list(range(len(batch))) if batch.items is None else batch.items
        count = len(batch) if batch.count is None else batch.count
        chosen = self._chosen(count, batch_idx, batches)
        samples = batch.take([row for row, item in enumerate(items) if item in chosen]).to("cpu")
        places = [item for item in items if item in chosen]
        finite = samples.images.isfinite().flatten(1).all(1).nonzero()[:, 0].tolist()
        samples, places = samples.take(finite), [places[row] for row in finite]
        if places:
            check_inputs("SESSCallback", samples.images.float(), samples.labels)
            check_boxes(samples)
        samples = replace(samples, items=None, count=None, activation=None)  # Of the batch, not of these.
        numbers = [chosen[place] for place in places]
        return Kept(samples, numbers, places, chosen=sum(place < count for place in chosen))

    def waiting(self) -> list[Kept]:
        """Return what was taken since the last call, in parts that can be explained at once.

        Samples of one kind go together, but those whose call takes more than images.
        """
        waiting, self._waiting = self._waiting, []
        kinds: dict[Any, list[Kept]] = {}
        for kept in waiting:
            kinds.setdefault(kept.samples.kind, []).append(kept)
        return [part for alike in kinds.values() for part in _joined(alike).parts()]

    def _chosen(self, size: int, batch_idx: int, batches: float) -> dict[int, int]:
        """Return places in a batch, and the numbers of the samples there."""
        if self._choice is not None:
            of_batch, numbers = self._choice.of_batch(batch_idx), self._choice.numbers
        else:
            of_batch, numbers = self._share(size, batch_idx, batches), numbering(self.total)
        return {place: numbers[k] for place, k in of_batch.items()}

    def _share(self, size: int, batch_idx: int, batches: float) -> dict[int, int]:
        """Return places in a batch, and which samples of this process they are, when no order is known."""
        share = self.total
        if batches != float("inf"):
            share = share * (batch_idx + 1) // int(batches)
        count = max(0, min(share - self._taken, size))
        return {place: self._taken + k for k, place in enumerate(spread_in_batch(count, size, batch_idx))}

    def state_dict(self) -> dict[str, Any]:
        """Return the samples themselves where nothing else would find them again, else nothing."""
        if self.budget is None or self._choice is not None:
            return {}
        kept = {i: (vars(kept.samples), kept.numbers) for i, kept in self._kept.items()}
        chosen = {i: kept.chosen for i, kept in self._kept.items()}
        return {"samples": self.budget.samples, "kept": kept, "chosen": chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> str:
        """Note what a checkpoint holds, for ``settle``."""
        self._loaded = state
        return ""


def _joined(waiting: Sequence[Kept]) -> Kept:
    validated = [kept.validated for kept in waiting if kept.validated is not None]
    return Kept(
        Batch.joined([kept.samples for kept in waiting]),
        [number for kept in waiting for number in kept.numbers],
        validated=torch.cat(validated) if len(validated) == len(waiting) else None,
    )


def _restored(state: Mapping[str, Any], budget: Budget, batch: Batch) -> dict[int, Kept]:
    """Return a checkpoint's samples, if they are those that this run would take."""
    chosen = state.get("chosen", {})
    held = {
        i: Kept(Batch(**fields), numbers, chosen=chosen.get(i))
        for i, (fields, numbers) in state.get("kept", {}).items()
    }
    shapes = {kept.samples.images.shape[1:] for kept in held.values()}
    return held if state.get("samples") == budget.samples and shapes == {batch.images.shape[1:]} else {}
