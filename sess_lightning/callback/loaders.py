"""The loaders that validation or test reads, and what is known of their samples on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha1
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DistributedSampler

MOST_LOADERS = 8
"""The most loaders that ranks exchange information on."""
UNKNOWN = -1


class Holding(NamedTuple):
    """What a rank knows of one of its loaders.

    Attributes:
        length: Samples that pass in a run; below 0 if unknown.
        sketch: Identifies the data set, as far as possible without reading a sample.
        batches: Batches that pass in a run; below 0 if unknown.
    """

    length: int
    sketch: int
    batches: int

    @staticmethod
    def unknown() -> Holding:
        """Return what is known if nothing can be found out."""
        return Holding(UNKNOWN, 0, UNKNOWN)


def is_even(holdings: Sequence[Holding]) -> bool:
    """Return whether the same number of a loader's batches passes on every rank."""
    batches = {holding.batches for holding in holdings}
    return len(batches) == 1 and UNKNOWN not in batches


@dataclass(frozen=True)
class Source:
    """The loader whose samples are explained; None if it is unknown which one the adapter chooses.

    Attributes:
        loader: A DataLoader or anything else.
        batches: Number of its batches that pass on this rank; may be infinite.
        holdings: What each rank holds.
    """

    loader: Any
    batches: float
    holdings: Sequence[Holding]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loader": None}  # A copy neither has nor needs the data.

    @property
    def lengths(self) -> list[int] | None:
        """Number of samples that pass on each rank; None if one of them does not know."""
        lengths = [holding.length for holding in self.holdings]
        return None if min(lengths) < 0 else lengths

    @property
    def is_sharded(self) -> bool:
        """Whether ranks have different data sets, rather than a sampler."""
        sampler = getattr(getattr(self.loader, "batch_sampler", None), "sampler", None)
        by_hand = not isinstance(sampler, DistributedSampler)
        return by_hand and len({holding.sketch for holding in self.holdings}) > 1


@dataclass(frozen=True)
class Loaders:
    """All loaders of a run, as Lightning combines them.

    Attributes:
        all: The loaders, flattened.
        counts: Number of batches of each that pass on this rank.
        mode: How they are combined: one after the other (``"sequential"``), or in parallel.
        structure: The loaders as the user passed them.
    """

    all: Sequence[Any]
    counts: Sequence[float]
    mode: str
    structure: Any

    def passing(self, watched: int) -> float:
        """Return the number of batches in a run; may be infinite."""
        if self.mode == "sequential":
            return self.counts[watched]
        return min(self.counts) if self.mode == "min_size" else max(self.counts)

    def missing(self, watched: int) -> str:
        """Return what to say of a loader that does not exist; an empty text if it does."""
        if self.mode != "sequential":
            return (
                f"dataloader_idx={watched}: loaders that are read side by side count as one, with the index "
                "0; choose what is explained by batch_adapter=lambda batch: batch[...]."
            ) * (watched > 0)
        last = len(self.all) - 1
        return f"dataloader_idx={watched}: the last loader has the index {last}." * (watched > last)

    def provider(self, watched: int, batch: Any, tensors: Sequence[Any]) -> int | None:
        """Return the index of the loader that the tensors read from a batch come from; None if unknown."""
        if self.mode == "sequential":
            return watched
        memories = {_memory(tensor) for tensor in tensors if isinstance(tensor, Tensor)}
        gave = [
            i for i, part in enumerate(_parts(self.structure, batch))
            if memories & {_memory(leaf) for leaf in tree_leaves(part) if isinstance(leaf, Tensor)}
        ]  # fmt: skip
        return gave[0] if len(gave) == 1 else None

    def holding(self, i: int, is_alone: bool = False) -> Holding:
        """Return what this rank knows of loader ``i``; a rank that is alone looks at no data set."""
        loader = self.all[i]
        batches = min(self.counts[i], self.passing(i))
        known = UNKNOWN if batches == float("inf") else int(batches)
        return Holding(_length(loader, batches), 0 if is_alone else _sketch(loader), known)


