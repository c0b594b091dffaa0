"""Class activation maps: one forward pass, and a backward pass through the layers after the target layer."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.batching import joined
from sess_lightning.introspection.heads import check_linear_head
from sess_lightning.introspection.layers import TargetLayer
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import log_scores
from sess_lightning.methods.evidence import RIVALS as RIVALS  # Under its own name: defined here once.
from sess_lightning.methods.evidence import TEMPERATURE as TEMPERATURE
from sess_lightning.methods.evidence import Evidence, class_evidence, layer_evidence, log_odds, logit
from sess_lightning.methods.gradient import generator
from sess_lightning.methods.templates import ExtractingMethod
from sess_lightning.ops import ROUNDING, full_precision, min_max_upsampled, size_of
from sess_lightning.types import Activation, Extraction


@dataclass(frozen=True)
class _FromFeatures(ExtractingMethod):
    """What the family shares: features, their gradients, and a rule to combine the two.

    Written here rather than taken from a library because SESS calls it per window: scores and maps come out
    of one forward pass, the backward pass runs through the head only, and maps stay on the layer's small grid
    until fused. Each rule is tested against the library ``grad-cam``.

    Attributes:
        target_layer: The layer, as a dotted name or a module; None finds the last one that keeps a grid.
        activation: How the model's logits become probabilities.
        of: What is differentiated: the target's ``"logit"``, or its ``"log_odds"`` against the classes it
            could be mistaken for. For a sigmoid head, whose logits are log-odds against absence, both are the
            same.
    """

    target_layer: TargetLayer = None
    activation: Activation = "softmax"
    of: Literal["logit", "log_odds"] = field(default="logit", kw_only=True)
    single_forward: ClassVar[bool] = True
    has_strength: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.of not in ("logit", "log_odds"):
            raise ValueError(f'{type(self).__name__}: of must be "logit" or "log_odds", got {self.of!r}.')

    @property
    def _evidence(self) -> Evidence:
        return log_odds if self.of == "log_odds" and self.activation == "softmax" else logit

    @abstractmethod
    def combine(
        self, features: Float[Tensor, "B K h w"], gradients: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B h w"]:
        """Turn features and gradients into maps, any range."""

    def extract(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Extraction:
        """Return maps on the layer's grid, and log-scores, from one forward pass."""
        return self.join_parts([self._combined(model, images, targets)], targets, size_of(images))

    def extract_part(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Any:
        """Return maps as they are combined, and logits, from one forward pass."""
        if not self._extracts_by_itself:
            return super().extract_part(model, images, targets)
        return self._combined(model, images, targets)

    def join_parts(
        self, parts: Sequence[Any], targets: Int[Tensor, " N"], size: tuple[int, int]
    ) -> Extraction:
        """Return the extraction of several batches of images of one size, from their ``extract_part``."""
        if isinstance(parts[0], Extraction):
            return super().join_parts(parts, targets, size)
        maps, logits = map(joined, zip(*parts, strict=True))
        return self._extraction(maps, logits, targets, size)

    def _combined(
        self, model: nn.Module, images: Tensor, targets: Tensor
    ) -> tuple[Float[Tensor, "B h w"], Float[Tensor, "B N"]]:
        with explaining(model, self.only_passes):
            features, gradients, logits = layer_evidence(
                model, self.target_layer, images, targets, self._evidence
            )
            with torch.no_grad(), full_precision(images.device):
                return self.combine(features, gradients), logits

    def extract_classes(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " T"]
    ) -> list[Extraction]:
        """Return ``extract`` of all images for each of ``targets``, from one forward pass."""
        if not self._extracts_by_itself:
            return super().extract_classes(model, images, targets)
        with explaining(model, self.only_passes):
            of_images = [target.repeat(len(images)) for target in targets]
            evidence = class_evidence(model, self.target_layer, images, of_images, self._evidence)
            extractions = []
            for (features, gradients, logits), target in zip(evidence, of_images, strict=True):
                with torch.no_grad(), full_precision(images.device):
                    maps = self.combine(features, gradients)
                extractions.append(self._extraction(maps, logits, target, size_of(images)))
            return extractions

    @property
    def only_passes(self) -> bool:
        """True for the family."""
        return self.is_own

    @property
    def _extracts_by_itself(self) -> bool:
        """Whether no subclass has its own way to extract."""
        return type(self).extract is _FromFeatures.extract

    def _extraction(self, maps: Tensor, logits: Tensor, targets: Tensor, size: tuple[int, int]) -> Extraction:
        with torch.no_grad():
            maps, ends = min_max_upsampled(maps, size)
            return Extraction(maps, log_scores(logits, targets, self.activation), ends)


