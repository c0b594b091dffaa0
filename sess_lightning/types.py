"""The types that all modules share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

Activation: TypeAlias = Literal["softmax", "sigmoid"]
"""How logits become probabilities; a head with a single logit always uses a sigmoid."""


class SESSWarning(UserWarning):
    """Something was not as expected; the run goes on."""


class Explanation(NamedTuple):
    """A method's result for a batch.

    Attributes:
        maps: Saliency, min-max normalised to [0, 1] per map; a flat map is all zeros, never NaN.
        scores: The model's probability of each target, float32.
    """

    maps: Float[Tensor, "B H W"]
    scores: Float[Tensor, " B"]


class Extraction(NamedTuple):
    """Maps as they come out of the scoring forward pass, before they are upsampled.

    Attributes:
        maps: Saliency on the layer's own grid, scaled so that its bilinear upsampling lies in [0, 1].
        log_scores: Natural logarithm of the model's probability of each target, float32.
        ends: The lowest and highest value of each map before it was scaled; None if a method's strength
            cannot be compared between images.
    """

    maps: Float[Tensor, "B h w"]
    log_scores: Float[Tensor, " B"]
    ends: Float[Tensor, "B 2"] | None = None

    @property
    def unscaled(self) -> Float[Tensor, "B h w"]:
        """The maps in their own strength; a flat map keeps its value."""
        if self.ends is None:
            raise ValueError("these maps are scaled to [0, 1] and their own strength is not known.")
        low, high = self.ends[:, 0, None, None], self.ends[:, 1, None, None]
        return torch.where(high > low, self.maps * (high - low) + low, low)


class SaliencyMethod(ABC):
    """Explains a batch of images; holds hyper-parameters only, the model is always an argument.

    Attributes:
        single_forward: Whether the maps come out of the forward pass that gives the scores: ``explain`` is
            then ``extract``, upsampled.
        forwards: Forward passes of one image that one map of it costs.
        scores_apart: Whether scores cost one more forward pass, which maps alone do not need.
        has_strength: Whether ``extract`` returns the strength of a map, which can be compared between images.
        activation: How the model's logits become probabilities.
    """

    single_forward: ClassVar[bool] = False
    forwards: ClassVar[int] = 1
    scores_apart: ClassVar[bool] = False
    has_strength: ClassVar[bool] = False
    activation: Activation = "softmax"

    @property
    def only_passes(self) -> bool:
        """Whether nothing is done to the model but to pass images through it, as far as is known."""
        return False

    @property
    def is_own(self) -> bool:
        """Whether its class is one of this package, not a subclass that somebody else wrote."""
        return type(self).__module__.startswith("sess_lightning.")

    @property
    def shares_classes(self) -> bool:
        """Whether maps of several classes of one image cost the forward passes of a single one."""
        return False

    @abstractmethod
    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images``; the model is given back as it was."""

    def __call__(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the maps alone."""
        return self.explain(model, images, targets).maps

    def extract(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Extraction:
        """Return maps that may stay on a coarser grid, and log-scores: what SESS needs of each batch.

        Unlike ``explain``, this need not copy ``images``: it may write to them, and they are not inference
        tensors.
        """
        maps, scores = self.explain(model, images, targets)
        return Extraction(maps, scores.log())

    def extract_part(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Any:
        """Return what ``join_parts`` makes an ``Extraction`` of: what can wait until all batches are there.

        On an accelerator, small steps cost as much for all images as for a batch of them.
        """
        return self.extract(model, images, targets)

    def join_parts(
        self,
        parts: Sequence[Any],
        targets: Int[Tensor, " N"],  # noqa: ARG002
        size: tuple[int, int],  # noqa: ARG002
    ) -> Extraction:
        """Return the extraction of several batches of images of one size, from their ``extract_part``."""
        maps, logs, ends = zip(*parts, strict=True)
        return Extraction(torch.cat(maps), torch.cat(logs), None if ends[0] is None else torch.cat(ends))

    def explain_classes(
        self, model: nn.Module, image: Float[Tensor, "1 C H W"], targets: Int[Tensor, " T"]
    ) -> Explanation:
        """Explain several classes of one image; a method that can share forward passes between them does."""
        return self.explain(model, image.expand(len(targets), -1, -1, -1).contiguous(), targets)

    def maps_beside(
        self,
        model: nn.Module,
        images: Float[Tensor, "B C H W"],
        targets: Int[Tensor, " T"],
        others: Sequence[SaliencyMethod] = (),
    ) -> list[Float[Tensor, "T H W"]]:
        """Return the maps of this method and of ``others``, in this order; shared forward passes run once.

        There is one target per image, or several for a single image.
        """
        if len(images) == len(targets):
            maps = self(model, images, targets)
        elif self.scores_apart:
            maps = self(model, images.expand(len(targets), -1, -1, -1).contiguous(), targets)
        else:
            maps = self.explain_classes(model, images, targets).maps
        return [maps, *(other.maps_beside(model, images, targets)[0] for other in others)]

    def gives(self, other: SaliencyMethod, model: nn.Module, size: tuple[int, int]) -> bool:  # noqa: ARG002
        """Return whether ``maps_beside`` gets ``other`` for free on images of ``size``."""
        return False

    def extract_classes(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " T"]
    ) -> list[Extraction]:
        """Return ``extract`` of all images for each of ``targets``."""
        return [self.extract(model, images, target.repeat(len(images))) for target in targets]

    def check_counts(self, *names: str) -> None:
        """Refuse counts below 1; None stands for a default.

        Raises:
            ValueError: Naming the first of them.
        """
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}.")

    def __str__(self) -> str:
        """Return the call that makes this method, without defaults."""
        arguments = [
            str(value) if field.default is MISSING else f"{field.name}={value}"
            for field in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) != field.default
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def count_forwards(self, model: nn.Module, size: tuple[int, int]) -> int:  # noqa: ARG002
        """Return how many forward passes one map of an image of ``size`` (height, width) costs."""
        return self.forwards


@dataclass(frozen=True)
class Batch:
    """Labelled images, and where the labelled objects are.

    Attributes:
        images: As the model takes them.
        labels: Class index of each image.
        boxes: Per image, the boxes of the label's objects: (x0, y0, x1, y1), half-open pixels of ``images``.
        masks: Per image, the pixels of the label's objects, as large as ``images`` or as they were before.
        ids: Name of each image.
        difficult: Whether the object is small and among others, where the data set says so.
        size: (height, width) before resizing to ``images``, where it is known.
        context: Per image, the other inputs of the model's call.
        items: For each row, its image in the loader's batch; None where row i is image i. An image with
            several classes has a row for each, one without a class has none.
        count: Number of images in the loader's batch, where it is known.
        activation: How logits become probabilities, where the labels say so.
    """

    images: Real[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]
    boxes: list[Float[Tensor, "_ 4"]] | None = None
    masks: Bool[Tensor, "B h w"] | None = None
    ids: list[str] | None = None
    difficult: Bool[Tensor, " B"] | None = None
    size: tuple[int, int] | None = None
    context: list[list[Tensor]] | None = None
    items: list[int] | None = None
    count: int | None = None
    activation: Activation | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def loaded(self) -> int:
        """Number of images in the loader's batch; the number of rows where that is unknown."""
        return len(self) if self.count is None else self.count

    def take(self, which: Sequence[int]) -> Batch:
        """Return the samples ``which``."""

        def pick(value: object) -> object:
            if isinstance(value, Tensor):
                return value[list(which)]
            return [value[i] for i in which] if isinstance(value, list) else value

        return Batch(**{name: pick(value) for name, value in vars(self).items()})  # type: ignore[arg-type]

    @property
    def kind(self) -> tuple[object, ...]:
        """What two batches must have in common to be joined into one."""
        masks = None if self.masks is None else self.masks.shape[1:]
        given = tuple(name for name, value in vars(self).items() if value is not None)
        return self.images.shape[1:], self.images.dtype, masks, given, self.size

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """Return the samples of batches of one kind as one batch."""

        def join(values: Sequence[Any]) -> Any:
            if isinstance(values[0], Tensor):
                return torch.cat(tuple(values))
            return [item for value in values for item in value] if isinstance(values[0], list) else values[0]

        names = vars(batches[0])
        return Batch(**{name: join([getattr(batch, name) for batch in batches]) for name in names})

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        # A non-blocking copy to the host may be read before it has arrived.
        onwards = torch.device(device).type != "cpu"

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=onwards)
            if isinstance(value, list):
                return [move(item) for item in value]
            return value

        return Batch(**{name: move(value) for name, value in vars(self).items()})  # type: ignore[arg-type]