def loaders_of(trainer: Trainer) -> Loaders:
    """Return the loaders of the current validation or test."""
    kind = trainer.state.fn
    loop: Any = trainer.test_loop if kind == "test" else trainer.validate_loop
    if kind == "fit":
        loop = trainer.fit_loop.epoch_loop.val_loop
    counts: Any = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    combined = getattr(loop, "_combined_loader", None)
    if combined is None:
        given = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        return Loaders(tree_leaves(given), _floats(counts), "sequential", given)
    mode = getattr(combined, "_mode", "sequential")
    return Loaders(list(combined.flattened), _floats(counts), mode, combined.iterables)


def survey(trainer: Trainer, loaders: Loaders | None) -> list[list[Holding]]:
    """Return what each rank knows of each loader; all ranks must call this.

    Raises:
        Nothing: if a rank cannot find something out, it is unknown; otherwise the others would wait for it.
    """
    found = [Holding.unknown() for _ in range(MOST_LOADERS)]
    for i in range(min(len(loaders.all), MOST_LOADERS) if loaders is not None else 0):
        with suppress(Exception):
            found[i] = loaders.holding(i, trainer.world_size == 1)  # type: ignore[union-attr]
    everyone = gathered(torch.tensor(found, device=trainer.strategy.root_device))
    return [[Holding(*numbers) for numbers in of_loader] for of_loader in everyone.transpose(0, 1).tolist()]


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor of every rank, stacked; all ranks must call this, with the same shape."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor[None]
    everyone = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, tensor)
    return torch.stack(everyone)


def _floats(counts: Any) -> list[float]:
    return [float(count) for count in (counts if isinstance(counts, list) else [counts])]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _parts(structure: Any, batch: Any) -> Iterator[Any]:
    """Split a batch of parallel loaders into what each of them returned."""
    if isinstance(structure, Mapping):
        for key, inner in structure.items():
            yield from _parts(inner, batch[key])
    elif isinstance(structure, (list, tuple)):
        for inner, part in zip(structure, batch, strict=True):
            yield from _parts(inner, part)
    else:
        yield batch


def _length(loader: Any, batches: float) -> int:
    batch_sampler = getattr(loader, "batch_sampler", None)
    if type(batch_sampler) is not BatchSampler or batches == float("inf"):
        return UNKNOWN
    sampler: Any = batch_sampler.sampler
    return int(min(len(sampler), batches * batch_sampler.batch_size))


def _sketch(loader: Any) -> int:
    """Return a number that identifies the data that a loader reads."""
    words = "|".join(_words(getattr(loader, "dataset", None), 0))
    return int.from_bytes(sha1(words.encode(), usedforsecurity=False).digest()[:7], "big")


def _words(data: Any, depth: int) -> Iterator[str]:
    """Describe a data set without reading a sample: its type, its length, and the ends of its lists."""
    yield type(data).__qualname__
    if depth > 3 or data is None:
        return
    if hasattr(data, "__len__"):
        yield str(len(data))
    for name, value in sorted(getattr(data, "__dict__", {}).items()):
        if isinstance(value, (list, tuple, range, Tensor)) or hasattr(value, "__array__"):
            yield from (name, str(len(value)) if getattr(value, "shape", True) else "", *_ends(value))
        elif name in ("dataset", "data", "base", "_fingerprint"):
            yield from (str(value),) if isinstance(value, str) else _words(value, depth + 1)


def _ends(values: Any) -> Iterator[str]:
    values = getattr(values, "iloc", values)  # The rows of a table.
    if getattr(values, "shape", True) == () or not len(values):
        return
    for value in (values[0], values[len(values) - 1]):
        if isinstance(value, Tensor):
            yield str(value.flatten()[:64].tolist())
        elif isinstance(value, (str, int, float, tuple, list)) or hasattr(value, "__array__"):
            yield str(value)[:1000]
        else:
            yield type(value).__qualname__
