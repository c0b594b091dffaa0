"""Kept samples in checkpoints: rank 0 writes those of all ranks."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sess_lightning.callback.kept import Kept
from sess_lightning.callback.loaders import gathered
from sess_lightning.callback.versions import Reader
from sess_lightning.types import Batch


def stored(kept: Sequence[Kept]) -> dict[str, Any]:
    """Return samples as a checkpoint holds them, of types that weights-only loading accepts."""
    return {
        "kept": {i: (vars(one.samples), one.numbers) for i, one in enumerate(kept)},
        "chosen": {i: one.chosen for i, one in enumerate(kept)},
    }


def read(state: Any) -> tuple[list[Kept], set[str]]:
    """Return the samples in a checkpoint, and the names of its odd fields."""
    reader = Reader(state)
    chosen = reader.read("chosen", dict, {})
    kept = [
        Kept(Batch(**values), list(numbers), chosen=chosen.get(i)) for i, values, numbers in _known(reader)
    ]
    return kept, reader.odd


def _known(reader: Reader) -> Iterator[tuple[Any, dict[str, Any], list[int]]]:
    """Yield the samples in a checkpoint that this version can read: index, fields of the batch, numbers."""
    known = {field.name for field in fields(Batch)}
    for i, entry in reader.read("kept", dict, {}).items():
        try:
            values, numbers = dict(entry[0]), [int(number) for number in entry[1]]
            reader.odd |= values.keys() - known
            values = {name: value for name, value in values.items() if name in known}
            images, labels = values["images"], values["labels"]
            if not (isinstance(images, Tensor) and images.ndim == 4 and isinstance(labels, Tensor)):
                raise TypeError("no images, or no labels")
            if not len(images) == len(labels) == len(numbers):
                raise ValueError("rows of different numbers")
        except (TypeError, ValueError, KeyError, IndexError):
            reader.odd.add("kept")
            continue
        yield i, values, numbers


class Exchange:
    """Tells rank 0, which writes checkpoints, the samples that the other ranks have kept."""

    def __init__(self) -> None:
        self._others: dict[int, dict[str, Any]] = {}
        self._arrived: dict[int, Tensor] = {}
        self._message = torch.empty(0, dtype=torch.uint8)
        self._told: list[tuple[int, int]] = []
        self._new: list[tuple[int, int]] = []

    @property
    def others(self) -> dict[int, dict[str, Any]]:
        """Each other rank's samples, as a checkpoint holds them."""
        for rank, message in self._arrived.items():
            self._others[rank] = torch.load(io.BytesIO(message.numpy().tobytes()), weights_only=True)
        self._arrived.clear()
        return self._others

    @others.setter
    def others(self, entries: dict[int, dict[str, Any]]) -> None:
        self._others, self._arrived = dict(entries), {}

    def pack(self, kept: Sequence[Kept]) -> None:
        """Prepare the message of this rank: empty if it has sent the same before."""
        self._new = [(id(one), len(one.numbers)) for one in kept]
        self._message = torch.empty(0, dtype=torch.uint8)
        if self._new != self._told:
            file = io.BytesIO()
            torch.save(stored(kept), file)
            self._message = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def run(self, device: torch.device) -> None:
        """Exchange messages; all ranks must call this, after they have agreed that all have packed."""
        # Nothing is read here: a rank that failed at it would leave the others waiting in the next gathering.
        sizes = gathered(torch.tensor([len(self._message)], device=device))[:, 0].tolist()
        if len(sizes) == 1 or not max(sizes):
            return
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(self._message)] = self._message
        everyone = gathered(padded.to(device)).cpu()
        self._told = self._new
        self._arrived |= {rank: everyone[rank, :size] for rank, size in enumerate(sizes) if rank and size}
