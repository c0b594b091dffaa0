"""Kept: samples as they passed, on the host, with their numbers among all samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from sess_lightning.callback.classes import known_labels
from sess_lightning.types import Batch


@dataclass(frozen=True)
class Kept:
    """Samples as they passed, on the host, with their numbers among all samples.

    Attributes:
        samples: A row for each class to explain.
        numbers: Each row's sample number.
        places: Their places in the batch; empty if no longer known.
        validated: Validation's logits of them in this run, if known.
        chosen: How many images were chosen, including those that cannot be explained; None if all can.
    """

    samples: Batch
    numbers: list[int]
    places: list[int] = field(default_factory=list)
    validated: Tensor | None = None
    chosen: int | None = None

    @property
    def left_out(self) -> int:
        """How many samples cannot be explained: without a known class, or with a pixel that is not finite."""
        return 0 if self.chosen is None else self.chosen - len(set(self.numbers))

    @property
    def size(self) -> int:
        """How many images were chosen."""
        return len(set(self.numbers)) + self.left_out

    @property
    def digests(self) -> list[int]:
        """Digest of each row's image."""
        return [digest(image) for image in self.samples.images]

    def parts(self) -> list[Kept]:
        """Return the parts that can be explained at once.

        Images with several classes, which share forward passes, are alone, and so are those whose call takes
        other inputs.
        """
        alone = [rows for rows in self._images() if len(rows) > 1 or self.samples.context]
        together = [rows[0] for rows in self._images() if rows not in alone]
        return [self.take(rows) for rows in (together, *alone) if rows]

    def images(self) -> list[Kept]:
        """Return each image by itself."""
        return [self.take(rows) for rows in self._images()]

    def _images(self) -> list[list[int]]:
        rows: dict[int, list[int]] = {}
        for row, number in enumerate(self.numbers):
            rows.setdefault(number, []).append(row)
        return [*rows.values()]

    def known(self, classes: int) -> Kept:
        """Return the samples whose label is one of a model's classes; other labels stand for none.

        Raises:
            ValueError: If other labels do not look like unknown ones.
        """
        known = known_labels(self.samples.labels.tolist(), classes)
        return self if all(known) else self.take([row for row, is_known in enumerate(known) if is_known])

    def take(self, which: Sequence[int]) -> Kept:
        """Return rows ``which``."""
        validated = None if self.validated is None else self.validated[list(which)]
        return Kept(self.samples.take(which), [self.numbers[i] for i in which], validated=validated)


def digest(image: Tensor) -> int:
    """Return an image's digest: 56 bits of a hash of its pixels."""
    pixels = image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(blake2b(pixels, digest_size=7).digest(), "big")


def joined(waiting: Sequence[Kept]) -> Kept:
    """Return samples of one kind as one."""
    validated = [kept.validated for kept in waiting if kept.validated is not None]
    return Kept(
        Batch.joined([kept.samples for kept in waiting]),
        [number for kept in waiting for number in kept.numbers],
        validated=torch.cat(validated) if len(validated) == len(waiting) else None,
    )
