"""What every score is compared with: controls, which do not use the model, and the base's map, blurred."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.introspection.logits import check_inputs
from sess_lightning.methods.templates import MapMethod, WrappingMethod
from sess_lightning.ops import blur, min_max, size_of
from sess_lightning.types import Activation, Explanation, SaliencyMethod


class _Blind(MapMethod):
    forwards: ClassVar[int] = 0

    @property
    def only_passes(self) -> bool:
        """The model is not even run."""
        return self.is_own

    @abstractmethod
    def draw(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
        """Draw a map for each image."""

    def __call__(
        self,
        model: nn.Module,  # noqa: ARG002
        images: Float[Tensor, "B C H W"],
        targets: Int[Tensor, " B"],
    ) -> Float[Tensor, "B H W"]:
        """Return the maps alone: no forward pass."""
        check_inputs(type(self).__name__, images, targets)
        return self.draw(images)

    def maps(
        self,
        model: nn.Module,  # noqa: ARG002
        images: Float[Tensor, "B C H W"],
        targets: Int[Tensor, " B"],  # noqa: ARG002
    ) -> Float[Tensor, "B H W"]:
        """Return the maps."""
        return self.draw(images)


@dataclass(frozen=True)
class RandomMap(_Blind):
    """Uniform noise, the same for all images of one size: the score of a ranking without any knowledge.

    Attributes:
        seed: Seed of its own generator; the global one is never touched.
        activation: How the model's logits become probabilities.

    >>> RandomMap()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    seed: int = 0
    activation: Activation = "softmax"

    def draw(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
        """Draw a map for each image."""
        return _noise(size_of(images), self.seed, images.device).expand(len(images), -1, -1)


@dataclass(frozen=True)
class CentreGaussian(_Blind):
    """A Gaussian in the middle of the image: the score of photographers' habits alone.

    Attributes:
        sigma: Standard deviation, as a share of each side.
        activation: How the model's logits become probabilities.

    >>> CentreGaussian()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    sigma: float = 0.25
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(
                f"CentreGaussian: sigma must be positive, a share of each side, got {self.sigma}."
            )

    def draw(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
        """Draw a map for each image."""
        return _gaussian(size_of(images), self.sigma, images.device).expand(len(images), -1, -1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _noise(size: tuple[int, int], seed: int, device: torch.device) -> Float[Tensor, "1 H W"]:
    if device.type == "meta":
        return torch.zeros(1, *size, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return min_max(torch.rand(1, *size, generator=generator, device=device, dtype=torch.float32))


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _gaussian(size: tuple[int, int], sigma: float, device: torch.device) -> Float[Tensor, "1 H W"]:
    y, x = (((torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n - 0.5) / sigma for n in size)
    return min_max(torch.exp(-(y[None, :, None] ** 2 + x[None, None, :] ** 2) / 2))


@dataclass(frozen=True)
class Blurred(WrappingMethod):
    """A method's map, blurred: SESS smooths, and without this control a gain may be due to blur alone.

    The default is 41 px with sigma 12 at a shorter side of 224 px, in proportion for other images.

    Attributes:
        base: The method whose maps are blurred.
        kernel_size: Side of the square Gaussian kernel, px, odd; None follows from ``sigma``.
        sigma: Standard deviation of the kernel, px; None follows from the image.

    >>> Blurred(GradCAM())(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    base: SaliencyMethod
    kernel_size: int | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        self.check_base()

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """The base method's."""
        return self.base.forwards

    @property
    def scores_apart(self) -> bool:  # type: ignore[override]
        """As for the base method."""
        return self.base.scores_apart

    def count_forwards(self, model: nn.Module, size: tuple[int, int]) -> int:
        """Return what the base method costs."""
        return self.base.count_forwards(model, size)

    def explain(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Explanation:
        """Explain ``targets`` on ``images``; raises what the base method raises."""
        maps, scores = self.base.explain(model, images, targets)
        return Explanation(self.blurred(maps), scores)

    def __call__(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the maps alone."""
        return self.blurred(self.base(model, images, targets))

    def blurred(self, maps: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
        """Blur maps."""
        sigma = self.sigma if self.sigma is not None else 12 * min(size_of(maps)) / 224
        kernel_size = self.kernel_size if self.kernel_size is not None else 2 * round(sigma * 5 / 3) + 1
        return min_max(blur(maps, kernel_size, sigma))


def controls(method: SaliencyMethod, blurred: bool = False) -> dict[str, SaliencyMethod]:
    """Return what a method is compared with by default: its base and the controls.

    Args:
        method: The method that is scored.
        blurred: Whether to add the base's map, blurred.
    """
    base = getattr(method, "base", None)
    compared = base if isinstance(base, SaliencyMethod) else method
    return {
        **({"base": compared} if compared is not method else {}),
        **({"blurred": Blurred(compared)} if blurred else {}),
        "random": RandomMap(activation=method.activation),
        "centre": CentreGaussian(activation=method.activation),
    }
