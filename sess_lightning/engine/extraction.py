"""Windows passing through a model: their scores, and their maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.batching import batch_limit, in_batches, joined, stacked
from sess_lightning.engine.fusion import crop, crop_strips
from sess_lightning.engine.windows import Plan, WindowStream, windows
from sess_lightning.introspection.logits import classify, log_scores
from sess_lightning.types import Activation, Extraction, SaliencyMethod

Part = TypeVar("Part")


class Scored(NamedTuple):
    """The windows that were scored.

    Attributes:
        which: For each target, their indices in the plan, rising.
        logs: Their log-scores.
        maps: None: scoring gave no maps.
    """

    which: Int[Tensor, "T S"]
    logs: Float[Tensor, "T S"]
    maps: None = None


class Extracted(NamedTuple):
    """The windows that were scored and explained.

    Attributes:
        which: For each target, their indices in the plan, rising.
        logs: Their log-scores.
        maps: Their maps, on the method's own grid.
    """

    which: Int[Tensor, "T S"]
    logs: Float[Tensor, "T S"]
    maps: Float[Tensor, "T S h w"]


@dataclass(frozen=True)
class WindowExtractor:
    """Cuts the windows of a plan out of images and packs them into full batches.

    Attributes:
        images: One for each target, or a single one for all targets.
        targets: The classes to explain.
        plan: The places of the windows.
        antialias: Antialias when a scale is smaller than the image.
        stretch: Give maps in [0, 1]; False gives each in its own strength.
        batch_size: Windows that go through the model at once; None takes what memory allows.
    """

    images: Float[Tensor, "B C H W"]
    targets: Int[Tensor, " T"]
    plan: Plan
    antialias: bool = True
    stretch: bool = True
    batch_size: int | None = None

    def first(self, scales: int) -> WindowExtractor:
        """Return an extractor for the windows of the first ``scales`` only."""
        return replace(self, plan=self.plan.first(scales))

    @property
    def numbers(self) -> Int[Tensor, "T P"]:
        """The indices of all windows, for each target."""
        return _counted(len(self.plan), self.images.device).expand(len(self.targets), -1)

    def score(self, model: nn.Module, activation: Activation) -> Scored:
        """Score all windows, by forward passes that give no maps."""
        stream, limit = self._stream()
        parts = in_batches(lambda _, which: classify(model, stream.take(which)), range(len(stream)), limit)
        logits = stream.gathered(joined(parts)).expand(len(self.targets), -1, -1)
        of_window = self.targets[:, None].expand(-1, len(self.plan))
        logs = log_scores(logits.flatten(0, 1), of_window.flatten(), activation)
        return Scored(self.numbers, logs.view(-1, len(self.plan)))

    def extract(self, model: nn.Module, method: SaliencyMethod) -> Extracted:
        """Score and explain all windows; those of a single image pass once for all targets."""
        stream, limit = self._stream()
        if len(self.images) == len(self.targets):
            of_window = stream.spread(self.targets)
            parts = in_batches(
                lambda _, which: method.extract_part(model, stream.take(which), of_window[which]),
                range(len(stream)),
                limit,
            )
            joined = method.join_parts([*parts], of_window, self.plan.window_size)
            maps, logs = (stream.gathered(values) for values in (self.maps_of(joined), joined.log_scores))
            return Extracted(self.numbers, logs, maps)
        shared = [
            *in_batches(
                lambda _, which: method.extract_classes(model, stream.take(which), self.targets),
                range(len(stream)),
                limit,
            )
        ]
        maps = torch.cat([torch.stack([self.maps_of(one) for one in part]) for part in shared], 1)
        logs = torch.cat([torch.stack([one.log_scores for one in part]) for part in shared], 1)
        return Extracted(self.numbers, logs, maps)

    def extract_some(
        self, model: nn.Module, method: SaliencyMethod, which: Int[Tensor, "T K"]
    ) -> Iterator[Extraction]:
        """Yield a method's extractions of some windows of each target, target by target, in full batches."""
        return self._some(lambda images, targets: method.extract(model, images, targets), which)

    def map_some(
        self, model: nn.Module, method: SaliencyMethod, which: Int[Tensor, "T K"]
    ) -> Iterator[Float[Tensor, "B h w"]]:
        """Yield the maps of ``extract_some``, without scores that would cost forward passes of their own."""
        if method.scores_apart:
            return self._some(lambda images, targets: method(model, images, targets), which)
        return (self.maps_of(part) for part in self.extract_some(model, method, which))

    def _some(self, explain: Callable[[Tensor, Tensor], Part], which: Int[Tensor, "T K"]) -> Iterator[Part]:
        of_window = self.targets.repeat_interleave(which.shape[1])
        limit = self._limit
        return in_batches(
            lambda part, place: explain(stacked(part), of_window[place]), self._cut(which, limit), limit
        )

    def maps_of(self, extraction: Extraction) -> Float[Tensor, "B h w"]:
        """Return the maps, stretched or in their own strength."""
        return extraction.maps if self.stretch else extraction.unscaled

    @property
    def _limit(self) -> int:
        return batch_limit(self.batch_size, self.images, self.plan.window_size)

    def _stream(self) -> tuple[WindowStream, int]:
        limit = self._limit
        return WindowStream(self.images, self.plan, self.antialias, limit), limit

    def _cut(self, which: Int[Tensor, "T K"], limit: int) -> Iterator[Float[Tensor, "C h w"]]:
        images = self.images.expand(len(self.targets), -1, -1, -1)
        if which.shape[1] == len(self.plan):
            return windows(images, self.plan, self.antialias)
        rows, columns = crop_strips(self.plan, self.antialias, images.device)
        return chain.from_iterable(
            crop(image, rows, columns, part)
            for image, of_image in zip(images, which, strict=True)
            for part in of_image.split(limit)
        )


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _counted(windows: int, device: torch.device) -> Int[Tensor, " P"]:
    return torch.arange(windows, device=device)
