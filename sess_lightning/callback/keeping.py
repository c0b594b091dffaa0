"""SampleKeeper: the same samples in every run, whatever batches pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sess_lightning.callback.batches import check_boxes
from sess_lightning.callback.kept import Kept, joined
from sess_lightning.callback.sampling import Choice, Share, spread_in_batch
from sess_lightning.callback.stored import Exchange, read, stored
from sess_lightning.callback.versions import Reader
from sess_lightning.introspection.logits import check_inputs
from sess_lightning.ops import size_of
from sess_lightning.types import Batch


class SampleKeeper:
    """Takes samples from passing batches, and returns the same ones in every later run.

    If the order of samples is known, they are those at the same places of the data set, in their current
    state. Otherwise they are kept as they first passed, also for another fit, validate or test of the same
    training, or for a training that is resumed from a checkpoint.
    """

    def __init__(self) -> None:
        self._part: Choice | Share | None = None
        self._kept: list[Kept] = []
        self._loaded: dict[int, list[Kept]] = {}
        self._exchange = Exchange()
        self._carried: list[Kept] = []
        self._restores = False
        self.start_run()

    @property
    def total(self) -> int:
        """Number of samples that this rank explains in a run."""
        return 0 if self._part is None else self._part.count

    @property
    def ids(self) -> list[str]:
        """The ids of the last run's samples, if batches have ids."""
        return [name for kept in self._kept for name in kept.samples.ids or ()]

    def forget(self, is_same: bool = False) -> None:
        """Start again, perhaps with another loader.

        Args:
            is_same: Whether the training is the same, and so are its samples.
        """
        if not is_same:
            self._carried, self._loaded, self._exchange = [], {}, Exchange()
        elif self._restores and isinstance(self._part, Share) and self._kept:
            self._carried, self._loaded = self._kept, {}
        self._part, self._kept = None, []
        self.start_run()

    def settle(self, part: Choice | Share, size: tuple[int, int], rank: int, restores: bool) -> str:
        """Decide which samples are taken.

        Args:
            part: This rank's part of all samples.
            size: (height, width) of the images.
            rank: Which process this is.
            restores: Whether to find the samples of other stages of this training again.

        Returns:
            The text of a warning; empty if there is none.
        """
        self._restores = restores
        earlier, self._kept, self._part = self._kept, [], part
        if isinstance(part, Choice):
            return ""
        if not earlier and restores:
            earlier = self._restored(part, rank) or self._carried
        fitting = [kept for kept in earlier if size_of(kept.samples.images) == size]
        various = len({size_of(kept.samples.images) for kept in earlier}) > 1
        self._kept = _numbered(earlier if various else fitting, part)
        if fitting or not earlier or various:
            return ""
        height, width = size_of(earlier[0].samples.images)
        return (
            f"the samples kept so far are {height}x{width} px, those of this validation "
            f"{size[0]}x{size[1]} px: from now on others are explained, and compared with each other."
        )

    def _restored(self, part: Share, rank: int) -> list[Kept]:
        """Return the samples in a checkpoint that are this rank's."""
        everyone = [kept for whose in sorted(self._loaded) for kept in self._loaded[whose]]
        if part.total == part.count:  # Each rank numbers its own samples, or there is only this one.
            return everyone if rank == 0 else self._loaded.get(rank, [])
        mine = set(part.numbers)  # Perhaps of another number of ranks.
        return [image for kept in everyone for image in kept.images() if image.numbers[0] in mine]

    def start_run(self) -> None:
        """Begin a run."""
        self._taken, self._is_open = 0, False
        self._waiting: list[Kept] = []
        self._reserve: list[Kept] = []
        self._known: set[int] = set()

    def take(
        self, read: Callable[[], Batch], batch_idx: int, batches: float,
        logits: Callable[[list[int]], Tensor | None] = lambda _: None,
    ) -> int:  # fmt: skip
        """Take a batch's share of the samples.

        Returns how many are left out because they cannot be explained.

        Args:
            read: Reads the batch; called at most once.
            batch_idx: Index of the batch.
            batches: Number of batches; may be infinite.
            logits: Returns validation's logits of the images at some places of the batch.
        """
        left_out = self._open()
        part = self._part
        if isinstance(part, Choice) and (places := part.of_batch(batch_idx)):
            kept = _chosen(read(), {place: part.numbers[k] for place, k in places.items()})
            return left_out + self._keep(replace(kept, validated=logits(kept.places)))
        if not isinstance(part, Share) or self._taken >= part.count or part.is_past(batch_idx):
            return left_out
        return left_out + self._take_share(part, read(), batch_idx, batches, logits)

    def _open(self) -> int:
        """Put the samples of earlier runs first, and return how many of them are left out."""
        if self._is_open:
            return 0
        self._is_open = True
        if isinstance(self._part, Choice):
            self._kept = []
        self._waiting += [kept for kept in self._kept if kept.numbers]
        self._taken = sum(kept.size for kept in self._kept)
        if self._taken < self.total:  # A shuffling loader brings samples again that are kept already.
            self._known = {one for kept in self._kept for one in kept.digests}
        return sum(kept.left_out for kept in self._kept)

    def _take_share(
        self, part: Share, batch: Batch, batch_idx: int, batches: float,
        logits: Callable[[list[int]], Tensor | None],
    ) -> int:  # fmt: skip
        """Take the samples that are due, and set some aside in case later batches have too few."""
        size = batch.loaded
        count = max(0, min(part.due(batch_idx, batches) - self._taken, size))
        places = spread_in_batch(count, size, batch_idx)
        left_out = 0
        if count:
            kept = self._unknown(_chosen(batch, dict(zip(places, self._free(), strict=False))))
            left_out = self._keep(replace(kept, validated=logits(kept.places)))
        others = [place for place in range(size) if place not in places]
        spare = min(part.count - self._taken - sum(kept.size for kept in self._reserve), len(others))
        if spare > 0:
            which = [others[i * len(others) // spare] for i in range(spare)]
            kept = self._unknown(_chosen(batch, {place: -1 - place for place in which}))
            kept = replace(kept, validated=logits(kept.places))
            self._reserve += kept.images()
        return left_out

    def _free(self) -> list[int]:
        """Return the numbers that are still free."""
        taken = {number for kept in self._kept for number in kept.numbers}
        return [number for number in self._part.numbers if number not in taken] if self._part else []

    def _unknown(self, kept: Kept) -> Kept:
        """Return the samples that earlier runs have not kept."""
        if not self._known:
            return kept
        rows = [row for row, one in enumerate(kept.digests) if one not in self._known]
        return replace(kept.take(rows), places=[kept.places[row] for row in rows])

    def _keep(self, kept: Kept) -> int:
        """Keep samples for later runs, and queue them to be explained in this one."""
        if not kept.size:
            return 0
        self._kept.append(replace(kept, places=[], validated=None, chosen=kept.size))
        self._taken += kept.size
        if kept.numbers:
            self._waiting.append(kept)
        return kept.left_out

    def waiting(self) -> list[Kept]:
        """Return the samples taken since the last call, in parts that can be explained at once.

        Samples of one kind are together, except those whose call takes more than images. Samples that batches
        were short of are replaced by those set aside: call it while the last batch's weights are in place.
        """
        reserve, self._reserve = self._reserve, []
        missing = self.total - self._taken
        for kept, number in zip(reserve[: max(missing, 0)], self._free(), strict=False):
            self._keep(replace(kept, numbers=[number] * len(kept.numbers)))
        waiting, self._waiting = self._waiting, []
        kinds: dict[Any, list[Kept]] = {}
        for kept in waiting:
            kinds.setdefault(kept.samples.kind, []).append(kept)
        return [part for alike in kinds.values() for part in joined(alike).parts()]

    def state_dict(self) -> dict[str, Any]:
        """Return the samples themselves if there is no other way to find them again, else nothing."""
        if isinstance(self._part, Choice):
            return {}
        kept = self._kept if self._part is not None and self._restores else self._carried
        kept = kept or self._loaded.get(0, [])  # What a checkpoint has restored is not decided yet.
        others = self._exchange.others
        return {**stored(kept), **({"others": dict(others)} if others else {})} if kept else {}

    def load_state_dict(self, state: Any) -> set[str]:
        """Keep a checkpoint's samples for ``settle``, and return the names of its odd fields."""
        samples, odd = read(state)
        others = Reader(state).read("others", dict, {})
        self._loaded, self._exchange.others = {0: samples}, dict(others)
        for rank, entry in others.items():
            self._loaded[int(rank)], more = read(entry)
            odd |= more
        return odd

    def pack(self) -> None:
        """Prepare to tell rank 0 which samples this rank has kept, for checkpoints."""
        self._exchange.pack(self._kept if isinstance(self._part, Share) and self._restores else [])

    def exchange(self, device: torch.device) -> None:
        """Tell it; all ranks must call this, after they have agreed that all have packed."""
        self._exchange.run(device)


def _chosen(batch: Batch, numbers: Mapping[int, int]) -> Kept:
    """Return those images at some places of a batch that can be explained.

    Args:
        batch: The batch.
        numbers: Place -> sample number.
    """
    items = list(range(len(batch))) if batch.items is None else batch.items
    samples = batch.take([row for row, item in enumerate(items) if item in numbers]).to("cpu")
    places = [item for item in items if item in numbers]
    finite = samples.images.isfinite().flatten(1).all(1).nonzero()[:, 0].tolist()
    samples, places = samples.take(finite), [places[row] for row in finite]
    if places:
        check_inputs("SESSCallback", samples.images.float(), samples.labels)
        check_boxes(samples)
    samples = replace(samples, items=None, count=None, activation=None)  # The batch's, not the samples'.
    chosen = sum(place < batch.loaded for place in numbers)
    return Kept(samples, [numbers[place] for place in places], places, chosen=chosen)


def _numbered(kept: Sequence[Kept], share: Share) -> list[Kept]:
    """Return samples with numbers of this run: their own where possible, as many as there are.

    Samples that cannot be explained have no number, but take a place.
    """
    mine, room = set(share.numbers), share.count
    taken = {number for one in kept for number in one.numbers}
    spare = iter([number for number in share.numbers if number not in taken])
    numbered = []
    for one in kept:
        lost = min(one.left_out, room)
        images: list[Kept] = []
        for image in one.images():
            number = image.numbers[0] if image.numbers[0] in mine else next(spare, None)
            if number is not None and len(images) < room - lost:  # Perhaps fewer are asked for by now.
                images.append(replace(image, numbers=[number] * len(image.numbers)))
        room -= lost + len(images)
        numbered.append(replace(joined(images) if images else one.take([]), chosen=len(images) + lost))
    return numbered
