"""What families of methods share: drawing what they extract, and wrapping a base method."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.batching import batch_limit, in_batches, stacked
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs, score
from sess_lightning.ops import size_of, upsample
from sess_lightning.types import Activation, Explanation, Extraction, SaliencyMethod

Part = TypeVar("Part")


class MapMethod(SaliencyMethod):
    """A method that finds maps without scores; these cost one more forward pass, if they are asked for."""

    scores_apart: ClassVar[bool] = True

    @abstractmethod
    def maps(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return maps in [0, 1]; the model and the tensors are borrowed already."""

    def __call__(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the maps alone: no forward pass for scores that nobody reads."""
        check_inputs(type(self).__name__, images, targets)
        with explaining(model):
            return self.maps(model, borrowed(images), borrowed(targets))

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images``; the scores come from a plain forward pass.

        Raises:
            ValueError: If a shape is wrong.
            RuntimeError: If a gradient is needed and none flows from the logits back to the pixels.
        """
        check_inputs(type(self).__name__, images, targets)
        with explaining(model):
            images, targets = borrowed(images), borrowed(targets)
            maps = self.maps(model, images, targets)
            return Explanation(maps, score(model, images, targets, self.activation).exp())


class ExtractingMethod(SaliencyMethod):
    """A method that explains by drawing what it extracts."""

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images``.

        Args:
            model: Any classifier.
            images: As the model takes them.
            targets: Class index of each image.

        Raises:
            ValueError: If a shape is wrong, the target layer is unknown, or its features lie on no grid.
            RuntimeError: If no gradient flows back to the target layer, or to the pixels.
        """
        check_inputs(type(self).__name__, images, targets)
        with explaining(model, self.only_passes):
            maps, logs, _ = self._extracted(model, images, borrowed(targets))
        return Explanation(self.draw(maps, size_of(images)), logs.exp())

    def _extracted(self, model: nn.Module, images: Tensor, targets: Tensor) -> Extraction:
        if is_small(images):
            return self.extract(model, borrowed(images), targets)
        parts = in_parts(lambda rows, which: self.extract_part(model, rows, targets[which]), images)
        return self.join_parts(parts, targets, size_of(images))

    @abstractmethod
    def extract(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Extraction:
        """Return maps on a grid of the method's own, and log-scores."""

    def draw(self, maps: Float[Tensor, "B h w"], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
        """Return extracted maps at full resolution, (height, width)."""
        return upsample(maps, size).clamp(0, 1)


def is_small(images: Tensor) -> bool:
    """Return whether images pass through a model best all at once, as they lie in memory."""
    return not images.is_cpu or len(images) <= batch_limit(None, images)


def in_parts(
    explain: Callable[[Float[Tensor, "b C H W"], slice], Part], images: Float[Tensor, "B C H W"]
) -> list[Part]:
    """Explain images in parts, channels last: on a CPU that takes less time and memory."""
    limit = batch_limit(None, images)
    return [*in_batches(lambda rows, which: explain(stacked(rows), which), images.detach(), limit)]


class WrappingMethod(SaliencyMethod):
    """A method around another one, its ``base``."""

    base: SaliencyMethod

    def check_base(self, example: str = "GradCAM()") -> None:
        """Refuse a base that is not a saliency method.

        Raises:
            TypeError: Naming what arrived.
        """
        if not isinstance(self.base, SaliencyMethod):
            raise TypeError(
                f"{type(self).__name__}: base must be a saliency method such as {example}, got {self.base!r}."
            )

    @property
    def only_passes(self) -> bool:
        """As for the base."""
        return self.is_own and self.base.only_passes

    @property
    def activation(self) -> Activation:  # type: ignore[override]
        """The base method's."""
        return self.base.activation