@dataclass(frozen=True)
class GradCAM(_FromFeatures):
    """Grad-CAM (Selvaraju et al., ICCV 2017): features weighted by their mean gradient, rectified.

    Attributes:
        target_layer: The layer, as a dotted name or a module; None finds the last one that keeps a grid.
        activation: How the model's logits become probabilities.

    >>> GradCAM()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    def combine(
        self, features: Float[Tensor, "B K h w"], gradients: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B h w"]:
        """Turn features and gradients into maps, any range."""
        # A matrix product would take half of the time, at five times the rounding.
        return (gradients.mean((2, 3), keepdim=True) * features).sum(1).relu()


@dataclass(frozen=True)
class CAM(_FromFeatures):
    """CAM (Zhou et al., CVPR 2016): features weighted by the final linear layer's weights, not rectified.

    Defined where a single linear layer reads the features' mean over places, as in ResNet, MobileNetV2 or
    EfficientNet; any other head is refused. There, a logit's gradient by each feature is that layer's weight
    over the number of places, so the weights are read from the gradient.

    Attributes:
        target_layer: As for ``GradCAM``.
        activation: How the model's logits become probabilities.

    >>> CAM()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    def extract(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Extraction:
        """Return maps on the layer's grid, and log-scores, from one forward pass.

        Raises:
            ValueError: If the head is not a single linear layer after global average pooling.
        """
        with explaining(model, self.only_passes):
            check_linear_head(model, self.target_layer, borrowed(images[:1]))
            return super().extract(model, images, targets)

    def combine(
        self, features: Float[Tensor, "B K h w"], gradients: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B h w"]:
        """Turn features and gradients into maps, any range."""
        return (gradients.sum((2, 3), keepdim=True) * features).sum(1)


@dataclass(frozen=True)
class GradCAMPlusPlus(_FromFeatures):
    """Grad-CAM++ (Chattopadhay et al., WACV 2018): weights that share out credit among places, rectified.

    Of exp(logit), whose higher derivatives are powers of the logit's gradient g where the head is piecewise
    linear: alpha = g^2 / (2 g^2 + sum(A) g^3), weight = sum(alpha relu(g)), each sum over places (equations
    19 and 21; exp(logit) itself cancels). The paper has no epsilon; ``grad-cam`` adds 1e-6 to alpha's
    denominator, which is followed here: it matters, since g^2 is often no larger.

    Attributes:
        target_layer: As for ``GradCAM``.
        activation: How the model's logits become probabilities.
        epsilon: Added to alpha's denominator; 0 is the paper's.

    >>> GradCAMPlusPlus()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    epsilon: float = 1e-6

    def combine(
        self, features: Float[Tensor, "B K h w"], gradients: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B h w"]:
        """Turn features and gradients into maps, any range."""
        return _plus_plus(features, gradients, gradients**2, gradients**3, self.epsilon)


def _plus_plus(
    features: Float[Tensor, "B K h w"],
    first: Float[Tensor, "B K h w"],
    second: Float[Tensor, "B K h w"],
    third: Float[Tensor, "B K h w"],
    epsilon: float,
) -> Float[Tensor, "B h w"]:
    shared = 2 * second + features.sum((2, 3), keepdim=True) * third + epsilon
    alpha = torch.where(shared == 0, 0, second / torch.where(shared == 0, 1, shared))
    weights = (alpha * first.relu()).sum((2, 3), keepdim=True)
    return (weights * features).sum(1).relu()


@dataclass(frozen=True)
class SmoothGradCAMPlusPlus(GradCAMPlusPlus):
    """Smooth Grad-CAM++ (Omeiza et al., 2019): Grad-CAM++ with g, g^2 and g^3 averaged over noisy copies.

    Features and scores are those of the image itself. Under a linear head, gradients do not depend on the
    image and this is only a more expensive Grad-CAM++: choose an earlier layer. Every image of a batch gets
    the same noise, so that its map does not depend on its neighbours.

    Attributes:
        target_layer: As for ``GradCAM``.
        activation: How the model's logits become probabilities.
        epsilon: As for ``GradCAMPlusPlus``.
        num_samples: Noisy copies, one forward pass each.
        noise: The noise's standard deviation, as a share of each image's range.
        seed: Seed of the noise's own generator; the global one is never touched.

    >>> SmoothGradCAMPlusPlus(num_samples=2)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    num_samples: int = 10
    noise: float = 0.15
    seed: int = 0
    single_forward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1 or self.noise < 0:
            raise ValueError(
                "SmoothGradCAMPlusPlus: num_samples must be at least 1 and noise not negative, got "
                f"{self.num_samples} and {self.noise}."
            )

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """One for the features, one per noisy copy."""
        return 1 + self.num_samples

    def extract(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Extraction:
        """Return maps on the layer's grid, and log-scores."""
        with explaining(model, self.only_passes):
            features, _, logits = layer_evidence(model, self.target_layer, images, targets, self._evidence)
            powers = [torch.zeros_like(features) for _ in range(3)]
            for noisy in self._noisy(images):
                _, gradients, _ = layer_evidence(model, self.target_layer, noisy, targets, self._evidence)
                for power, total in enumerate(powers, 1):
                    total += gradients**power / self.num_samples
            with torch.no_grad(), full_precision(images.device):
                maps = _plus_plus(features, powers[0], powers[1], powers[2], self.epsilon)
                maps, ends = min_max_upsampled(maps, size_of(images))
                return Extraction(maps, log_scores(logits, targets, self.activation), ends)

    def _noisy(self, images: Float[Tensor, "B C H W"]) -> Iterator[Float[Tensor, "B C H W"]]:
        spread = self.noise * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
        # A meta tensor has neither a generator nor values.
        source = generator(images.device, self.seed) if images.device.type != "meta" else None
        for _ in range(self.num_samples):
            noise = torch.randn(images.shape[1:], generator=source, device=images.device, dtype=torch.float32)
            yield images + spread * noise.to(images.dtype)


@dataclass(frozen=True)
class LayerCAM(_FromFeatures):
    """LayerCAM (Jiang et al., TIP 2021): each place's features weighted by its own positive gradients.

    Attributes:
        target_layer: As for ``GradCAM``; early layers give usable maps, too.
        activation: How the model's logits become probabilities.

    >>> LayerCAM()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    def combine(
        self, features: Float[Tensor, "B K h w"], gradients: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B h w"]:
        """Turn features and gradients into maps, any range."""
        return (gradients.relu() * features).sum(1).relu()


@dataclass(frozen=True)
class HiResCAM(_FromFeatures):
    """HiResCAM (Draelos & Carin, 2020): each place's features weighted by its own gradients, rectified.

    Attributes:
        target_layer: As for ``GradCAM``.
        activation: How the model's logits become probabilities.

    >>> HiResCAM()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    def combine(
        self, features: Float[Tensor, "B K h w"], gradients: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B h w"]:
        """Turn features and gradients into maps, any range."""
        return (gradients * features).sum(1).relu()


@dataclass(frozen=True)
class XGradCAM(_FromFeatures):
    """XGrad-CAM (Fu et al., BMVC 2020): gradients averaged with each channel's own features as weights.

    The weight of a channel whose features sum to 0, up to rounding, is not divided. ``grad-cam`` adds 1e-7 to
    each sum instead, which differs for sums of that size only.

    Attributes:
        target_layer: As for ``GradCAM``.
        activation: How the model's logits become probabilities.

    >>> XGradCAM()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    def combine(
        self, features: Float[Tensor, "B K h w"], gradients: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, "B h w"]:
        """Turn features and gradients into maps, any range."""
        total = features.sum((2, 3), keepdim=True)
        cancelled = total.abs() <= ROUNDING * features.abs().sum((2, 3), keepdim=True)
        weights = (gradients * features).sum((2, 3), keepdim=True) / torch.where(cancelled, 1, total)
        return (weights * features).sum(1).relu()
